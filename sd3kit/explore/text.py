"""Text to image: the function and its explorer."""

import threading
from typing import Any

from .drawing import Watch, draw, filled
from .drawn import Drawn
from .explorer import IDEAS, Explorer


def text_to_image(
    pipe,
    prompt: str,
    *,
    negative_prompt: str = "",
    seed: int = 0,
    steps: int = 28,
    guidance: float = 7.0,
    shift: float | None = None,
    size: int | None = None,
    watch: Watch | None = None,
    stop: threading.Event | None = None,
) -> Drawn:
    """Draw a picture of a prompt with `StableDiffusion3Pipeline`.

    Args:
        pipe: the pipeline, as `sd3kit.load` gives it, with any scheduler of diffusers for rectified flow. One that adds
            noise of its own at each step (LCM, SA) does not draw the same again.
        prompt, negative_prompt: what it should show, and what to move away from; one text each.
        seed: of the noise it starts from, 0 to 2^63 - 1.
        steps: 1 to 1000.
        guidance: 1 (none) to 20.
        shift: the scheduler's for this picture, 0.1 to 100; None is the pipeline's own.
        size: pixels of each side, a multiple of 16; None is the model's own.
        watch: called with a `Step` after each step.
        stop: an event; once it is set the drawing ends within one step, and `stopped` is true.

    Raises:
        ValueError: a setting that cannot be drawn; one sentence.
        Stopped: `stop` was set before the first step.
    """
    given = dict(
        negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance, shift=shift, size=size, watch=watch,
        stop=stop,
    )  # fmt: skip
    settings = filled(pipe, prompt, given)
    return draw(pipe, settings, lambda own, arguments: own(prompt, **arguments).images[0], given)


class TextToImage(Explorer):
    """Text to image, with ideas for prompts."""

    title = "Text to image"

    def panes(self):
        def take(idea: str) -> Any:
            return self.ui.button(idea, "Draw this", lambda: setattr(self.inputs["prompt"], "value", idea))

        return {"Ideas": self.ui.row(map(take, IDEAS))}

    def draw(self, settings, watch, stop):
        return text_to_image(self.pipe, watch=watch, stop=stop, **settings)
