"""What a model's name stands for: nano's folder, a model of the Hub, or any other folder. Quick to import."""

import difflib
import importlib.resources
import os
from pathlib import Path

from ..errors import UserError
from . import configs

NANO = Path(str(importlib.resources.files("sd3kit"))) / "nano"
TURBO = NANO.with_name("nano-turbo")  # a LoRA for nano, as diffusers saves one, and the scheduler that it wants
MODELS = ("nano", "nano-turbo", *configs.HUB)
USUAL = {"steps": 28, "guidance": 7.0}  # diffusers' defaults


class LoadError(UserError):
    """A model could not be loaded; the message is one sentence that says what to do."""


def resolve(model: str | os.PathLike | None = None) -> str:
    """The folder or Hub id that a name stands for.

    `None` is the environment variable SD3KIT_MODEL, or nano. A name of `MODELS`, a folder with a model_index.json, or
    a Hub id "owner/name" is accepted.

    Raises:
        LoadError: an unknown name (the nearest ones are offered), or a folder that holds no pipeline.
    """
    name = os.fspath(model or os.environ.get("SD3KIT_MODEL") or "nano")
    if name == "nano":
        return str(NANO)
    if name == "nano-turbo":
        return str(TURBO)
    if name in configs.HUB:
        return configs.HUB[name]
    folder = Path(name).expanduser()
    if os.path.isdir(folder):
        if (folder / "model_index.json").is_file():
            return str(folder)
        raise LoadError(
            f"The folder {folder} holds no model_index.json, so it is not a saved pipeline: give the folder that "
            "save_pretrained wrote."
        )
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~"):
        return name
    near = difflib.get_close_matches(name.lower(), MODELS, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(MODELS)},"
    raise LoadError(f"There is no model or folder named {name!r}: {hint} A folder or a Hub id (owner/name) works too.")


def own_settings(model: str | os.PathLike | None = None) -> dict[str, float]:
    """The `steps` and the `guidance` (1 is none) that a model's card asks for, or diffusers' defaults."""
    source = resolve(model)
    name = next((name for name in MODELS if resolve(name) == source), None)
    return dict(zip(USUAL, configs.OWN_SETTINGS.get(name, USUAL.values()), strict=True))
