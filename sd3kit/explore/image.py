"""Image to image and inpainting: the functions and their explorer."""

import html
from typing import Any

from PIL import Image, ImageDraw

from ..lesson import show
from ..pictures import flatten, open_picture, square
from .drawing import draw, filled, number
from .drawn import Drawn
from .explorer import IDEAS, Explorer
from .rounds import one_line
from .showing import image_html

OWN = "my own mask"
# Parts of the picture to draw anew, and the arguments of `mask` that make them.
MASKS = {
    "everything": None,
    "left half": ("box", 0.0, 0.0, 0.5, 1.0),
    "right half": ("box", 0.5, 0.0, 1.0, 1.0),
    "upper half": ("box", 0.0, 0.0, 1.0, 0.5),
    "lower half": ("box", 0.0, 0.5, 1.0, 1.0),
    "middle": ("ellipse", 0.2, 0.2, 0.8, 0.8),
    OWN: None,
}


def image_to_image(pipe, image: Image.Image, prompt: str, *, strength: float = 0.6, **settings: Any) -> Drawn:
    """Change a picture with `StableDiffusion3Img2ImgPipeline`, which is built from the pipeline's parts.

    Args:
        image: where it starts, anything that `sd3kit.pictures.open_picture` opens, on white where it is transparent;
            its middle square is scaled to `size`.
        strength: how far towards noise it goes first, 0 to 1; of `steps` only that share is run.
        **settings: as in `text_to_image`.

    Returns:
        A `Drawn` with `data["image"]`, the picture as it was given to the pipeline. The settings do not hold it.

    Raises:
        ValueError, Stopped: as in `text_to_image`; PictureError, a ValueError, for a picture that cannot be used.
    """
    # loaded with the pipeline by now; at the top it would be slow, and libraries would print notes
    from diffusers import StableDiffusion3Img2ImgPipeline as Kind

    full = filled(pipe, prompt, settings, strength=strength)
    start = square(flatten(open_picture(image)), full["size"])
    return _draw_over(Kind, pipe, {"image": start}, full, settings)


def inpaint(
    pipe, image: Image.Image, mask: Image.Image, prompt: str, *, strength: float = 1.0, **settings: Any
) -> Drawn:
    """Draw a part of a picture anew with `StableDiffusion3InpaintPipeline`.

    diffusers 0.42 decodes its latents without the autoencoder's shift factor (issue 13611 there): on the real SD3
    models colours move a little; nano's factor is 0.

    Args:
        mask: white where it is drawn anew, such as `mask("ellipse")`; black and transparent is kept. It has the
            picture's proportions.
        (the others as in `image_to_image`)

    Returns:
        A `Drawn` with `data["image"]` and `data["mask"]` as they were given to the pipeline.

    Raises:
        ValueError, Stopped: as in `image_to_image`; also for a mask without white or of another shape.
    """
    from diffusers import StableDiffusion3InpaintPipeline as Kind

    full = filled(pipe, prompt, settings, strength=strength)
    picture, where = open_picture(image), open_picture(mask)
    (width, height), (across, down) = picture.size, where.size
    if abs(width * down - height * across) > max(width, height, across, down):  # more than a pixel's rounding
        raise ValueError(
            f"The picture has {width} x {height} pixels and the mask {across} x {down}: give both the same proportions."
        )
    start = square(flatten(picture), full["size"])
    new = square(flatten(where, "black").convert("L"), full["size"], Image.Resampling.NEAREST)
    if new.getextrema()[1] < 128:
        raise ValueError("The mask is empty: white is what is drawn anew, black and transparent is kept.")
    return _draw_over(Kind, pipe, {"image": start, "mask_image": new}, full, settings)


def _draw_over(kind: type, pipe, given: dict[str, Image.Image], full: dict, hooks) -> Drawn:
    """Draw with a pipeline of another kind, built from the parts, that takes the given pictures too."""
    if not hasattr(pipe.scheduler, "scale_noise"):
        name = type(pipe.scheduler).__name__
        raise ValueError(f"{name} cannot start from a picture: use FlowMatchEulerDiscreteScheduler.")

    def call(own, arguments: dict) -> Image.Image:
        change = kind(**own.components)
        change.set_progress_bar_config(disable=True)
        return change(full["prompt"], **given, strength=full["strength"], **arguments).images[0]

    drawn = draw(pipe, full, call, hooks)
    drawn.data |= {name.removesuffix("_image"): image for name, image in given.items()}
    return drawn


def mask(
    shape: str = "box", left: float = 0.5, top: float = 0.0, right: float = 1.0, bottom: float = 1.0, size: int = 128
) -> Image.Image:
    """A square mask for `inpaint`, white where it is drawn anew.

    Args:
        shape: "box" or "ellipse".
        left, top, right, bottom: its edges, as shares of the picture, 0 to 1.
        size: pixels of each side, 1 to 4096.

    Raises:
        ValueError: another shape or size, or edges that leave nothing.
    """
    if shape not in ("box", "ellipse"):
        raise ValueError(f'A mask is a "box" or an "ellipse", not {shape!r}.')
    size = number("size", size, 1, 4096, int)
    left, top, right, bottom = (round(number("an edge", edge, 0, 1) * size) for edge in (left, top, right, bottom))
    if not (left < right and top < bottom):
        raise ValueError("The mask is empty: move its edges apart.")
    image = Image.new("L", (size, size))
    draw_shape = getattr(ImageDraw.Draw(image), "rectangle" if shape == "box" else "ellipse")
    draw_shape([left, top, right - 1, bottom - 1], fill=255)
    return image


class ImageToImage(Explorer):
    """Image to image with a strength; with a mask, a half, the middle or one's own, inpainting."""

    title = "Image to image and inpainting"

    def __init__(self, pipe, image: Image.Image | None = None, prompt: str = IDEAS[0], *, live: bool | None = None):
        """
        Args:
            image: the picture to change; one can be uploaded too.
        """
        self.image = None if image is None else open_picture(image)
        self.mask_image: Image.Image | None = None
        super().__init__(pipe, prompt, live=live)

    def own(self):
        ui = self.ui
        self.inputs["strength"] = ui.control("FloatSlider", "Strength", value=0.8, min=0.05, max=1.0, step=0.05)
        self.inputs["mask"] = ui.control("Dropdown", "Draw anew", options=list(MASKS))
        files = [
            ui.upload("Picture", "image/*", lambda data: self._take(data, "image")),
            ui.upload("Mask (white is new)", "image/*", lambda data: self._take(data, "mask_image")),
        ]
        self._before = ui.HTML()
        return [ui.row(files), self._before, self.inputs["strength"], self.inputs["mask"]]

    def draw(self, settings, watch, stop):
        image, where = self._given(settings.pop("mask"), settings["size"])
        if where is None:
            return image_to_image(self.pipe, image, watch=watch, stop=stop, **settings)
        return inpaint(self.pipe, image, where, watch=watch, stop=stop, **settings)

    def _given(self, name: str, side: int) -> tuple[Image.Image, Image.Image | None]:
        """The picture and the mask of this name; a made mask is square, so the picture is cut to its middle first."""
        if self.image is None:
            raise ValueError("There is no picture to change yet: upload one.")
        if name == OWN:
            if self.mask_image is None:
                raise ValueError("There is no mask yet: upload one, or choose a part of the picture.")
            return self.image, self.mask_image
        return square(flatten(self.image), side), MASKS[name] and mask(*MASKS[name], size=side)

    def _take(self, data: bytes, name: str) -> None:
        """A picture or mask from an upload; the prompt is still another's, so nothing is drawn yet."""
        try:
            taken = open_picture(data)
        except ValueError as error:
            self.say(one_line(error), error=True)
            return
        setattr(self, name, taken)
        self._asked = None  # the same settings are another drawing now
        if name == "mask_image":
            self.restore({"mask": OWN})
        self.refresh()
        cut = "" if taken.width == taken.height else f", of which the middle square is used ({min(taken.size)} pixels)"
        self.say(f"Taken: {taken.width} x {taken.height} pixels{cut}. Say what to draw, and press Draw.")

    def back(self, drawn, controls):
        self.image = drawn.data["image"]
        self.mask_image = drawn.data.get("mask", self.mask_image)
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
