"""DreamBooth for Stable Diffusion 3: teach a model a subject from a few pictures, with LoRA or in full.

`accelerate launch -m sd3kit.dreambooth --help` lists the options (`settings`; `checks` refuses what cannot be meant);
`train` is the training loop, `data` says what it is fed, and `subject` draws the pictures that lesson 06 teaches nano.
May import `loading`, `records`, `recipe`, `pictures` and `files`. Start with `settings.py`.
"""

from .settings import DreamBoothError, Settings

__all__ = ["DreamBoothError", "Settings"]
