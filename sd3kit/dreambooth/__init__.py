"""DreamBooth for Stable Diffusion 3: teach a model a subject from a few pictures, with LoRA or in full.

`accelerate launch -m sd3kit.dreambooth --help` lists the options (`settings`); `train` is the training loop, `data`
says what it is fed, and `subject` draws the five pictures that lesson 06 teaches nano.
"""

from .settings import DreamBoothError, Settings

__all__ = ["DreamBoothError", "Settings"]
