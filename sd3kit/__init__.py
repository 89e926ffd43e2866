"""Learn Stable Diffusion 3: a small real SD3 in the package, and thin helpers around diffusers.

`load` gives a plain diffusers pipeline; everything else is in its own module (`show`, `check`, `measure`).
"""

from .loading import MODELS, LoadError, load

__all__ = ["MODELS", "LoadError", "fit", "load"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "fit":  # on first use: it brings diffusers' configurations with it
        from .account import fit

        return fit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
