"""Text to image: the function, by which all others draw, and its explorer."""

import copy
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image

from ..loading.pipeline import prompt_length
from .drawing import Step, checked, scheduler_of, turn
from .drawn import Drawn
from .explorer import Explorer


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
    watch: Callable[[Step], Any] | None = None,
    stop: threading.Event | None = None,
    call: Callable[[Any, dict[str, Any]], Image.Image] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Drawn:
    """Draw a picture of a prompt with `StableDiffusion3Pipeline`; one drawing runs at a time.

    Args:
        pipe: the pipeline, as `sd3kit.load` gives it, with any scheduler of diffusers for rectified flow. One that adds
            noise of its own at each step (LCM, SA) does not draw the same again. It is left as it was.
        prompt, negative_prompt: what it should show, and what to move away from; one text each.
        seed: of the noise it starts from, 0 to 2^63 - 1.
        steps: 1 to 1000. guidance: 1 (none) to 20. None is what the model is made for: 28 and 4 for nano, 4 and 1 for
            nano-turbo.
        shift: the scheduler's for this picture, 0.1 to 100; None is the pipeline's own.
        size: pixels of each side, a multiple of 16; None is the model's own.
        watch: called with a `Step` after each step.
        stop: an event; once it is set the drawing ends within one step, and `stopped` is true.
        call: for a drawing of another kind: called with a pipeline of the same parts and the arguments that all of
            them take, it gives the picture.
        more: settings of that kind, which are stored with the others.

    Raises:
        ValueError: a setting that cannot be drawn; one sentence.
        Stopped: `stop` was set before the first step.
    """
    given = dict(prompt=prompt, negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance)
    settings = checked(pipe, given | dict(shift=shift, size=size) | dict(more or {}))
    stop, done, total, before = stop or threading.Event(), 0, 0, None

    def told(own, index: int, timestep, values: dict) -> dict:
        nonlocal done, total, before
        done, total = index + 1, own.num_timesteps
        if watch is not None:
            latents, sigma = values["latents"], float(own.scheduler.sigmas[own.scheduler.step_index])
            old, level = before or (latents, sigma)
            # schedulers of second order stay at a level for two steps
            end = latents if sigma == level else latents - sigma * (latents - old) / (sigma - level)
            before = latents, sigma
            watch(Step(done, total, sigma, end))
        if stop.is_set():
            own._interrupt = True  # diffusers' own: the loop skips the other steps, then decodes and frees
        return values

    with turn(stop):
        own = copy.copy(pipe)  # a cell that calls `pipe` meanwhile would else take steps of the same scheduler
        own.scheduler = scheduler_of(pipe, settings.get("shift"), settings["steps"])
        own.set_progress_bar_config(disable=True)  # a thread's bar would land in any cell
        arguments = {
            "negative_prompt": settings["negative_prompt"],
            "num_inference_steps": settings["steps"],
            "guidance_scale": settings["guidance"],
            "width": settings["size"],
            "height": settings["size"],
            "generator": torch.Generator().manual_seed(settings["seed"]),
            "max_sequence_length": prompt_length(pipe, settings["prompt"], settings["negative_prompt"]),
            "callback_on_step_end": told,
        }
        start = time.perf_counter()
        try:
            image = call(own, arguments) if call else own(prompt, **arguments).images[0]
        finally:
            # the pipeline does this itself at the end of a call, but not after an error
            pipe.maybe_free_model_hooks()
        return Drawn(image, settings, time.perf_counter() - start, done, total)


class TextToImage(Explorer):
    """Text to image; the prompt's encoding is kept while only sliders move."""

    title = "Text to image"
    _kept: tuple = None, None  # what was encoded, and what came out

    def draw(self, **settings):
        def call(own, arguments: dict):
            if not own.get_list_adapters():  # a LoRA changes what an encoder says without a change of its weights
                own.encode_prompt = self._encode
            return own(settings["prompt"], **arguments).images[0]

        return text_to_image(self.pipe, call=call, **settings)

    def _encode(self, **asked):
        """As `pipe.encode_prompt`; weights count their changes, so encoders that were trained encode anew."""
        parts = [part for name, part in self.pipe.components.items() if name.startswith("text_encoder") and part]
        state = [(id(weight), weight._version, weight.device) for part in parts for weight in part.parameters()]
        if self._kept[0] != (asked, state):
            self._kept = (asked, state), self.pipe.encode_prompt(**asked)
        return self._kept[1]
