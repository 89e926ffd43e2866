"""Files of the trainings that are whole or as they were, and checkpoints that know what they began from."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..errors import UserError


def save_whole(state: dict, path: Path) -> None:
    """Write a checkpoint whole or not at all: a kill at any moment leaves the old one or the new one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files and folders take their places in `folder` when all are there.

    A kill at any moment leaves each file as it was or as it is now; what else lies in `folder` stays.
    """
    part = folder / ".recipe.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        _move(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _move(new: Path, place: Path) -> None:
    if not (new.is_dir() and place.is_dir()):
        os.replace(new, place)
        return
    for path in new.iterdir():
        _move(path, place / path.name)
    new.rmdir()


def mark(weights: Iterable[torch.Tensor]) -> str:
    """A hash of weights, by which a checkpoint knows what it began from.

    They are rounded to what float16, bfloat16 and float32 have in common: a model is itself in each, and when saved.
    """
    found = hashlib.sha256()
    for each in weights:
        found.update(each.detach().cpu().half().bfloat16().view(torch.int16).numpy().tobytes())
    return found.hexdigest()


def save_parts(parts: dict, path: Path, **more) -> None:
    """Write a checkpoint of all that has a `state_dict`, and of `more`."""
    save_whole({name: part.state_dict() for name, part in parts.items()} | more, path)


def restore_parts(parts: dict, path: Path, began: dict[str, str] | None = None) -> dict | None:
    """Load a checkpoint into its parts, on whatever device they are. Returns all that it holds, or None without one.

    `began` has what this training begins from, by name, as `mark` and `save_parts` keep it. UserError: the checkpoint
    began from something else. What it made itself is no other: a pipeline may have taken the place of its start.
    """
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    if began and (stored := state.get("began")) is None:
        print(f"{path} is older and does not say what it began from: it goes on as if from this model.")
    elif began:
        stored, made = stored if isinstance(stored, dict) else {}, mark(state["average"]["values"])
        if other := [name for name, value in began.items() if value not in (stored.get(name), made)]:
            what = f"{path} did not begin from this model (other: {', '.join(other)})"
            raise UserError(f"{what}: give another --work, or what it began from.")
    for name, part in parts.items():
        if name in state:  # older ones have no guard
            part.load_state_dict(state[name])
    return state
