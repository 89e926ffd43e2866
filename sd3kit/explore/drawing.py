"""What a drawing needs: settings checked, a scheduler of its own, its turn, and a quick look at its latents."""

import contextlib
import copy
import dataclasses
import numbers
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, interpolate, pad

from ..lesson import show
from ..loading.names import USUAL

LIMITS = {
    "seed": (0, 2**63 - 1, int), "steps": (1, 1000, int), "guidance": (1, 20, float), "shift": (0.1, 100, float),
    "strength": (0, 1, float),
}  # fmt: skip


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


def number(name: str, value: Any, low: float, high: float, kind: type = float) -> Any:
    """A number of Python or numpy as Python's own, which can be stored; or ValueError."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value <= high or (kind is int and value != int(value)):
        whole = "whole " if kind is int else ""
        raise ValueError(f"{name.capitalize()} must be a {whole}number from {low} to {high}, not {value!r}.")
    return kind(value)


def checked(pipe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as `Drawn` stores them, with the model's own in place of None; or ValueError, before anything runs."""
    found = dict(settings)
    for name in ("prompt", "negative_prompt"):
        text, called = found[name], name.replace("_", " ")
        if not isinstance(text, str):
            raise ValueError(f"The {called} must be one text, not a {type(text).__name__}: draw several in a loop.")
        found[name] = text.encode(errors="ignore").decode()
        if found[name] != text:
            raise ValueError(f"A letter of the {called} is no text: type it anew.")
    if not found["prompt"].strip():
        raise ValueError('The prompt is empty: say what to draw, such as "a fox on a blue background".')
    own, (low, native, high) = shift_of(scheduler_of(pipe)), sizes(pipe)
    if own is None and found.pop("shift") is not None:
        raise ValueError(f"{type(pipe.scheduler).__name__} takes a shift only when it is made: leave the shift out.")
    usual = {**own_settings(pipe), "shift": own, "size": native}
    for name, limits in {**LIMITS, "size": (low, high, int)}.items():
        if name in found:
            found[name] = number(name, usual.get(name) if found[name] is None else found[name], *limits)
    if found["size"] % 16:
        raise ValueError(f"Size must be a multiple of 16 from {low} to {high} for this model, not {found['size']}.")
    if "strength" in found and int(found["steps"] * found["strength"]) < 1:
        raise ValueError("Strength times steps is below one step: raise one of them.")
    return found


def own_settings(pipe) -> dict[str, float]:
    """The steps and the guidance that a model is made for, as `sd3kit.load` notes them; else diffusers' defaults."""
    return getattr(pipe, "own_settings", USUAL)


def sizes(pipe) -> tuple[int, int, int]:
    """A side in pixels: 64 at least, what the model was trained for, what the transformer has positions for at most."""
    config, factor = pipe.transformer.config, pipe.vae_scale_factor
    return 64, config.sample_size * factor, config.pos_embed_max_size * config.patch_size * factor


def shift_of(scheduler) -> float | None:
    """The shift of a scheduler that can be set to another; None of those that only take one when they are made."""
    fixed = not hasattr(scheduler, "set_shift") or scheduler.config.get("use_dynamic_shifting")
    return None if fixed else scheduler.shift


def scheduler_of(pipe, shift: float | None = None, steps: int | None = None):
    """A copy of the scheduler with this shift, or its own; ValueError where it is none for rectified flow."""
    kind, own = type(pipe.scheduler).__name__, copy.deepcopy(pipe.scheduler)
    if not (kind.startswith("FlowMatch") or own.config.get("use_flow_sigmas")):
        raise ValueError(
            f"{kind} is not set for a rectified flow such as SD3: make it with use_flow_sigmas=True and "
            'prediction_type="flow_prediction", or use FlowMatchEulerDiscreteScheduler.'
        )
    if shift is not None:
        own.set_shift(shift)
    if steps == 1 and own.config.get("shift_terminal"):
        own.register_to_config(shift_terminal=None)  # a single level cannot be stretched: NaN
    return own


_one = threading.RLock()


@contextlib.contextmanager
def turn(stop: threading.Event) -> Iterator[None]:
    """Wait until no other drawing runs, as two at once are slower, and keep others waiting; `Stopped` on `stop`."""
    while stop.is_set() or not _one.acquire(timeout=0.05):
        if stop.is_set():
            raise Stopped
    try:
        if stop.is_set():  # by a newer drawing, which has had its turn while this one waited
            raise Stopped
        yield
    finally:
        _one.release()


_maps: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of each autoencoder, fitted when it is first needed


@torch.no_grad()
def latent_to_rgb(pipe, latents: torch.Tensor) -> Image.Image:
    """A quick look at latents (1, 16, h, w) without the decoder, as a picture of w x h pixels.

    Each place gets a colour that is linear in its channels. The map is fitted by least squares on eight pictures of
    random patches that this pipeline's autoencoder encodes, so it fits any model.
    """

    def with_one(latents: torch.Tensor) -> torch.Tensor:  # (N, C, h, w) as (N, h, w, C + 1): a one for the constant
        return pad(latents.float().cpu().permute(0, 2, 3, 1), (0, 1), value=1.0)

    if pipe.vae not in _maps:
        config, factor = pipe.vae.config, pipe.vae_scale_factor
        patches = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        pictures = interpolate(patches, scale_factor=4 * factor)
        encoded = pipe.vae.encode(pictures.to(pipe._execution_device, pipe.vae.dtype)).latent_dist.mode()
        rows = with_one((encoded - (config.shift_factor or 0)) * config.scaling_factor).flatten(0, 2)
        colours = avg_pool2d(pictures, factor).permute(0, 2, 3, 1).flatten(0, 2)
        _maps[pipe.vae] = torch.linalg.lstsq(rows, colours).solution
    return show.to_image((with_one(latents[:1]) @ _maps[pipe.vae])[0].permute(2, 0, 1))
