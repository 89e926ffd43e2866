"""What a drawing gives: the picture, the settings that draw it again (they travel in its PNG), and how it is shown."""

import base64
import dataclasses
import html
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..files import write_whole
from ..lesson import show

KEY = "sd3kit"  # the PNG's text chunk that holds the settings
# Every setting that a PNG may bring back.
SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance", "shift", "size", "strength", "scales", "keep")
WIDTH = 320  # pixels of a picture on the page
LINK = "color:var(--jp-content-link-color,#00539F);text-decoration:underline"


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

    @property
    def caption(self) -> str:
        """All settings in one line, such as "a fox; seed 3, steps 28, guidance 7, shift 3, size 1024"."""
        others = [name for name, value in self.settings.items() if name not in ("prompt", "seed") and value != ""]
        return f"{self.alt}, {in_words(self.settings, others)}"

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


def from_png(path_or_bytes: str | os.PathLike | bytes) -> dict[str, Any]:
    """The settings that `Drawn.png` stored in a picture: `text_to_image(pipe, **from_png("fox.png"))` draws it again.

    They are arguments of the function that drew it; the picture and the mask that `image_to_image` was given are not
    stored, and have to be given again.

    Raises:
        ValueError: not a PNG, or without settings; in one sentence. OSError: the file cannot be read.
    """
    data = path_or_bytes if isinstance(path_or_bytes, bytes) else Path(path_or_bytes).read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            text = image.info.get(KEY)  # read without the picture, so its size does not matter
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for damaged files
        raise ValueError("This file is not a PNG picture.") from error
    if text is None:
        raise ValueError("This PNG holds no settings: only those that an explorer or Drawn.save wrote do.")
    try:
        return {name: value for name, value in json.loads(text).items() if name in SETTINGS}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError("The settings in this PNG are damaged.") from error


def in_words(settings: Mapping[str, Any], names: Iterable[str]) -> str:
    """Some settings in one line."""
    words = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings.items()}
    words["scales"] = ", ".join(f"{name} {scale:g}" for name, scale in settings.get("scales", {}).items())
    return ", ".join(f"{name.replace('_', ' ')} {words[name]}" for name in names)


def image_html(image: Image.Image, alt: str, width: int = WIDTH) -> str:
    """A picture as `<img>` of a width in pixels, its data scaled down to what the sharpest screens show of it."""
    small, data = image.copy(), io.BytesIO()
    small.thumbnail((2 * width, 2 * width))
    small.save(data, "PNG")
    return show.img(data.getvalue(), alt, width)


def side_by_side(parts: Iterable[str]) -> str:
    parts = list(parts)
    width = f"{WIDTH}px" if len(parts) == 1 else f"min({WIDTH}px,calc(50% - 6px))"  # two to a row where it is narrow
    cells = "".join(f'<div style="flex:0 1 {width};min-width:0">{part}</div>' for part in parts)
    return f'<div style="display:flex;flex-wrap:wrap;gap:12px;line-height:1.4">{cells}</div>'


def figures(made: Sequence[Drawn]) -> list[str]:
    """Each picture over what sets it apart from the others, a link that downloads it, and all its settings."""
    parts = []
    for drawn in made:
        settings = drawn.settings
        apart = [name for name in settings if any(one.settings.get(name) != settings[name] for one in made)]
        words = in_words(settings, apart)
        data = base64.b64encode(drawn.png()).decode()
        parts.append(
            image_html(drawn.image, drawn.alt)
            + (f"<strong>{html.escape(words)}</strong><br>" if words else "")
            + f'<a download="sd3kit-seed-{settings["seed"]}.png" href="data:image/png;base64,{data}" style="{LINK}">'
            + f"Download this PNG</a> (its settings are inside)<br>{html.escape(drawn.caption)}"
        )
    return parts
