"""Where words look: the function and its explorer; `sd3kit.lesson.attention` records the maps."""

import html
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch.nn.functional import interpolate

from ..lesson import attention as recorder
from ..lesson import show
from .drawing import draw, filled
from .drawn import Drawn
from .explorer import Explorer
from .showing import image_html, side_by_side

ALL = -1  # of the layers or steps: a slider takes no None


def attention(pipe, prompt: str, *, look_at: Sequence[str] | None = None, **settings: Any) -> Drawn:
    """Draw a prompt and record where its words are looked at (`sd3kit.lesson.attention.maps`).

    Args:
        look_at: words of the prompt; None is each of them.
        **settings: as in `text_to_image`. SD3 Medium at 1024 pixels takes some 4 GB more than there, for
            one layer's attention in the open.

    Returns:
        A `Drawn` whose data has `words`, and `raw` and `concept`, both (words, steps, layers, rows, columns).

    Raises:
        ValueError: also for a word that is not in the prompt. Stopped: as in `text_to_image`.
    """
    full, found = filled(pipe, prompt, settings), {}
    chosen = words_of(prompt) if look_at is None else [look_at] if isinstance(look_at, str) else list(look_at)

    def call(own, arguments: dict) -> Image.Image:
        arguments.pop("generator")
        callback, steps = arguments.pop("callback_on_step_end"), arguments.pop("num_inference_steps")
        found.update(recorder.maps(own, prompt, chosen, seed=full["seed"], steps=steps, callback=callback, **arguments))
        return found.pop("image")

    drawn = draw(pipe, full, call, settings)
    drawn.data |= {"words": chosen} | found
    return drawn


def words_of(prompt: str) -> list[str]:
    """The different words of a prompt, in order, without their punctuation."""
    stripped = (word.strip(".,;:!?\"'()") for word in prompt.split())
    return list(dict.fromkeys(word for word in stripped if word))


def heat(
    drawn: Drawn, word: str, *, layer: int | None = None, step: int | None = None, method: str = "raw"
) -> show.Picture:
    """Where a word is looked at, as a warm veil over the picture that `attention` drew.

    Args:
        word: one of `drawn.data["words"]`.
        layer, step: from 0; None is the mean of all.
        method: "raw", the attention weights, or "concept", ConceptAttention.

    Raises:
        ValueError: another word, layer, step or method.
    """
    for name, value, known in (("word", word, drawn.data["words"]), ("method", method, ("raw", "concept"))):
        if value not in known:
            raise ValueError(f"There are no maps of the {name} {value!r}: choose one of {', '.join(known)}.")
    maps = drawn.data[method][drawn.data["words"].index(word)]
    for name, index, length in (("step", step, maps.shape[0]), ("layer", layer, maps.shape[1])):
        if index is not None and index not in range(length):
            raise ValueError(f"There is no {name} {index}: it goes from 0 to {length - 1}.")
    maps = maps.mean(0) if step is None else maps[step]
    shown = maps.mean(0) if layer is None else maps[layer]
    low, high = shown.min(), shown.max()
    level = ((shown - low) / (high - low).clamp(min=1e-9))[None, None]
    large = interpolate(level, drawn.image.size[::-1], mode="bilinear", align_corners=False)[0, 0]
    gray = drawn.image.convert("L").convert("RGB")
    veil = Image.fromarray((large * 200).byte().numpy())  # the maps are on the CPU
    gray.paste(Image.new("RGB", gray.size, show.VERMILION), mask=veil)
    rows, columns = shown.shape
    row, column = divmod(int(shown.argmax()), columns)
    which = "all layers" if layer is None else f"layer {layer + 1}"
    where = f"most at row {row + 1} of {rows}, column {column + 1} of {columns}"
    return show.Picture(gray, f"Where {word!r} is looked at in {which}, {where}: {drawn.alt}")


class Attention(Explorer):
    """Where words look: draw once, then pick a word, a layer, a step and a method."""

    title = "Where words look"

    def own(self):
        ui = self.ui
        layers = [("all", ALL), *((str(n + 1), n) for n in range(len(self.pipe.transformer.transformer_blocks)))]
        methods = [("attention weights", "raw"), ("ConceptAttention", "concept")]
        self.views = {
            "word": ui.control("Dropdown", "Word", options=[]),
            "layer": ui.control("SelectionSlider", "Layer", options=layers),
            "step": ui.control("SelectionSlider", "Step", options=[("all", ALL)]),
            "method": ui.control("Dropdown", "Method", options=methods),
        }
        for view in self.views.values():
            view.observe(lambda _: self.refresh(), "value")
        return list(self.views.values())

    def draw(self, settings, watch, stop):
        return attention(self.pipe, watch=watch, stop=stop, **settings)

    def show(self, made):
        words, steps = made[0].data["words"], min(drawn.data["raw"].shape[1] for drawn in made)
        word = self.views["word"].value
        self.shown = []  # the controls are being set to other pictures
        self.views["word"].options = words
        # a new prompt: its first word of some weight
        self.views["word"].value = word if word in words else next((one for one in words if len(one) > 2), words[0])
        self.views["step"].options = [("all", ALL), *((str(n + 1), n) for n in range(steps))]
        super().show(made)

    def below(self):
        values = {name: None if view.value == ALL else view.value for name, view in self.views.items()}
        maps = [heat(drawn, **values) for drawn in self.shown if values["word"] in drawn.data["words"]]
        return side_by_side(f"{image_html(one.image, one.alt)}{html.escape(one.alt.split(':')[0])}" for one in maps)
