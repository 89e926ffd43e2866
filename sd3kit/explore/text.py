"""Text to image: the function and its explorer."""

import threading
from typing import Any

import torch

from .drawing import Watch, draw, filled
from .drawn import Drawn
from .explorer import IDEAS, Explorer


def text_to_image(
    pipe,
    prompt: str,
    *,
    negative_prompt: str = "",
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    size: int | None = None,
    watch: Watch | None = None,
    stop: threading.Event | None = None,
    kept: dict | None = None,
) -> Drawn:
    """Draw a picture of a prompt with `StableDiffusion3Pipeline`.

    Args:
        pipe: the pipeline, as `sd3kit.load` gives it, with any scheduler of diffusers for rectified flow. One that adds
            noise of its own at each step (LCM, SA) does not draw the same again.
        prompt, negative_prompt: what it should show, and what to move away from; one text each.
        seed: of the noise it starts from, 0 to 2^63 - 1.
        steps: 1 to 1000. guidance: 1 (none) to 20. None is what the model is made for: 28 and 7, or 4 and 1 for
            nano-turbo.
        shift: the scheduler's for this picture, 0.1 to 100; None is the pipeline's own.
        size: pixels of each side, a multiple of 16; None is the model's own.
        watch: called with a `Step` after each step.
        stop: an event; once it is set the drawing ends within one step, and `stopped` is true.
        kept: a dictionary of the caller's, in which the prompt's encoding stays for the next drawing that can use it.

    Raises:
        ValueError: a setting that cannot be drawn; one sentence.
        Stopped: `stop` was set before the first step.
    """
    given = dict(
        negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance, shift=shift, size=size, watch=watch,
        stop=stop, kept=kept,
    )  # fmt: skip
    settings = filled(pipe, prompt, given)

    @torch.no_grad()
    def call(own, arguments: dict):
        if kept is None:
            return own(prompt, **arguments).images[0]
        named = {name: arguments.pop(name) for name in ("negative_prompt", "max_sequence_length")}
        named["do_classifier_free_guidance"] = arguments["guidance_scale"] > 1
        return own(**encoded(own, prompt, named, kept), **arguments).images[0]

    return draw(pipe, settings, call, given)


def encoded(pipe, prompt: str, named: dict[str, Any], kept: dict) -> dict[str, Any]:
    """The prompt's embeddings as arguments of the pipeline, taken from `kept` where nothing has changed since.

    Weights count their changes in place, so what is loaded, fused or trained in the encoders encodes anew.
    """
    encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part]
    state = [(id(weight), weight._version, weight.device) for part in encoders for weight in part.parameters()]
    if kept.get("for") != (key := (prompt, tuple(named.items()), state)):
        found = pipe.encode_prompt(prompt, None, None, **named)
        names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
        kept |= {"for": key, "arguments": dict(zip(names, found, strict=True))}
    return kept["arguments"]


class TextToImage(Explorer):
    """Text to image, with ideas for prompts."""

    title = "Text to image"

    def panes(self):
        def take(idea: str) -> Any:
            return self.ui.button(idea, "Draw this", lambda: setattr(self.inputs["prompt"], "value", idea))

        return {"Ideas": self.ui.row(map(take, IDEAS))}

    def own(self):
        self._kept = {}  # the prompt's encoding, while only sliders move
        return []

    def draw(self, settings, watch, stop):
        return text_to_image(self.pipe, watch=watch, stop=stop, kept=self._kept, **settings)
