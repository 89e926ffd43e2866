"""Says what a picture of nano shows: background, subject, style, the words on a sign, how many.

The judge is not a network and has never seen nano: it compares with the art itself. A picture's subject is cut out
along the background, scaled to a fixed square and compared with every icon treated in the same way; letters are
compared with the letters of the font. `evaluate` measures how often it is right on real renders.
"""

import functools
import io
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import write_whole
from ..loading.names import resolve
from . import scenes
from .art import CELL, PLACES, SIZE, Art, sign

TEMPLATES = Path(__file__).parent / "templates.webp"
_STORED = 40  # pixels of a stored template
_SIDE = 24  # pixels of the square in which pictures and templates are compared
_EDGE = 26  # how far from the background (0..255, in the strongest channel) a pixel belongs to the subject
_NOTHING = -1e3  # what stands for no subject; no colour is near to it
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
Box = tuple[int, int, int, int]  # left, top, right, bottom
WHOLE: Box = (0, 0, SIZE, SIZE)
LEFT: Box = (0, 0, SIZE // 2, SIZE)
RIGHT: Box = (SIZE // 2, 0, SIZE, SIZE)


def save_templates(art: Art, subjects: int, path: Path = TEMPLATES) -> None:
    """Store the icons of the first so many subjects, small, one row a subject and one column a style."""
    sheet = Image.new("RGBA", (len(scenes.STYLES) * _STORED, subjects * _STORED))
    for row, subject in enumerate(scenes.SUBJECTS[:subjects]):
        for column, style in enumerate(scenes.STYLES):
            icon = Image.frombytes("RGBa", (160, 160), art[subject.icon, style].tobytes())
            icon = icon.resize((_STORED, _STORED), Image.Resampling.BOX).convert("RGBA")
            sheet.paste(icon, (column * _STORED, row * _STORED))
    sheet.save(stored := io.BytesIO(), "WEBP", lossless=False, quality=90, exact=True)
    write_whole(path, stored.getvalue())


def judge_of(model: str | os.PathLike) -> "Judge":
    """The judge for a pipeline: with the templates beside it, which `train` writes, or with the package's."""
    beside = Path(resolve(model)) / TEMPLATES.name
    return Judge(path=beside if beside.is_file() else TEMPLATES)


def background(pixels: np.ndarray) -> np.ndarray:
    """The colour (3,) of the flat background of a picture (H, W, 3): the median of its frame above any sign."""
    frame = np.concatenate([pixels[:3].reshape(-1, 3), pixels[:72, :3].reshape(-1, 3), pixels[:72, -3:].reshape(-1, 3)])
    return np.median(frame, axis=0)


def colour_name(rgb: np.ndarray) -> str:
    """The name in `scenes.COLOURS` nearest to a colour (3,) of 0..255."""
    return min(scenes.COLOURS, key=lambda name: float(np.square(rgb - scenes.COLOURS[name]).sum()))


def _pixels(image: Image.Image, mode: str = "RGB") -> np.ndarray:
    """The picture at nano's size as float32 of 0..255; a larger one, from another model, is scaled down."""
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(image.convert(mode), np.float32)


def _mask(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Where the subject is, from (..., H, W, 3): far from the background's colour as a mean of 3 x 3 pixels, so that
    no lone speck counts."""
    found = np.zeros(pixels.shape[:-1], bool)
    for channel, level in enumerate(colour):  # one at a time is four times as fast as numpy's last axis of three
        away = np.ascontiguousarray(pixels[..., channel]) - level
        padded = np.pad(away, [(0, 0)] * (away.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
        rows = padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]
        mean = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]) / 9
        found |= np.abs(mean) > _EDGE
    return found


def _extents(filled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first index that holds more than a speck, and the one after the last, of each row of counts (N, n)."""
    holds = filled > np.maximum(1, 0.05 * filled.max(1, keepdims=True))
    return holds.argmax(1), filled.shape[1] - holds[:, ::-1].argmax(1)


def _normal(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """From pictures (N, H, W, 3) the subject alone, centred and scaled to a square of fixed side; where there is only
    background, -1000 everywhere, which is near to nothing."""
    masks, found = _mask(pixels, colour), np.full((len(pixels), _SIDE, _SIDE, 3), _NOTHING, np.float32)
    boxes = np.stack([*_extents(masks.sum(2)), *_extents(masks.sum(1))], 1)
    for i in np.flatnonzero(masks.mean((1, 2)) >= 0.01):
        top, bottom, left, right = boxes[i]
        height, width = bottom - top, right - left
        side = max(height, width)
        square = np.empty((side, side, 3), np.uint8)
        square[:] = colour.round()
        y, x = (side - height) // 2, (side - width) // 2
        square[y : y + height, x : x + width] = pixels[i, top:bottom, left:right].round()
        found[i] = Image.fromarray(square).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return found


def subject_mask(image: Image.Image) -> np.ndarray:
    """Where the picture is not background: (128, 128) of True and False. On a flat background that is the subject."""
    pixels = _pixels(image)
    return _mask(pixels, background(pixels))


class Judge:
    """Reads pictures, at 128 px. Every method takes a PIL image; what it finds is the nearest of what nano knows."""

    def __init__(self, subjects: int | None = None, path: Path = TEMPLATES):
        """Compare with the first so many subjects of the stored templates; None is all of them."""
        sheet = np.asarray(Image.open(path).convert("RGBA"), np.float32)
        rows = sheet.shape[0] // _STORED
        sheet = sheet.reshape(rows, _STORED, -1, _STORED, 4).swapaxes(1, 2)[:subjects]
        self.subjects = scenes.SUBJECTS[: len(sheet)]
        alpha = sheet[..., 3:] / 255
        self._inks, self._clear = sheet[..., :3] * alpha, 1 - alpha
        self._at = functools.lru_cache(maxsize=64)(self._templates)

    def _templates(self, colour: tuple[int, int, int]) -> np.ndarray:
        """Every template on a background, normalised: (subjects, styles, side, side, 3)."""
        rgb = np.array(colour, np.float32)
        composed = (self._inks + rgb * self._clear).reshape(-1, _STORED, _STORED, 3)
        return _normal(composed, rgb).reshape(*self._inks.shape[:2], _SIDE, _SIDE, 3)  # its own colour: like nothing

    def background(self, image: Image.Image, box: Box = WHOLE) -> str:
        """The name of the background's colour, in all of the picture or in a box of it."""
        left, top, right, bottom = box
        return colour_name(background(_pixels(image)[top:bottom, left:right]))

    def distances(self, image: Image.Image, box: Box = WHOLE) -> np.ndarray:
        """The mean squared distance (subjects, styles) of what stands in the box to every template; inf for nothing."""
        left, top, right, bottom = box
        pixels = _pixels(image)[top:bottom, left:right]
        colour = background(pixels)
        cut = _normal(pixels[None], colour)[0]
        if cut[0, 0, 0] == _NOTHING:
            return np.full(self._inks.shape[:2], np.inf)
        templates = self._at(tuple(min(255, int(v)) for v in (colour / 4).round() * 4))
        return np.square(templates - cut).mean((2, 3, 4))

    def distance(self, image: Image.Image, subject: str, style: str) -> float:
        """The root mean square distance (of 255) to one subject's art in one style; inf where nothing is seen."""
        row = [each.name for each in self.subjects].index(subject)
        return float(np.sqrt(self.distances(image)[row, list(scenes.STYLES).index(style)]))

    def subject(self, image: Image.Image, box: Box = WHOLE) -> tuple[str, str] | None:
        """The subject's name and its style, or None where the box holds only background."""
        distances = self.distances(image, box)
        if not np.isfinite(distances).any():
            return None
        row, column = np.unravel_index(distances.argmin(), distances.shape)
        return self.subjects[row].name, list(scenes.STYLES)[column]

    def text(self, image: Image.Image) -> str:
        """The words on the sign, in small letters; empty where there is none."""
        pixels = _pixels(image, "L")
        lines = [line for row in (5, 6) if (line := _read_row(pixels, row))]
        return " ".join(lines).lower()

    def count(self, image: Image.Image) -> int:
        """How many things stand in the picture, 2 to 4, by which of nano's arrangements fits best."""
        pixels = _pixels(image)
        mask = _mask(pixels, background(pixels))
        if not mask.any():
            return 0
        return max(PLACES, key=lambda n: _fit(mask, n))

    def names(self, image: Image.Image, count: int) -> list[str | None]:
        """The subject at each place of an arrangement of so many."""
        found = [self.subject(image, _around(x, y)) for x, y in PLACES[count]]
        return [f and f[0] for f in found]


def _around(x: int, y: int) -> Box:
    return max(x - 31, 0), max(y - 31, 0), min(x + 31, SIZE), min(y + 31, SIZE)


def _fit(mask: np.ndarray, count: int) -> float:
    """How much of the mask lies in the boxes of an arrangement, less how far from their centres."""
    inside, away = 0.0, 0.0
    for x, y in PLACES[count]:
        left, top, right, bottom = _around(x, y)
        part = mask[top:bottom, left:right]
        if part.mean() < 0.03:
            return -math.inf
        rows, columns = np.nonzero(part)
        away += math.hypot(rows.mean() + top - y, columns.mean() + left - x) / 31 / count
        inside += part.sum()
    return inside / mask.sum() - away


@functools.cache
def _letters() -> tuple[str, np.ndarray]:
    """The letters, and for each its cell with two pixels around it as (n, 20, 20) gray, cut from real signs."""
    cells = []
    for letter in _LETTERS:
        drawn = Image.new("RGBA", (SIZE, SIZE), "white")
        drawn.alpha_composite(sign(letter * 7))  # seven letters start in column 0
        gray = np.asarray(drawn.convert("L"), np.float32)
        y, x = 6 * CELL, 3 * CELL
        cell = gray[y : y + CELL, x : x + CELL].copy()
        cells.append(cell)
    return _LETTERS, np.stack(cells)


def _read_row(gray: np.ndarray, row: int) -> str:
    """The letters of one line of a sign, from gray (128, 128); empty where the row is no line of a sign."""
    letters, templates = _letters()
    centred = (templates - templates.mean((1, 2), keepdims=True)).reshape(len(letters), -1)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    around = np.arange(-2, 3)  # a letter may stand two pixels off its cell
    strip = np.lib.stride_tricks.sliding_window_view(gray, (CELL, CELL))[row * CELL + around]
    line = ""
    for column in range(SIZE // CELL):
        left = column * CELL + around
        cells = strip[:, left[(left >= 0) & (left <= SIZE - CELL)]].reshape(-1, CELL * CELL)
        cells = cells[(np.percentile(cells, 75, axis=1) >= 190) & (cells.min(1) <= 150)]  # ink on a light sign
        if not len(cells):
            line += " "
            continue
        cells = cells - cells.mean(1, keepdims=True)
        match = (cells @ centred.T) / np.linalg.norm(cells, axis=1, keepdims=True)
        line += letters[int(match.max(0).argmax())] if match.max() > 0.6 else " "
    words = line.split()
    return max(words, key=len) if words else ""
