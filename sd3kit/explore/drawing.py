"""One drawing: settings checked, the pipeline lent, each step told, and everything left as it was.

A drawing has a scheduler and a progress bar of its own, and offloading hooks are freed whatever happens. `watch` is
told of each step; `stop`, an event, ends a drawing within one.
"""

import contextlib
import copy
import dataclasses
import inspect
import numbers
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate, pad

from ..lesson import show
from ..loading.names import USUAL
from ..loading.pipeline import prompt_length
from .drawn import Drawn

LIMITS = {
    "seed": (0, 2**63 - 1, int), "steps": (1, 1000, int), "guidance": (1, 20, float), "shift": (0.1, 100, float),
    "strength": (0, 1, float),
}  # fmt: skip
HOOKS = ("watch", "stop", "kept")
LONGEST = 10_000  # letters of a prompt; the encoders read some 1,500
LATENTS = 16  # latent places to a side, of the pictures that the preview's map is fitted on


class Stopped(Exception):
    """A drawing was stopped before its first step, so there is no picture."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What `watch` is told after a step.

    `number` of `total`, from 1; `sigma` is the noise level reached, 1..0; `latents` (1, 16, H/8, W/8) is where the
    step's velocity leads if it is followed to the end, x_t - sigma v.
    """

    number: int
    total: int
    sigma: float
    latents: torch.Tensor


Watch = Callable[[Step], None]


# ---- settings -------------------------------------------------------------------------------------------------------


def number(name: str, value: Any, low: float, high: float, kind: type = float) -> Any:
    """A number of Python or numpy as Python's own, which can be stored.

    Raises:
        ValueError: not a number, not whole where `kind` is int, NaN, or out of range.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value <= high or (kind is int and value != int(value)):
        whole = "whole " if kind is int else ""
        raise ValueError(f"{name.capitalize()} must be a {whole}number from {low} to {high}, not {value!r}.")
    return kind(value)


def checked(pipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as `Drawn` stores them, with the model's own size and shift where they are None.

    Raises:
        ValueError: one sentence that says what to do, before anything is computed.
    """
    found = dict(settings)
    for name in ("prompt", "negative_prompt"):
        text, called = found[name], name.replace("_", " ")
        if not isinstance(text, str):
            raise ValueError(f"The {called} must be one text, not a {type(text).__name__}: draw several in a loop.")
        if len(text) > LONGEST:
            raise ValueError(f"The {called} has {len(text)} letters: use at most {LONGEST}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Letter {error.start + 1} of the {called} is no text: type it anew.") from error
        found[name] = str(text)
    if not found["prompt"].strip():
        raise ValueError('The prompt is empty: say what to draw, such as "a fox on a blue background".')
    own = scheduler_of(pipe)
    if shift_of(own) is None and found.pop("shift") is not None:
        raise ValueError(f"The pipeline's {type(own).__name__} has no shift that can be set: leave it out.")
    for name in [name for name in LIMITS if name in found]:
        value = shift_of(own) if name == "shift" and found[name] is None else found[name]
        found[name] = number(name, value, *LIMITS[name])
    low, high = sizes(pipe)
    found["size"] = number("size", native_size(pipe) if found["size"] is None else found["size"], low, high, int)
    if found["size"] % 16:
        raise ValueError(f"Size must be a multiple of 16 from {low} to {high} for this model, not {found['size']}.")
    if "strength" in found and int(found["steps"] * found["strength"]) < 1:
        raise ValueError("Strength times steps is below one step: raise one of them.")
    return found


def filled(pipe, prompt: str, given: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """`checked` settings: those given, without `watch` and `stop`, the function's own, and the usual ones."""
    usual = dict(negative_prompt="", seed=0, shift=None, size=None) | own_settings(pipe)
    given = {name: value for name, value in given.items() if name not in HOOKS}
    given = {name: value for name, value in given.items() if value is not None or name not in ("steps", "guidance")}
    if unknown := given.keys() - usual.keys():
        raise TypeError(f"There is no setting {sorted(unknown)[0]!r}: there are {', '.join(usual)}.")
    return checked(pipe, {"prompt": prompt, **usual, **given, **own})


def own_settings(pipe) -> dict[str, float]:
    """The steps and the guidance that a model is made for, as `sd3kit.load` notes them; else diffusers' defaults."""
    return getattr(pipe, "own_settings", USUAL)


def sizes(pipe) -> tuple[int, int]:
    """The smallest and the largest side in pixels: 64, and what the transformer has positions for."""
    config = pipe.transformer.config
    return 64, config.pos_embed_max_size * config.patch_size * pipe.vae_scale_factor


def native_size(pipe) -> int:
    """The side in pixels that the model was trained for."""
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


def shift_of(scheduler) -> float | None:
    """The shift that a scheduler has now; None where it takes it from the picture's size, or has none."""
    if scheduler.config.get("use_dynamic_shifting"):
        return None
    return scheduler.shift if hasattr(type(scheduler), "shift") else scheduler.config.get(_shift_name(scheduler))


def _shift_name(scheduler) -> str:
    """The argument that sets a scheduler's shift."""
    return "flow_shift" if "flow_shift" in inspect.signature(type(scheduler)).parameters else "shift"


def scheduler_of(pipe, shift: float | None = None):
    """A fresh scheduler like the pipeline's, with this shift; None is the one it has.

    Raises:
        ValueError: it is not one for rectified flow.
    """
    old, kind = pipe.scheduler, type(pipe.scheduler)
    if not (kind.__name__.startswith("FlowMatch") or old.config.get("use_flow_sigmas")):
        raise ValueError(
            f"{kind.__name__} is not set for a rectified flow such as SD3: make it with use_flow_sigmas=True and "
            'prediction_type="flow_prediction", or use FlowMatchEulerDiscreteScheduler.'
        )
    # not from_config, which warns at each drawing of what a config has kept of another scheduler
    known = {name: old.config[name] for name in inspect.signature(kind).parameters if name in old.config}
    shift = shift_of(old) if shift is None else shift
    if shift is None or hasattr(kind, "set_shift"):
        own = kind(**known)
        if shift is not None:
            own.set_shift(shift)
        return own
    return kind(**known | {_shift_name(old): shift})


# ---- the pipeline, lent for one drawing -----------------------------------------------------------------------------

# One lock for each transformer, since pipelines made of the same parts share its adapters too; gone with the model.
_locks: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_locks_guard = threading.Lock()


@contextlib.contextmanager
def turn(pipe, stop: threading.Event | None = None) -> Iterator[None]:
    """Wait until no other drawing runs on this pipeline's parts, and hold it while this lasts.

    Raises:
        Stopped: `stop` was set while waiting.
    """
    with _locks_guard:
        lock = _locks.setdefault(pipe.transformer, threading.RLock())
    while not lock.acquire(timeout=0.05):
        if stop is not None and stop.is_set():
            raise Stopped
    try:
        if stop is not None and stop.is_set():
            raise Stopped
        yield
    finally:
        lock.release()


class _Watched:
    """The callback for `callback_on_step_end`: counts steps, tells `watch`, and interrupts the pipeline on `stop`."""

    def __init__(self, watch: Watch | None, stop: threading.Event | None):
        self.watch, self.stop = watch, stop
        self.steps = self.total = 0
        self._before: tuple[torch.Tensor, float] | None = None

    def __call__(self, pipe, index: int, timestep, values: dict) -> dict:
        scheduler, latents = pipe.scheduler, values["latents"]
        self.steps, self.total = index + 1, pipe.num_timesteps
        if self.watch is not None:
            sigma, end = float(scheduler.sigmas[scheduler.step_index]), latents
            if self._before is not None:
                old, level = self._before
                if sigma != level:  # schedulers of second order stay at a level for two steps
                    end = latents - sigma * (latents - old) / (sigma - level)
            self._before = latents, sigma
            self.watch(Step(self.steps, self.total, sigma, end))
        if self.stop is not None and self.stop.is_set():
            pipe._interrupt = True  # diffusers' own: the loop skips the other steps, then decodes and frees
        return values


def draw(pipe, settings: dict[str, Any], call: Callable, given: Mapping[str, Any]) -> Drawn:
    """Draw once with `filled` settings; `watch` and `stop` are among what was given, or not.

    Args:
        call: called with a pipeline of the same parts and the arguments that all kinds of pipelines take; gives the
            picture. Its scheduler is its own: a cell that calls `pipe` meanwhile would else take steps of the same one.

    Raises:
        Stopped: `stop` was set before the first step.
    """
    watch, stop = given.get("watch"), given.get("stop")
    watched, side = _Watched(watch, stop), settings["size"]
    with turn(pipe, stop):
        own = copy.copy(pipe)
        own.scheduler = scheduler_of(pipe, settings.get("shift"))
        if settings["steps"] == 1 and own.scheduler.config.get("shift_terminal"):
            own.scheduler.register_to_config(shift_terminal=None)  # a single level cannot be stretched: NaN
        # a thread's bar would land in any cell
        own.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}) | {"disable": True})
        start = time.perf_counter()
        try:
            image = call(
                own,
                {
                    "negative_prompt": settings["negative_prompt"],
                    "num_inference_steps": settings["steps"],
                    "guidance_scale": settings["guidance"],
                    "width": side,
                    "height": side,
                    "generator": torch.Generator().manual_seed(settings["seed"]),
                    "max_sequence_length": prompt_length(pipe, settings["prompt"], settings["negative_prompt"]),
                    "callback_on_step_end": watched,
                },
            )
        finally:
            # the pipeline does this itself at the end of a call, but not after an error
            pipe.maybe_free_model_hooks()
        seconds = time.perf_counter() - start
    return Drawn(image, settings, seconds, watched.steps, watched.total)


# ---- previews -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_to_rgb(pipe, stop: threading.Event | None = None) -> Callable[[torch.Tensor], Image.Image]:
    """A quick look at latents without the decoder: one colour for each place, linear in its channels.

    The map is fitted by least squares on eight pictures of random patches that this pipeline's autoencoder encodes, so
    it fits any model.

    Returns:
        A function from latents (1, 16, h, w) to a picture of w x h pixels.

    Raises:
        Stopped: `stop` was set while another drawing ran on this pipeline.
    """
    config, factor = pipe.vae.config, pipe.vae_scale_factor
    patches = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = interpolate(patches, (LATENTS * factor, LATENTS * factor), mode="nearest")
    with turn(pipe, stop):
        try:
            given = pictures.to(pipe._execution_device, pipe.vae.dtype)
            encoded = pipe.vae.encode(given).latent_dist.mode().float().cpu()
        finally:
            pipe.maybe_free_model_hooks()

    def with_one(latents: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) as rows (N, h, w, C + 1), the last a one for the map's constant."""
        return pad(latents.permute(0, 2, 3, 1), (0, 1), value=1.0)

    rows = with_one((encoded - (config.shift_factor or 0)) * config.scaling_factor).flatten(0, 2)
    weights = torch.linalg.lstsq(rows, avg_pool2d(pictures, factor).permute(0, 2, 3, 1).flatten(0, 2)).solution

    def look(latents: torch.Tensor) -> Image.Image:
        return show.to_image((with_one(latents[:1].float().cpu()) @ weights)[0].permute(2, 0, 1))

    return look
