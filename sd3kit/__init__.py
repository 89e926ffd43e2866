"""Learn Stable Diffusion 3: a small real SD3 in the package, and thin helpers around diffusers.

`load` gives a plain diffusers pipeline. Each package begins with what it is for, what it may import and where to start
reading; from the bottom up: `errors`, `files`; `loading`; `pictures`, `records`; `lesson`; `recipe`; `measuring`;
`dreambooth`; `study`; `explore`; `command`.
"""

import logging
import os
import sys

# Threads of torch that wait for each other must sleep, not spin: beside any other work a spinning thread takes the core
# that it waits for (up to 40 times slower). OpenMP reads this once, when torch is loaded; what a person has set stays.
if "OMP_WAIT_POLICY" not in os.environ and "torch" in sys.modules:
    print(
        "sd3kit: torch was imported first, so its threads spin while they wait; beside other work that is slow. "
        "Import sd3kit before torch, or set OMP_WAIT_POLICY=PASSIVE.",
        file=sys.stderr,
    )
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .loading.names import MODELS, LoadError

# Importing diffusers' SD3 pipeline makes transformers say that two picture readers, for which SD3 has no use, would
# like torchvision. That line alone is kept off the page.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision" not in record.getMessage()
)

__all__ = ["MODELS", "LoadError", "fit", "load"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load":  # on first use: it brings torch with it
        from .loading.pipeline import load

        return load
    if name == "fit":
        from .measuring.fit import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
