"""What a drawing gives: the picture, the settings that draw it again (they travel in its PNG), and what was found."""

import dataclasses
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..files import write_whole
from ..lesson import show
from ..pictures import MOST_PIXELS

KEY = "sd3kit"  # the PNG's text chunk that holds the settings
NUMBER = (int, float)
# Every setting that a PNG may bring back, and its type.
SETTINGS = {
    "prompt": str, "negative_prompt": str, "seed": int, "steps": int, "guidance": NUMBER, "shift": NUMBER, "size": int,
    "strength": NUMBER, "scales": dict, "keep": str,
}  # fmt: skip


@dataclasses.dataclass
class Drawn:
    """A picture and how it came about.

    `settings` are the arguments that draw it again; `seconds` is the time it took; `steps` of `total` were run, fewer
    where it was stopped; `data` is what else the function found.
    """

    image: Image.Image
    settings: dict[str, Any]
    seconds: float
    steps: int
    total: int
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stopped(self) -> bool:
        return self.steps < self.total

    @property
    def alt(self) -> str:
        """The alternative text: prompt, seed, and where it was stopped."""
        end = f", stopped after {self.steps} of {self.total} steps" if self.stopped else ""
        return f"{self.settings['prompt']}; seed {self.settings['seed']}{end}"

    def png(self) -> bytes:
        """The picture as PNG, with its settings in the metadata."""
        stored, data = PngImagePlugin.PngInfo(), io.BytesIO()
        stored.add_text(KEY, json.dumps(self.settings))
        self.image.save(data, "PNG", pnginfo=stored)
        return data.getvalue()

    def save(self, path: str | os.PathLike) -> None:
        """Write `png()` to a file, whole or not at all; UserError where it cannot be written."""
        write_whole(path, self.png())

    def _repr_html_(self) -> str:
        return show.img(self.png(), self.alt, max(256, self.image.width))


def from_png(source: str | os.PathLike | bytes) -> dict[str, Any]:
    """The settings that `Drawn.png` stored in a picture: `text_to_image(pipe, **from_png("fox.png"))` draws it again.

    They are arguments of the function that drew it; the picture or mask that `image_to_image` and `inpaint` were given
    is not stored, and has to be given again.

    Args:
        source: a path, or the file's bytes.

    Raises:
        ValueError: not a PNG, too large, or without settings; in one sentence.
        OSError: the file cannot be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            text = image.text.get(KEY)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError("This picture is too large to be opened.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError("This file is not a PNG picture.") from error
    if text is None:
        raise ValueError("This PNG holds no settings: only those that an explorer or Drawn.save wrote do.")
    try:
        found = json.loads(text)
        settings = {name: value for name, value in found.items() if name in SETTINGS}
        if not all(isinstance(value, SETTINGS[name]) for name, value in settings.items()):
            raise ValueError
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError("The settings in this PNG are damaged.") from error
    return settings


def summary(settings: Mapping[str, Any]) -> str:
    """Settings in one line, such as "seed 3, 28 steps, guidance 7"."""
    parts = [f"seed {settings['seed']}", f"{settings['steps']} steps", f"guidance {settings['guidance']:g}"]
    if settings.get("negative_prompt"):
        parts.append(f"not {settings['negative_prompt']!r}")
    parts += [f"{name} {settings[name]:g}" for name in ("shift", "strength") if settings.get(name) is not None]
    if "size" in settings:
        parts.append(f"{settings['size']} px")
    if "keep" in settings:
        parts.append(f"encoders {settings['keep'] or 'none'}")
    parts += [f"{name} at {scale:g}" for name, scale in settings.get("scales", {}).items()]
    return ", ".join(parts)
