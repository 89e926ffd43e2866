"""Explorers: turn a knob and see SD3 answer, in widgets or by plain functions that return the picture and the data.

Functions (`drawing`) need no widgets: `text_to_image`, `image_to_image`, `inpaint`, `schedule`, `attention`, `lora`,
`encoders`; `from_png` brings back the settings that are stored in a picture. Each has an explorer of the same name in
capitals, made of core ipywidgets: `TextToImage(pipe)` as the last line of a cell shows it. `python -m sd3kit.explore`
serves the first two as a page.
"""

import importlib
from typing import Any

from .drawing import (
    Drawn,
    Step,
    Stopped,
    attention,
    curve,
    encoders,
    from_png,
    heat,
    image_to_image,
    inpaint,
    latent_to_rgb,
    lora,
    mask,
    schedule,
    sigmas,
    text_to_image,
)

_EXPLORERS = ("Attention", "Encoders", "ImageToImage", "Lora", "Schedule", "TextToImage", "page")

__all__ = [
    "Attention",
    "Drawn",
    "Encoders",
    "ImageToImage",
    "Lora",
    "Schedule",
    "Step",
    "Stopped",
    "TextToImage",
    "attention",
    "curve",
    "encoders",
    "from_png",
    "heat",
    "image_to_image",
    "inpaint",
    "latent_to_rgb",
    "lora",
    "mask",
    "page",
    "schedule",
    "sigmas",
    "text_to_image",
]


def __getattr__(name: str) -> Any:
    """The explorers, imported when first asked for: the functions work where ipywidgets is not installed."""
    if name not in _EXPLORERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(".explorers", __name__)
    except ModuleNotFoundError as error:
        if error.name != "ipywidgets":
            raise
        raise ImportError(
            f"{name} needs ipywidgets: pip install 'sd3kit[lab]', or use the function of the same name."
        ) from error
    return getattr(module, name)
