"""Pictures for notebooks: grids with labels, figures, and an alternative text for those who do not see them."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's colours, which people with any kind of colour vision can tell apart.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip


def img(png: bytes, alt: str, width: int) -> str:
    """An `<img>` of a PNG with its alternative text, `width` pixels wide where there is room."""
    return (
        f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{html.escape(alt, quote=True)}" '
        f'width="{width}" style="max-width:100%;height:auto">'
    )


class Picture:
    """A picture that a notebook shows with an alternative text; `image` is the PIL image."""

    def __init__(self, image: Image.Image, alt: str):
        self.image, self.alt = image, alt

    def _repr_html_(self) -> str:
        data = io.BytesIO()
        self.image.save(data, "PNG", optimize=True)
        return img(data.getvalue(), self.alt, min(self.image.width, 960))

    def __repr__(self) -> str:
        return f"Picture({self.alt!r})"


def grid(
    images: Sequence[Image.Image],
    *,
    columns: int | None = None,
    labels: Sequence[str] | None = None,
    title: str = "",
    alt: str = "",
    side: int = 192,
) -> Picture:
    """The images in a grid, scaled to `side` pixels, row by row, each under its label.

    Args:
        images: at least one.
        columns: how many to a row; None puts all in one row, eight at most.
        labels: one for each image.
        title: above the grid: what it shows; a long one takes two lines.
        alt: the alternative text; title and labels where it is empty.
        side: pixels of each image, the longer edge.

    Raises:
        ValueError: no images, or labels that do not match them.
    """
    images = list(images)
    if not images:
        raise ValueError("A grid needs at least one image.")
    labels = [""] * len(images) if labels is None else [str(label) for label in labels]
    if len(labels) != len(images):
        raise ValueError(f"A grid needs one label for each image, not {len(labels)} labels for {len(images)} images.")
    columns = columns or min(len(images), 8)
    gap = 8
    width = columns * (side + gap) + gap
    tall = max(14, round(width / 52))  # letters: at least 7 pixels where the sheet is shown 400 wide
    font, heading = ImageFont.load_default(tall), ImageFont.load_default(tall + 1)
    width = max(width, min(round(heading.getlength(title)) + 2 * gap, 480))
    lines, titles = [_wrap(label, font, side) for label in labels], _wrap(title, heading, width - 2 * gap)
    head = 9 + (tall + 5) * len(titles) if title else gap
    heights = []  # of each row, with the most lines of its labels
    for start in range(0, len(images), columns):
        most = max(map(len, lines[start : start + columns]))
        heights.append(side + gap + (tall + 4) * most + (4 if any(labels) else 0))
    sheet = Image.new("RGB", (width, head + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((gap, 6), "\n".join(titles), font=heading, fill="black", spacing=4)
    for i, (image, label) in enumerate(zip(images, lines, strict=True)):
        x, y = gap + i % columns * (side + gap), head + sum(heights[: i // columns])
        scale = side / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        # small pictures grow by whole pixels where they can, and are not blurred
        method = Image.Resampling.NEAREST if scale >= 1 and float(scale).is_integer() else Image.Resampling.LANCZOS
        sheet.paste(image.convert("RGB").resize(size, method), (x, y))
        for row, line in enumerate(label):
            draw.text((x, y + side + 3 + (tall + 4) * row), line, font=font, fill="black")
    described = alt or ". ".join(part for part in (title, "; ".join(filter(None, labels))) if part)
    return Picture(sheet, described)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def figure(fig, alt: str) -> Picture:
    """A matplotlib figure as a picture with an alternative text; the figure is closed."""
    import matplotlib.pyplot as plt

    data = io.BytesIO()
    fig.savefig(data, format="png", dpi=110, bbox_inches="tight")
    plt.close(fig)
    return Picture(Image.open(data).convert("RGB"), alt)


def to_image(tensor) -> Image.Image:
    """A tensor (3, H, W) of -1..1 as an image."""
    array = ((tensor.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array))
