"""Where words look: the function and its explorer; `sd3kit.lesson.attention` records the maps."""

import html
from typing import Any

from PIL import Image
from torch.nn.functional import interpolate

from ..lesson import attention as recorder
from ..lesson import show
from .controls import control
from .drawn import Drawn, image_html, side_by_side
from .explorer import Explorer
from .text import text_to_image


def attention(pipe, prompt: str, **settings: Any) -> Drawn:
    """Draw a prompt and record where each of its words is looked at (`sd3kit.lesson.attention.maps`).

    Args:
        **settings, and what is raised: as in `text_to_image`. SD3 Medium at 1024 pixels takes some 4 GB more than
            there, for one layer's attention in the open.

    Returns:
        A `Drawn` whose data has `words`, and `raw` and `concept`, both (words, steps, layers, rows, columns).
    """
    found = {}

    def call(own, arguments: dict) -> Image.Image:
        stripped = (word.strip(".,;:!?\"'()") for word in prompt.split())
        words = list(dict.fromkeys(word for word in stripped if word))
        seed, steps = arguments.pop("generator").initial_seed(), arguments.pop("num_inference_steps")
        callback = arguments.pop("callback_on_step_end")
        maps = recorder.maps(own, prompt, words, seed=seed, steps=steps, callback=callback, **arguments)
        found.update(maps, words=words)
        return found.pop("image")

    drawn = text_to_image(pipe, prompt, call=call, **settings)
    drawn.data |= found
    return drawn


def heat(drawn: Drawn, word: str, *, layer: int = 0, step: int = 0, method: str = "raw") -> show.Picture:
    """Where a word is looked at, as a warm veil over the picture that `attention` drew.

    Args:
        word: one of `drawn.data["words"]`.
        layer, step: from 1; 0 is the mean of all.
        method: "raw", the attention weights, or "concept", ConceptAttention.
    """
    maps = drawn.data[method][drawn.data["words"].index(word)]
    maps = maps[step - 1] if step else maps.mean(0)
    shown = maps[layer - 1] if layer else maps.mean(0)
    low, high = shown.min(), shown.max()
    level = ((shown - low) / (high - low).clamp(min=1e-9))[None, None]
    large = interpolate(level, drawn.image.size[::-1], mode="bilinear", align_corners=False)[0, 0]
    gray = drawn.image.convert("L").convert("RGB")
    veil = Image.fromarray((large * 200).byte().numpy())  # the maps are on the CPU
    gray.paste(Image.new("RGB", gray.size, show.VERMILION), mask=veil)
    rows, columns = shown.shape
    row, column = divmod(int(shown.argmax()), columns)
    which = f"layer {layer}" if layer else "all layers"
    where = f"most at row {row + 1} of {rows}, column {column + 1} of {columns}"
    return show.Picture(gray, f"Where {word!r} is looked at in {which}, {where}: {drawn.alt}")


class Attention(Explorer):
    """Where words look: draw once, then pick a word, a layer, a step and a method."""

    title = "Where words look"

    def own(self):
        methods = [("attention weights", "raw"), ("ConceptAttention", "concept")]
        self.views = {
            "word": control("Dropdown", "Word", options=[]),
            "layer": control("IntSlider", "Layer (0 is all)", max=len(self.pipe.transformer.transformer_blocks)),
            "step": control("IntSlider", "Step (0 is all)"),
            "method": control("Dropdown", "Method", options=methods),
        }
        for view in self.views.values():
            view.observe(lambda _: self.refresh(), "value")
        return list(self.views.values())

    def draw(self, **settings):
        return attention(self.pipe, **settings)

    def show(self, made):
        words, steps = made[-1].data["words"], min(drawn.data["raw"].shape[1] for drawn in made)
        word = self.views["word"].value
        self.shown = []  # the controls are being set to other pictures
        self.views["word"].options = words
        self.views["word"].value = word if word in words else next((one for one in words if len(one) > 2), words[0])
        self.views["step"].max = steps
        super().show(made)

    def below(self):
        values = {name: view.value for name, view in self.views.items()}
        maps = [heat(drawn, **values) for drawn in self.shown if values["word"] in drawn.data["words"]]
        return side_by_side(f"{image_html(one.image, one.alt)}{html.escape(one.alt.split(':')[0])}" for one in maps)
