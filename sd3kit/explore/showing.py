"""How explorers show what was drawn: pictures side by side over their settings, small, as PNG."""

import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from ..lesson import show
from .drawn import Drawn, summary

WIDTH = 320  # pixels of a picture on the page
LINK = "color:var(--jp-content-link-color,#00539F);text-decoration:underline"


def image_html(image: Image.Image, alt: str, width: int = WIDTH) -> str:
    """A picture as `<img>`, its data scaled down to the width where they are larger."""
    small, data = image.copy(), io.BytesIO()
    small.thumbnail((width, width))
    small.save(data, "PNG")
    return show.img(data.getvalue(), alt, width)


def side_by_side(parts: Iterable[str]) -> str:
    parts = list(parts)
    width = f"{WIDTH}px" if len(parts) == 1 else f"min({WIDTH}px,calc(50% - 6px))"  # two to a row where it is narrow
    cells = "".join(f'<div style="flex:0 1 {width};min-width:0">{part}</div>' for part in parts)
    return f'<div style="display:flex;flex-wrap:wrap;gap:12px;line-height:1.4">{cells}</div>'


def figures(made: Sequence[Drawn], links: bool = True) -> list[str]:
    """Each picture over what sets it apart from the others, all its settings, and a link that downloads it."""
    parts = []
    for drawn in made:
        apart = [name for name, value in drawn.settings.items() if any(one.settings[name] != value for one in made)]
        words = ", ".join(f"{name.replace('_', ' ')} {_short(drawn.settings[name])}" for name in apart)
        part = f"<strong>{html.escape(words)}</strong><br>" if words else ""
        if links:
            shown = show.img(drawn.png(), drawn.alt, WIDTH)
            href, name = shown.split('"', 2)[1], f"sd3kit-seed-{drawn.settings['seed']}.png"
            part += f'<a download="{name}" href="{href}" style="{LINK}">Download this PNG</a> (its settings are inside)'
        else:
            shown = image_html(drawn.image, drawn.alt)
            part += html.escape(drawn.settings["prompt"])
        parts.append(f"{shown}{part}<br>{html.escape(summary(drawn.settings))}")
    return parts


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
