"""Explorers: turn a knob and see SD3 answer, in widgets or by plain functions that return the picture and the data.

Each subject is a file with its function and its explorer, which the last line of a cell shows. Functions need no
widgets, and all draw by `text_to_image`. `drawing` is what a drawing needs, `drawn` what comes out, `explorer` and
`controls` what all explorers share. May import `lesson`, `loading`, `pictures` and `files`. Start with `text.py`.
"""

# ruff: noqa: F401  (the names below are the package's own)
from .adapters import Lora, lora, lora_layout
from .drawing import Step, Stopped, latent_to_rgb
from .drawn import Drawn, from_png
from .encoding import Encoders, encoders
from .explorer import Explorer
from .image import ImageToImage, image_to_image
from .shift import Schedule, curve, schedule, sigmas
from .text import TextToImage, text_to_image
from .words import Attention, attention, heat
