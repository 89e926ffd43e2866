"""Odd pictures: what is given, and what must come out. A case a row."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from sd3kit import pictures

SIDE = 16
RAMP = np.tile(np.arange(256), (SIDE, 1))  # gray levels across
RED, BLUE = Image.new("RGB", (SIDE, SIDE), "red"), Image.new("RGB", (SIDE, SIDE), "blue")


def file(image, kind="PNG", **more):
    data = io.BytesIO()
    image.save(data, kind, **more)
    return data.getvalue()


def turned(mode="RGB"):
    """A wide picture, red on the left, that EXIF says to turn right by a quarter: then red is on top."""
    image = Image.new("RGB", (2 * SIDE, SIDE), "blue")
    image.paste(RED)
    exif = Image.Exif()
    exif[0x0112] = 6
    return file(image.convert(mode), exif=exif)


def gray(numbers):
    return Image.fromarray(numbers)


def half_clear(mode):
    """Red, the right half of it transparent."""
    image = RED.convert("RGBA")
    image.paste((255, 0, 0, 0), (SIDE // 2, 0, SIDE, SIDE))
    return image.convert(mode)


def palette(transparency):
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.paste(0, (SIDE // 2, 0, SIDE, SIDE))
    return file(image, transparency=transparency)


two = {"save_all": True, "append_images": [BLUE]}
# what is given: levels across that must come out
RAMPS = {
    "8 bits": file(gray(RAMP.astype(np.uint8))),
    "16 bits, PNG": file(gray((RAMP * 257).astype(np.uint16))),
    "16 bits, TIFF": file(gray((RAMP * 257).astype(np.uint16)), "TIFF"),
    "16 bits, big end first": gray((RAMP * 257).astype(">u2")),
    "32 bits that hold 16": gray((RAMP * 257).astype(np.int32)),
    "32 bits that hold 8": gray(RAMP.astype(np.int32)),
    "float 0..1, TIFF": file(gray((RAMP / 255).astype(np.float32)), "TIFF"),
    "float 0..255": gray(RAMP.astype(np.float32)),
    "float 0..65535": gray((RAMP * 257).astype(np.float32)),
}
# what is given: mode, left pixel and right pixel that must come out
COLOURS = {
    "PNG": (file(RED), "RGB", (255, 0, 0), (255, 0, 0)),
    "one bit": (file(Image.new("1", (SIDE, SIDE), 1)), "RGB", (255,) * 3, (255,) * 3),
    "CMYK, JPEG": (file(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "JPEG"), "RGB", (255, 0, 0), (255, 0, 0)),
    "palette": (palette(None), "RGB", (255, 0, 0), (0, 0, 255)),
    "palette, one entry clear": (palette(0), "RGBA", (255, 0, 0, 255), (0, 0, 255, 0)),
    "palette, alpha of each entry": (palette(b"\x80\xff"), "RGBA", (255, 0, 0, 255), (0, 0, 255, 128)),
    "RGBA": (file(half_clear("RGBA")), "RGBA", (255, 0, 0, 255), (255, 0, 0, 0)),
    "RGBA that is opaque": (file(RED.convert("RGBA")), "RGB", (255, 0, 0), (255, 0, 0)),
    "alpha multiplied in": (half_clear("RGBA").convert("RGBa"), "RGBA", (255, 0, 0, 255), (0, 0, 0, 0)),
    "gray with alpha": (file(half_clear("LA")), "RGBA", (76, 76, 76, 255), (76, 76, 76, 0)),
    "tRNS of RGB": (file(RED, transparency=(255, 0, 0)), "RGBA", (255, 0, 0, 0), (255, 0, 0, 0)),
    "tRNS of gray": (
        file(gray(RAMP[:, ::255].astype(np.uint8).repeat(8, 1)), transparency=255),
        "RGBA",
        (0, 0, 0, 255),
        (255, 255, 255, 0),
    ),
    "tRNS of 16 bits": (
        file(gray((RAMP[:, ::255] * 257).astype(np.uint16).repeat(8, 1)), transparency=65535),
        "RGBA",
        (0, 0, 0, 255),
        (255, 255, 255, 0),
    ),
    "animated GIF": (file(RED, "GIF", **two), "RGB", (255, 0, 0), (255, 0, 0)),
    "animated PNG": (file(RED, "PNG", **two), "RGB", (255, 0, 0), (255, 0, 0)),
    "animated WEBP": (file(RED, "WEBP", lossless=True, **two), "RGB", (255, 0, 0), (255, 0, 0)),
    "pages of a TIFF": (file(RED, "TIFF", **two), "RGB", (255, 0, 0), (255, 0, 0)),
}
REFUSED = {
    "no picture": (b"no picture", "cannot be read"),
    "nothing": (b"", "cannot be read"),
    "cut off": (file(gray(RAMP.astype(np.uint8)))[:-60], "cannot be read"),
    "a format that runs programs": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n", "cannot be read"),
    "no file": ("missing.png", "There is no picture file missing.png"),
    "a folder": (".", "There is no picture file"),
    "empty": (Image.new("RGB", (0, 5)), "is empty: it has 0 x 5"),
    "too many pixels": (file(Image.new("1", (8200, 8200))), "at most 67,108,864 pixels"),
    "far too many pixels": (file(Image.new("1", (15000, 15000))), "at most 67,108,864 pixels"),
    "many pixels, of which Pillow warns": (file(Image.new("1", (10000, 10000))), "at most 67,108,864 pixels"),
    "long": (file(Image.new("L", (1, 60000))), "1 x 60000 pixels.*at most 16 times"),
    "long, opened": (Image.new("L", (60000, 1)), "60000 x 1 pixels.*at most 16 times"),
    "not a number": (gray(np.full((4, 4), np.nan, np.float32)), "numbers from nan to nan"),
    "infinite": (gray(np.full((4, 4), np.inf, np.float32)), "numbers from inf to inf"),
    "negative": (gray(np.full((4, 4), -3, np.int32)), "numbers from -3 to -3"),
    "far too large numbers": (gray(np.full((4, 4), 10**6, np.int32)), "numbers from 1e.06"),
}


@pytest.mark.parametrize("given", RAMPS.values(), ids=RAMPS)
def test_levels_keep_their_meaning(given):
    opened = pictures.open_picture(given)
    assert opened.mode == "RGB" and np.array_equal(np.asarray(opened)[..., 1], RAMP)


@pytest.mark.parametrize(("given", "mode", "left", "right"), COLOURS.values(), ids=COLOURS)
def test_colours_and_transparency(given, mode, left, right):
    opened = pictures.open_picture(given)
    assert (opened.mode, opened.getpixel((2, 2)), opened.getpixel((SIDE - 2, 2))) == (mode, left, right)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_picture_is_turned_upright_once(mode):
    opened = pictures.open_picture(turned(mode))
    assert opened.size == (SIDE, 2 * SIDE) and opened.getpixel((2, 2)) != opened.getpixel((2, 2 * SIDE - 2))
    again = pictures.open_picture(opened)
    assert again.size == opened.size and again.tobytes() == opened.tobytes()


@pytest.mark.parametrize(("given", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_one_sentence(given, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(pictures.PictureError, match=words) as error:
            pictures.open_picture(given)
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)


def test_an_error_names_the_file(tmp_path):
    (tmp_path / "fox.png").write_bytes(b"no picture")
    with pytest.raises(pictures.PictureError, match=r"fox\.png cannot be read"):
        pictures.open_picture(tmp_path / "fox.png")
    with pytest.raises(pictures.PictureError, match="The picture 3 of dogs cannot"):
        pictures.open_picture(io.BytesIO(b"no picture"), "3 of dogs")


def test_flat_and_square():
    clear = half_clear("RGBA")
    assert pictures.flatten(clear).getpixel((SIDE - 2, 2)) == (255, 255, 255)
    assert pictures.flatten(clear, "black").getpixel((SIDE - 2, 2)) == (0, 0, 0)
    assert pictures.flatten(clear, "black").getpixel((2, 2)) == (255, 0, 0)
    wide = Image.new("RGB", (3 * SIDE, SIDE), "blue")
    wide.paste(RED, (SIDE, 0))
    middle = pictures.square(wide, 8)
    assert middle.size == (8, 8) and np.asarray(middle)[:, :, 0].min() > 200, "blue is left only at the seam"
