"""Reading pictures, in one way for everything that takes one: image to image, masks, the page and training.

A picture has 8 bits a channel afterwards, is upright, is the first frame of an animation, and keeps its transparency.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import UserError

# Formats that are read, and how their files' names end. Pillow reads more, some of them by running other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MOST_PIXELS = 2**26  # 64 megapixels are 268 MB with transparency
TOO_MANY = f"is too large: scale it to at most {MOST_PIXELS:,} pixels."
LONGEST = 16  # times as long as it is wide: scaled by its shorter edge, a longer one would be huge


class PictureError(UserError, ValueError):
    """A picture that cannot be read or used; the message is one sentence."""


def open_picture(source: str | os.PathLike | bytes | io.BufferedIOBase | Image.Image, name: str = "") -> Image.Image:
    """A picture as RGB, or as RGBA where some of it is transparent, upright as its EXIF data say.

    Numbers of more than 8 bits are scaled: 16 bits by 255/65535; whole numbers of 32 bits likewise, or taken as they
    are where none is above 255; floating-point numbers from 0..1, else from 0..255, else from 0..65535.

    Args:
        source: a path, a file's bytes, an open binary file, or a PIL image of any mode, which is left as it is.
        name: what errors call it; the path where it is empty.

    Raises:
        PictureError: no such file, none of `FORMATS`, damaged, empty, more than `MOST_PIXELS`, a longer edge more than
            `LONGEST` times the shorter one, or numbers that are no colours (NaN, negative, above 65535).
    """
    name = name or (str(source) if isinstance(source, str | os.PathLike) else "")
    called = f"The picture {name}".rstrip()
    try:
        if isinstance(source, Image.Image):
            return _converted(source, called)
        if isinstance(source, bytes):
            source = io.BytesIO(source)
        elif isinstance(source, str | os.PathLike) and not Path(source).is_file():
            raise PictureError(f"There is no picture file {source}: check the path.")
        with Image.open(source, formats=FORMATS) as image:
            return _converted(image, called)
    except PictureError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own limit is higher
        raise PictureError(f"{called} {TOO_MANY}") from error
    except PermissionError as error:
        raise PictureError(f"{called} cannot be read: you have no permission to read that file.") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for damaged files
        formats = ", ".join(FORMATS)
        raise PictureError(f"{called} cannot be read (damaged, or not {formats}): use a PNG or JPEG.") from error


def flatten(image: Image.Image, background: str = "white") -> Image.Image:
    """An RGB or RGBA picture as RGB, on a colour where it is transparent."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    below = Image.new("RGB", image.size, background)
    below.paste(image, mask=image.getchannel("A"))
    return below


def square(image: Image.Image, side: int, method: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The middle square of a picture, scaled to `side` pixels, in the picture's own mode."""
    return ImageOps.fit(image, (side, side), method)


def _converted(image: Image.Image, called: str) -> Image.Image:
    """What `open_picture` gives; the limits are checked before anything is decoded."""
    short, long = sorted(image.size)
    if not short:
        raise PictureError(f"{called} is empty: it has {image.width} x {image.height} pixels.")
    if short * long > MOST_PIXELS:
        raise PictureError(f"{called} {TOO_MANY}")
    if long > LONGEST * short:
        raise PictureError(
            f"{called} is {image.width} x {image.height} pixels: cut it so that its longer edge is at most {LONGEST} "
            "times the shorter one."
        )
    image = ImageOps.exif_transpose(image)
    key = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        numbers = np.asarray(image)
        clear = numbers == key if isinstance(key, int) else None  # the gray that a PNG declares to be transparent
        image = Image.fromarray(_to_8_bits(numbers, called))
        if clear is not None:
            image.putalpha(Image.fromarray(np.where(clear, np.uint8(0), np.uint8(255))))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return image.convert("RGB") if image.getchannel("A").getextrema()[0] == 255 else image


def _to_8_bits(numbers: np.ndarray, called: str) -> np.ndarray:
    if numbers.dtype.kind == "u":  # 16 bits
        return ((np.arange(2**16) * 255 + 2**15) // (2**16 - 1)).astype(np.uint8)[numbers]
    low, high = float(numbers.min()), float(numbers.max())  # NaN where one of them is
    if not 0 <= low <= high < 2**16:
        raise PictureError(f"{called} holds numbers from {low:g} to {high:g}: scale them to 0..255, with 8 bits.")
    of = 1 if numbers.dtype.kind == "f" and high <= 1 else 255 if high <= 255 else 2**16 - 1
    return np.rint(numbers * np.float32(255 / of)).astype(np.uint8)
