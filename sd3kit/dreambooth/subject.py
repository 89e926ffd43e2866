"""The subject of lesson 06: a robot with one eye that nano has never seen, drawn here, and a judge that knows it.

`python -m sd3kit.dreambooth.subject` draws the five pictures of `pictures/` again. They are part of this project and
under its licence (Apache-2.0).
"""

import io
import json
from pathlib import Path

from PIL import Image, ImageDraw

from ..recipe.art import LARGE
from ..recipe.judge import TEMPLATES, Judge
from ..recipe.scenes import COLOURS, STYLES

PICTURES = Path(__file__).parent / "pictures"
SIDE, SMOOTH = 128, 4  # pixels of a picture; how many times larger it is drawn, for smooth edges
BACKGROUNDS = ("yellow", "white", "teal", "pink", "gray")
BODY, BELT, EYE, PUPIL = (112, 214, 60), (243, 120, 30), (255, 255, 255), (30, 30, 60)
LIMB, BULB, SHOE = (70, 90, 110), (225, 40, 60), (60, 60, 170)


def robot() -> Image.Image:
    """The robot alone, RGBA, `SIDE` pixels square: green, an orange belt, one eye, two bulbs on springs, blue shoes."""
    k = SMOOTH
    image = Image.new("RGBA", (SIDE * k, SIDE * k))
    draw = ImageDraw.Draw(image)

    def box(x0, y0, x1, y1, fill, radius=0.0, outline=None):
        draw.rounded_rectangle((x0 * k, y0 * k, x1 * k, y1 * k), radius * k, fill, outline, 2 * k if outline else 0)

    def disc(x, y, r, fill):
        draw.ellipse(((x - r) * k, (y - r) * k, (x + r) * k, (y + r) * k), fill)

    def line(*points, width):
        draw.line([(x * k, y * k) for x, y in points], LIMB, width * k, joint="curve")

    for x, lean in ((48, -6), (80, 6)):  # bulbs on springs
        line((x, 34), (x + lean, 20), width=4)
        disc(x + lean, 16, 7, BULB)
    for shoulder, x in ((33, 17), (95, 111)):
        line((shoulder, 64), (x, 86), width=6)
        disc(x, 86, 6, BULB)
    for x in (50, 78):  # legs and shoes
        line((x, 94), (x, 108), width=7)
        box(x - 11, 105, x + 11, 117, SHOE, 6)
    box(31, 30, 97, 98, BODY, 20)
    box(31, 72, 97, 84, BELT)
    disc(64, 52, 17, EYE)
    disc(64, 54, 8, PUPIL)
    disc(67, 51, 3, EYE)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def picture(colour: str) -> Image.Image:
    """The robot on a flat background of one of nano's colours, 128 px.

    It stands where nano's own single subjects mostly do and is as large as they are, so that the robot alone is new.
    Where it stood in several places, or moved its arms, a hundred steps mixed them: two eyes, four hands.
    """
    alone = robot().resize((LARGE, LARGE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE), COLOURS[colour])
    canvas.alpha_composite(alone, ((SIDE - LARGE) // 2,) * 2)
    return canvas.convert("RGB")


def judge() -> Judge:
    """A judge of nano's pictures that knows the robot too: the last row of its `distances`."""
    sheet = Image.open(TEMPLATES).convert("RGBA")
    cell = sheet.width // len(STYLES)
    wider = Image.new("RGBA", (sheet.width, sheet.height + cell))
    wider.paste(sheet, (0, 0))
    alone = robot().resize((cell, cell), Image.Resampling.BOX)
    for column in range(len(STYLES)):  # it has one style
        wider.paste(alone, (column * cell, sheet.height))
    stored = io.BytesIO()
    wider.save(stored, "PNG")
    return Judge(path=stored)


def is_robot(judge: Judge, image: Image.Image) -> bool:
    """Whether our robot is nearer to what stands in the picture than anything that nano knows."""
    distances = judge.distances(image).min(1)
    return bool(distances.min() < float("inf") and distances.argmin() == len(distances) - 1)


def main(folder: Path = PICTURES) -> None:
    folder.mkdir(exist_ok=True)
    rows = []
    for colour in BACKGROUNDS:
        picture(colour).save(folder / f"{colour}.png", optimize=True)
        rows.append({"file_name": f"{colour}.png", "text": f"a sks robot on a {colour} background"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
