"""Image to image and inpainting: the functions and their explorer."""

import html
from typing import Any

from PIL import Image, ImageDraw

from ..lesson import show
from ..pictures import flatten, open_picture, square
from .controls import control, row, upload, widgets
from .drawn import Drawn, image_html
from .explorer import IDEAS, Explorer
from .text import text_to_image

OWN = "my own mask"
# Parts of the picture to draw anew: a shape that Pillow draws, and its edges as shares of the side.
PARTS = {
    "left half": ("rectangle", 0, 0, 0.5, 1),
    "right half": ("rectangle", 0.5, 0, 1, 1),
    "upper half": ("rectangle", 0, 0, 1, 0.5),
    "lower half": ("rectangle", 0, 0.5, 1, 1),
    "middle": ("ellipse", 0.2, 0.2, 0.8, 0.8),
}


def image_to_image(
    pipe, image: Image.Image, prompt: str, *, mask: Image.Image | None = None, strength: float = 0.6, **settings: Any
) -> Drawn:
    """Change a picture with `StableDiffusion3Img2ImgPipeline`, or a part of it with `StableDiffusion3InpaintPipeline`.

    diffusers 0.42 decodes what it inpaints without the autoencoder's shift factor (issue 13611 there): on the real SD3
    models colours move a little; nano's factor is 0.

    Args:
        image: where it starts, anything that `sd3kit.pictures.open_picture` opens, on white where it is transparent;
            its middle square is scaled to `size`.
        mask: white where it is drawn anew, black and transparent where it is kept, in the picture's proportions; None
            is everywhere.
        strength: how far towards noise it goes first, 0 to 1; of `steps` only that share is run.
        **settings, and what is raised: as in `text_to_image`; also ValueError for a picture that cannot be used, and a
            mask without white or of another shape.

    Returns:
        A `Drawn` with `data["image"]`, and with a mask `data["mask"]`, as they were given to the pipeline. The settings
        do not hold them.
    """
    # loaded with the pipeline by now; at the top it would be slow, and libraries would print notes
    from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline

    if not hasattr(pipe.scheduler, "scale_noise"):
        raise ValueError(
            f"{type(pipe.scheduler).__name__} cannot start from a picture: use FlowMatchEulerDiscreteScheduler."
        )
    picture, kind, data = flatten(open_picture(image)), StableDiffusion3Img2ImgPipeline, {}
    if mask is not None:
        mask, kind = flatten(open_picture(mask), "black").convert("L"), StableDiffusion3InpaintPipeline
        (width, height), (across, down) = picture.size, mask.size
        if abs(width * down - height * across) > max(width, height, across, down):  # more than a pixel's rounding
            sizes = f"{width} x {height} pixels and the mask {across} x {down}"
            raise ValueError(f"The picture has {sizes}: give both the same proportions.")

    def call(own, arguments: dict) -> Image.Image:
        side = arguments["width"]
        given = {"image": square(picture, side)}
        if mask is not None:
            given["mask_image"] = data["mask"] = square(mask, side, Image.Resampling.NEAREST)
            if data["mask"].getextrema()[1] < 128:
                raise ValueError("The mask is empty: white is what is drawn anew, black and transparent is kept.")
        data["image"] = given["image"]
        change = kind(**own.components)
        change.set_progress_bar_config(disable=True)
        return change(prompt, **given, strength=strength, **arguments).images[0]

    drawn = text_to_image(pipe, prompt, call=call, more={"strength": strength}, **settings)
    drawn.data |= data
    return drawn


class ImageToImage(Explorer):
    """Image to image with a strength; with a mask, a half, the middle or one's own, inpainting."""

    title = "Image to image and inpainting"

    def __init__(self, pipe, image: Image.Image | None = None, prompt: str = IDEAS[0], *, live: bool | None = None):
        """`image` is the picture to change; one can be uploaded too."""
        self.image, self.mask = image and open_picture(image), None
        super().__init__(pipe, prompt, live=live)

    def own(self):
        self.inputs["strength"] = control("FloatSlider", "Strength", value=0.8, min=0.05, max=1.0, step=0.05)
        self.inputs["mask"] = control("Dropdown", "Draw anew", options=["everything", *PARTS, OWN])
        self._before = widgets.HTML()
        picture = upload("Picture", lambda data: self._take(data, "image"))
        mask = upload("Mask (white is new)", lambda data: self._take(data, "mask"))
        return [row([picture, mask]), self._before]

    def draw(self, mask: str, **settings):
        image, where = self._given(mask, settings["size"])
        return image_to_image(self.pipe, image, mask=where, **settings)

    def _given(self, name: str, side: int) -> tuple[Image.Image, Image.Image | None]:
        """The picture and the mask of this name; a part's is square, so the picture is cut to its middle first."""
        if self.image is None:
            raise ValueError("There is no picture to change yet: upload one.")
        if name == OWN and self.mask is None:
            raise ValueError("There is no mask yet: upload one, or choose a part of the picture.")
        if name not in PARTS:
            return self.image, self.mask if name == OWN else None
        shape, *edges = PARTS[name]
        left, top, right, bottom = (round(edge * side) for edge in edges)
        where = Image.new("L", (side, side))
        getattr(ImageDraw.Draw(where), shape)([left, top, right - 1, bottom - 1], fill=255)
        return square(flatten(self.image), side), where

    def _take(self, data: bytes, name: str) -> None:
        """A picture or mask from an upload; the prompt is still another's, so nothing is drawn yet."""
        try:
            taken = open_picture(data)
        except ValueError as error:
            self.say(str(error), error=True)
            return
        setattr(self, name, taken)
        self.restore({"mask": OWN} if name == "mask" else {})
        self.say(f"Taken: {taken.width} x {taken.height} pixels; the middle square is used. Now press Draw.")

    def back(self, drawn, controls):
        self.image, self.mask = drawn.data["image"], drawn.data.get("mask", self.mask)
        super().back(drawn, controls)

    def refresh(self):
        """The picture to change, with a veil where it will be drawn anew."""
        super().refresh()
        name, side = self.inputs["mask"].value, self.inputs["size"].value
        try:
            image, where = self._given(name, side)
        except ValueError as error:
            self._before.value = f"<p>{html.escape(str(error))}</p>"
            return
        shown, words = square(flatten(image), side), "The picture to change"
        if where is not None:
            veil = square(flatten(where, "black").convert("L"), side).point(lambda level: level * 0.55)
            shown.paste(Image.new("RGB", shown.size, show.VERMILION), mask=veil)
            words += f", veiled where it is drawn anew ({name})"
        self._before.value = image_html(shown, words, 160)
