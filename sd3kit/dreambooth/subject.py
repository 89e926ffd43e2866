"""The subject of lesson 06: a robot with one eye that nano has never seen, drawn here, and a judge that knows it.

`python -m sd3kit.dreambooth.subject` draws the eight pictures of `pictures/` again; `main(folder, side=1024)` draws
them as large and as sharp as a real model wants them. They are part of this project, under its licence (Apache-2.0).
"""

import io
import json
import math
from pathlib import Path

from PIL import Image, ImageDraw

from ..recipe.judge import TEMPLATES, Judge
from ..recipe.scenes import COLOURS, STYLES, Subject

PICTURES = Path(__file__).parent / "pictures"
SIDE, SMOOTH = 128, 4  # pixels of a picture; how many times larger it is drawn, for smooth edges
BODY, BELT, EYE, PUPIL = (112, 214, 60), (243, 120, 30), (255, 255, 255), (30, 30, 60)
LIMB, BULB, SHOE = (70, 90, 110), (225, 40, 60), (60, 60, 170)
# Eight pictures by name: the subject in words, how `robot` draws it, the background, and in shares of the side how high
# its square is and where its middle. Most stand where nano's own do: where the place varied too, 100 steps mixed them.
SCENES = {
    "standing": ("a sks robot", {}, "yellow", 0.75, (0.5, 0.5)),
    "waving": ("a sks robot waving", {"arms": (36, 150)}, "white", 0.75, (0.49, 0.5)),
    "cheering": ("a sks robot cheering", {"arms": (140, 140)}, "teal", 0.78, (0.5, 0.51)),
    "left": ("a sks robot facing left", {"turn": -1.0}, "pink", 0.75, (0.5, 0.5)),
    "right": ("a sks robot facing right", {"turn": 1.0}, "gray", 0.75, (0.5, 0.5)),
    "sitting": ("a sks robot sitting", {"feet": (30, 98), "down": 8, "arms": (60, 60)}, "yellow", 0.75, (0.5, 0.5)),
    "leaning": ("a sks robot leaning", {"tilt": -20.0, "arms": (75, 20)}, "gray", 0.75, (0.5, 0.5)),
    "small": ("a small sks robot", {}, "pink", 0.5, (0.5, 0.55)),
}
NAME = "sks robot"


def robot(
    side: int = SIDE, arms=(36, 36), turn: float = 0.0, tilt: float = 0.0, feet=(50, 78), down: int = 0
) -> Image.Image:
    """The robot alone, RGBA, `side` pixels square: green, an orange belt, one eye, two bulbs on springs, blue shoes.

    Args:
        arms: angles of the left and the right arm in the picture, in degrees; 0 hangs down, 180 points up.
        turn: from -1 (it looks to the left) to 1 (to the right).
        tilt: degrees that all of it is turned, anticlockwise.
        feet: where the two stand from left to right, of 128.
        down: how much lower, of 128, the body is above them.
    """
    k = SMOOTH * side / SIDE
    image = Image.new("RGBA", (SMOOTH * side,) * 2)
    draw = ImageDraw.Draw(image)

    def box(x0, y0, x1, y1, fill, radius=0.0):
        draw.rounded_rectangle((x0 * k, (y0 + down) * k, x1 * k, (y1 + down) * k), radius * k, fill)

    def disc(x, y, r, fill, flat=1.0):
        x, y, width = x * k, (y + down) * k, flat * r * k
        draw.ellipse((x - width, y - r * k, x + width, y + r * k), fill)

    def line(*points, width):
        draw.line([(x * k, (y + down) * k) for x, y in points], LIMB, round(width * k), joint="curve")

    def arm(right: bool) -> None:
        sign, angle = (1, math.radians(arms[1])) if right else (-1, math.radians(arms[0]))
        shoulder = 64 + sign * (31 - 8 * abs(turn))
        hand = shoulder + sign * 27 * math.sin(angle), 64 + 27 * math.cos(angle)
        line((shoulder, 64), hand, width=6)
        disc(*hand, 6, BULB)

    half = 33 - 5 * abs(turn)  # of the body's width
    for x, lean in ((48, -6), (80, 6)):  # bulbs on springs
        line((x, 34), (x + lean, 20), width=4)
        disc(x + lean, 16, 7, BULB)
    for hip, foot in zip((50, 78), feet, strict=True):  # legs and shoes; the ground does not move
        line((hip, 94), (foot, 108 - down), width=7)
        toe = 5 * turn
        box(foot - 11 + toe, 105 - down, foot + 11 + toe, 117 - down, SHOE, 6)
    for right in (False, True):  # the far arm is behind the body
        if turn * (1 if right else -1) >= 0:
            arm(right)
    box(64 - half, 30, 64 + half, 98, BODY, 20)
    box(64 - half, 72, 64 + half, 84, BELT)
    flat, eye = 1 - 0.2 * abs(turn), 64 + 13 * turn
    disc(eye, 52, 17, EYE, flat)
    disc(eye + 5 * turn, 54, 8, PUPIL, flat)
    disc(eye + 5 * turn + 3, 51, 3, EYE)
    for right in (False, True):
        if turn * (1 if right else -1) < 0:
            arm(right)
    return image.rotate(tilt, Image.Resampling.BICUBIC).resize((side, side), Image.Resampling.LANCZOS)


def picture(name: str, colour: str | None = None, side: int = SIDE) -> Image.Image:
    """One of `SCENES`, RGB, `side` pixels square, on its own background or another of nano's colours."""
    _, pose, own, size, middle = SCENES[name]
    alone = robot(round(size * side), **pose)
    canvas = Image.new("RGBA", (side, side), COLOURS[colour or own])
    canvas.alpha_composite(alone, tuple(round(m * side - alone.width / 2) for m in middle))
    return canvas.convert("RGB")


def judge() -> Judge:
    """A judge of nano's pictures that knows the robot too, in each pose: its name there is `NAME`."""
    sheet = Image.open(TEMPLATES).convert("RGBA")
    cell, columns = sheet.width // len(STYLES), len(STYLES)
    poses = [pose for _, pose, *_ in SCENES.values()]
    known, rows = sheet.height // cell, -(-len(poses) // columns)
    wider = Image.new("RGBA", (sheet.width, sheet.height + rows * cell))
    wider.paste(sheet, (0, 0))
    for n in range(rows * columns):  # what is left over of the last row is filled with the first poses again
        alone = robot(**poses[n % len(poses)]).resize((cell, cell), Image.Resampling.BOX)
        wider.paste(alone, (n % columns * cell, (known + n // columns) * cell))
    stored = io.BytesIO()
    wider.save(stored, "PNG")
    found = Judge(path=stored)
    found.subjects = [*found.subjects[:known], *[Subject(NAME, (NAME,))] * rows]
    return found


def is_robot(judge: Judge, image: Image.Image) -> bool:
    """Whether our robot is nearer to what stands in the picture than anything that nano knows."""
    found = judge.subject(image)
    return found is not None and found[0] == NAME


def main(folder: Path = PICTURES, side: int = SIDE) -> None:
    """Draw the eight pictures and their table of captions into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (words, _, colour, *_) in SCENES.items():
        picture(name, side=side).save(folder / f"{name}.png", optimize=True)
        rows.append({"file_name": f"{name}.png", "text": f"{words} on a {colour} background"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
