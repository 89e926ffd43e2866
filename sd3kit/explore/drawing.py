"""What the explorers do, as plain functions on a diffusers pipeline; nothing here knows of widgets.

Each function draws one picture and returns a `Drawn`: the picture, the settings that make it again, the time, and the
data that the explorer shows. `watch` is told of each step, `stop` ends a drawing within one. The pipeline is left as it
was: a drawing has a scheduler and a progress bar of its own, adapters are put back, and offloading hooks are freed.
"""

import base64
import contextlib
import copy
import dataclasses
import html
import io
import json
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin
from torch.nn.functional import avg_pool2d, interpolate

from ..lesson import attention as words
from ..lesson import show
from ..loading.pipeline import prompt_length

KEY = "sd3kit"  # the PNG's text chunk that holds the settings
# Every setting that a PNG may bring back, and its type.
SETTINGS = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "steps": int,
    "guidance": float,
    "shift": float,
    "size": int,
    "strength": float,
    "scales": dict,
    "keep": str,
}
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


@dataclasses.dataclass
class Drawn:
    """A picture and how it came about.

    `settings` are the arguments that draw it again; `seconds` is the time it took; `steps` of `total` were run, fewer
    where it was stopped; `data` is what else the function found.
    """

    image: Image.Image
    settings: dict[str, Any]
    seconds: float
    steps: int
    total: int
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stopped(self) -> bool:
        return self.steps < self.total

    @property
    def alt(self) -> str:
        """The alternative text: prompt, seed, and where it was stopped."""
        end = f", stopped after {self.steps} of {self.total} steps" if self.stopped else ""
        return f"{self.settings['prompt']}; seed {self.settings['seed']}{end}"

    def png(self) -> bytes:
        """The picture as PNG, with its settings in the metadata."""
        stored, data = PngImagePlugin.PngInfo(), io.BytesIO()
        stored.add_text(KEY, json.dumps(self.settings))
        self.image.save(data, "PNG", pnginfo=stored)
        return data.getvalue()

    def save(self, path: str | os.PathLike) -> None:
        """Write `png()` to a file."""
        Path(path).write_bytes(self.png())

    def _repr_html_(self) -> str:
        return picture_html(self.png(), self.alt, max(256, self.image.width))


def picture_html(png: bytes, alt: str, width: int, style: str = "") -> str:
    """An `<img>` of a PNG with its alternative text, `width` pixels wide where there is room."""
    data = base64.b64encode(png).decode()
    return (
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt, quote=True)}" '
        f'style="width:{width}px;max-width:100%;height:auto;display:block;{style}">'
    )


def from_png(source: str | os.PathLike | bytes) -> dict[str, Any]:
    """The settings that `Drawn.png` stored in a picture: `text_to_image(pipe, **from_png("fox.png"))` draws it again.

    They are arguments of the function that drew it; the picture or mask that `image_to_image` and `inpaint` were given
    is not stored, and has to be given again.

    Args:
        source: a path, or the file's bytes.

    Raises:
        ValueError: not a PNG, or one without settings; in one sentence.
        OSError: the file cannot be read.
    """
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            text = image.text.get(KEY)
    except Image.DecompressionBombError as error:
        raise ValueError("This picture is too large to be opened.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError("This file is not a PNG picture.") from error
    if text is None:
        raise ValueError("This PNG holds no settings: only those that an explorer or Drawn.save wrote do.")
    try:
        found = json.loads(text)
        return {name: kind(found[name]) for name, kind in SETTINGS.items() if name in found}
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError("The settings in this PNG are damaged.") from error


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


@contextlib.contextmanager
def _lent(pipe, shift: float, stop: threading.Event | None) -> Iterator[Any]:
    """A pipeline of the same parts for one drawing, but with a scheduler of its own; freed whatever happens.

    A cell that calls `pipe` meanwhile would else take steps of the same scheduler.
    """
    with turn(pipe, stop):
        own = copy.copy(pipe)
        own.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        own.scheduler.set_shift(shift)
        # a thread's bar would land in any cell
        own.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}) | {"disable": True})
        try:
            yield own
        finally:
            # the pipeline does this itself at the end of a call, but not after an error
            pipe.maybe_free_model_hooks()


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
                end = latents - sigma * (latents - old) / (sigma - level)
            self._before = latents, sigma
            self.watch(Step(self.steps, self.total, sigma, end))
        if self.stop is not None and self.stop.is_set():
            pipe._interrupt = True  # diffusers' own: the loop skips the other steps, then decodes and frees
        return values


def check(pipe, settings: Mapping[str, Any]) -> None:
    """Say what is wrong with settings before anything is computed.

    Raises:
        ValueError: one sentence that says what to do.
    """
    if not str(settings["prompt"]).strip():
        raise ValueError('The prompt is empty: say what to draw, such as "a fox on a blue background".')
    limits = {"steps": (1, 1000), "guidance": (1, 20), "shift": (0.1, 100), "strength": (0, 1), "seed": (0, 2**63 - 1)}
    for name, (low, high) in limits.items():
        value = settings.get(name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name.capitalize()} must be from {low} to {high}, not {value}.")
    size, (low, high) = settings.get("size"), sizes(pipe)
    if size is not None and (size % 16 or not low <= size <= high):
        raise ValueError(f"Size must be a multiple of 16 from {low} to {high} for this model, not {size}.")
    if "strength" in settings and int(settings["steps"] * settings["strength"]) < 1:
        raise ValueError("Strength times steps is below one step: raise one of them.")


def sizes(pipe) -> tuple[int, int]:
    """The smallest and the largest side in pixels: 64, and what the transformer has positions for."""
    config = pipe.transformer.config
    return 64, config.pos_embed_max_size * config.patch_size * pipe.vae_scale_factor


def native_size(pipe) -> int:
    """The side in pixels that the model was trained for."""
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


def _filled(pipe, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the model's own size and shift where none is given, checked."""
    if settings.get("size") is None:
        settings["size"] = native_size(pipe)
    if settings.get("shift") is None:
        settings["shift"] = float(pipe.scheduler.shift)
    check(pipe, settings)
    return settings


def _draw(pipe, settings: dict[str, Any], watch: Watch | None, stop: threading.Event | None, call: Callable) -> Drawn:
    """Draw once; `call(pipe, arguments)` gets the pipeline lent and what all kinds take, and gives the picture."""
    watched = _Watched(watch, stop)
    with _lent(pipe, settings["shift"], stop) as own:
        start = time.perf_counter()
        image = call(
            own,
            {
                "num_inference_steps": settings["steps"],
                "guidance_scale": settings["guidance"],
                "generator": torch.Generator().manual_seed(settings["seed"]),
                "max_sequence_length": prompt_length(pipe, settings["prompt"], settings["negative_prompt"]),
                "callback_on_step_end": watched,
            },
        )
        seconds = time.perf_counter() - start
    return Drawn(image, settings, seconds, watched.steps, watched.total)


# ---- text to image, image to image, inpainting ----------------------------------------------------------------------


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
        pipe: the pipeline, as `sd3kit.load` gives it.
        prompt, negative_prompt: what it should show, and what to move away from.
        seed: of the noise it starts from, 0 to 2^63 - 1.
        steps: 1 to 1000.
        guidance: 1 (none) to 20.
        shift: the scheduler's for this picture, 0.1 to 100; None is the model's own.
        size: pixels of each side, a multiple of 16; None is the model's own.
        watch: called with a `Step` after each step.
        stop: an event; once it is set the drawing ends within one step, and `stopped` is true.

    Raises:
        ValueError: a setting that cannot be drawn; one sentence.
        Stopped: `stop` was set before the first step.
    """
    settings = _filled(pipe, dict(
        prompt=prompt, negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance, shift=shift,
        size=size,
    ))  # fmt: skip

    def call(pipe, arguments: dict) -> Image.Image:
        side = settings["size"]
        return pipe(prompt, negative_prompt=negative_prompt, width=side, height=side, **arguments).images[0]

    return _draw(pipe, settings, watch, stop, call)


def square(image: Image.Image, size: int) -> Image.Image:
    """A picture of any kind as RGB, upright, cut to its middle square and scaled to `size` pixels a side."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "P", "PA"):
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    return ImageOps.fit(upright.convert("RGB"), (size, size))


def image_to_image(
    pipe,
    image: Image.Image,
    prompt: str,
    *,
    strength: float = 0.6,
    negative_prompt: str = "",
    seed: int = 0,
    steps: int = 28,
    guidance: float = 7.0,
    shift: float | None = None,
    size: int | None = None,
    watch: Watch | None = None,
    stop: threading.Event | None = None,
) -> Drawn:
    """Change a picture with `StableDiffusion3Img2ImgPipeline`, which is built from the pipeline's parts.

    Args:
        image: where it starts; its middle square is scaled to `size`.
        strength: how far towards noise it goes first, 0 to 1; of `steps` only that share is run.
        (the others as in `text_to_image`)

    Returns:
        A `Drawn` with `data["image"]`, the picture as it was given to the pipeline. The settings do not hold it.

    Raises:
        ValueError, Stopped: as in `text_to_image`.
    """
    # loaded with the pipeline by now; at the top it would be slow, and libraries would print notes
    from diffusers import StableDiffusion3Img2ImgPipeline

    settings = _filled(pipe, dict(
        prompt=prompt, negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance, shift=shift,
        size=size, strength=strength,
    ))  # fmt: skip
    given = {"image": square(image, settings["size"])}
    drawn = _draw_over(StableDiffusion3Img2ImgPipeline, pipe, given, settings, watch, stop)
    drawn.data |= given
    return drawn


def _draw_over(
    kind: type, pipe, given: dict[str, Image.Image], settings: dict[str, Any], watch: Watch | None,
    stop: threading.Event | None,
) -> Drawn:  # fmt: skip
    """Draw with a pipeline of another kind, built from the parts, that takes the given pictures too."""

    def call(pipe, arguments: dict) -> Image.Image:
        change = kind(**pipe.components)
        change.set_progress_bar_config(disable=True)
        side = settings["size"]
        arguments |= given | {"strength": settings["strength"], "width": side, "height": side}
        return change(settings["prompt"], negative_prompt=settings["negative_prompt"], **arguments).images[0]

    return _draw(pipe, settings, watch, stop, call)


def mask(
    shape: str = "box", left: float = 0.5, top: float = 0.0, right: float = 1.0, bottom: float = 1.0, size: int = 128
) -> Image.Image:
    """A mask for `inpaint`, white where it is drawn anew.

    Args:
        shape: "box" or "ellipse".
        left, top, right, bottom: its edges, as shares of the picture, 0 to 1.
        size: pixels of each side.

    Raises:
        ValueError: another shape, or edges that leave nothing.
    """
    if shape not in ("box", "ellipse"):
        raise ValueError(f'A mask is a "box" or an "ellipse", not {shape!r}.')
    edges = [round(edge * size) for edge in (left, top, right, bottom)]
    if not (0 <= edges[0] < edges[2] <= size and 0 <= edges[1] < edges[3] <= size):
        raise ValueError("The mask is empty: move its edges apart.")
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    inside = [edges[0], edges[1], edges[2] - 1, edges[3] - 1]
    draw.rectangle(inside, fill=255) if shape == "box" else draw.ellipse(inside, fill=255)
    return image


def inpaint(
    pipe,
    image: Image.Image,
    mask: Image.Image,
    prompt: str,
    *,
    strength: float = 1.0,
    negative_prompt: str = "",
    seed: int = 0,
    steps: int = 28,
    guidance: float = 7.0,
    shift: float | None = None,
    size: int | None = None,
    watch: Watch | None = None,
    stop: threading.Event | None = None,
) -> Drawn:
    """Draw a part of a picture anew with `StableDiffusion3InpaintPipeline`.

    diffusers 0.42 decodes its latents without the autoencoder's shift factor (issue 13611 there): on the real SD3
    models colours move a little; nano's factor is 0.

    Args:
        image: the picture; its middle square is scaled to `size`.
        mask: white where it is drawn anew, such as `mask("ellipse")`.
        (the others as in `image_to_image`)

    Returns:
        A `Drawn` with `data["image"]` and `data["mask"]` as they were given to the pipeline.

    Raises:
        ValueError: also for a mask without white. Stopped: as in `text_to_image`.
    """
    from diffusers import StableDiffusion3InpaintPipeline

    settings = _filled(pipe, dict(
        prompt=prompt, negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance, shift=shift,
        size=size, strength=strength,
    ))  # fmt: skip
    side = settings["size"]
    start = square(image, side)
    where = ImageOps.fit(mask.convert("L"), (side, side), Image.Resampling.NEAREST)
    if where.getextrema()[1] < 128:
        raise ValueError("The mask is empty: white is what is drawn anew.")

    given = {"image": start, "mask_image": where}
    drawn = _draw_over(StableDiffusion3InpaintPipeline, pipe, given, settings, watch, stop)
    drawn.data |= {"image": start, "mask": where}
    return drawn


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
    latents = (encoded - (config.shift_factor or 0)) * config.scaling_factor
    flat = _with_one(latents).flatten(0, 2)
    weights = torch.linalg.lstsq(flat, avg_pool2d(pictures, factor).permute(0, 2, 3, 1).flatten(0, 2)).solution

    def look(latents: torch.Tensor) -> Image.Image:
        return show.to_image((_with_one(latents[:1].float().cpu()) @ weights)[0].permute(2, 0, 1))

    return look


def _with_one(latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) as rows (N, h, w, C + 1), the last a one for the map's constant."""
    return torch.nn.functional.pad(latents.permute(0, 2, 3, 1), (0, 1), value=1.0)


# ---- shift and schedule ---------------------------------------------------------------------------------------------


def sigmas(pipe, steps: int, shift: float) -> torch.Tensor:
    """The noise levels (steps + 1,) from near 1 down to 0, as the pipeline's scheduler would set them."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_shift(shift)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas


def schedule(pipe, prompt: str, *, watch: Watch | None = None, look: Callable | None = None, **settings: Any) -> Drawn:
    """Draw with a shift, and keep what the picture looked like at each step.

    Args:
        pipe, prompt, watch, **settings: as in `text_to_image`.
        look: the map of `latent_to_rgb`, where there is one already.

    Returns:
        A `Drawn` whose data has `sigmas` (steps + 1,) and `previews`, one for each step that was run.

    Raises:
        ValueError, Stopped: as in `text_to_image`.
    """
    check(pipe, {"prompt": prompt, **settings})  # before the wait for another drawing
    previews, look = [], look or latent_to_rgb(pipe, settings.get("stop"))

    def keep(step: Step) -> None:
        previews.append(look(step.latents))
        if watch is not None:
            watch(step)

    drawn = text_to_image(pipe, prompt, watch=keep, **settings)
    levels = sigmas(pipe, drawn.settings["steps"], drawn.settings["shift"])
    drawn.data |= {"sigmas": levels, "previews": previews}
    return drawn


def curve(levels: torch.Tensor, shift: float, previews: Sequence[Image.Image] = (), columns: int = 8) -> show.Picture:
    """The sigmas (steps + 1,) over the steps beside those without shift, and under them previews of some steps."""
    from matplotlib.figure import Figure  # not pyplot, which is not made for threads

    steps = len(levels) - 1
    figure = Figure(figsize=(7, 4.2 if previews else 2.8), layout="constrained")
    grid = figure.add_gridspec(2 if previews else 1, columns, height_ratios=[2.4, 1] if previews else [1])
    axis = figure.add_subplot(grid[0, :])
    axis.plot(range(steps + 1), levels, "o-", color=show.BLUE, markersize=4, label=f"shift {shift:g}")
    plain = levels / (shift - (shift - 1) * levels)  # the shift's inverse
    axis.plot(range(steps + 1), plain, "--", color=show.ORANGE, label="no shift")
    above = int((levels[:-1] > 0.5).sum())
    title = f"Shift {shift:g}: {above} of {steps} steps start above sigma 0.5"
    axis.set(xlabel="step", ylabel="sigma", ylim=(-0.03, 1.03), title=title)
    axis.legend()
    if previews:
        chosen = sorted({round(i) for i in np.linspace(0, len(previews) - 1, min(columns, len(previews)))})
        for column, index in enumerate(chosen):
            small = figure.add_subplot(grid[1, column])
            small.imshow(previews[index])
            small.set(xticks=[], yticks=[])
            small.set_xlabel(f"step {index + 1}\nσ {float(levels[index + 1]):.2f}", fontsize=8)
    return show.figure(figure, f"Sigma over {steps} steps. {title}")


# ---- attention ------------------------------------------------------------------------------------------------------


def attention(
    pipe,
    prompt: str,
    *,
    look_at: Sequence[str] | None = None,
    seed: int = 0,
    steps: int = 28,
    size: int | None = None,
    watch: Watch | None = None,
    stop: threading.Event | None = None,
) -> Drawn:
    """Draw a prompt and record where its words are looked at (`sd3kit.attention.maps`), at guidance 7.

    Args:
        look_at: words of the prompt; None is each of them.
        (the others as in `text_to_image`; SD3 Medium at 1024 pixels takes some 4 GB more than there, for one layer's
        attention in the open)

    Returns:
        A `Drawn` whose data has `words`, and `raw` and `concept`, both (words, steps, layers, rows, columns).

    Raises:
        ValueError: also for a word that is not in the prompt. Stopped: as in `text_to_image`.
    """
    settings = _filled(pipe, dict(prompt=prompt, negative_prompt="", seed=seed, steps=steps, guidance=7.0, size=size))
    chosen = list(look_at) if look_at is not None else words_of(prompt)
    watched = _Watched(watch, stop)
    with _lent(pipe, settings["shift"], stop) as own:
        start = time.perf_counter()
        length, side = prompt_length(pipe, prompt), settings["size"]
        given = {"max_sequence_length": length, "guidance_scale": settings["guidance"], "width": side, "height": side}
        found = words.maps(own, prompt, chosen, seed=seed, steps=steps, callback=watched, **given)
        seconds = time.perf_counter() - start
    data = {"words": chosen, "raw": found["raw"], "concept": found["concept"]}
    return Drawn(found["image"], settings, seconds, watched.steps, watched.total, data)


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
    if word not in drawn.data["words"]:
        raise ValueError(f"There is no map of {word!r}: choose one of {', '.join(drawn.data['words'])}.")
    if method not in ("concept", "raw"):
        raise ValueError(f'The method is "concept" or "raw", not {method!r}.')
    maps = drawn.data[method][drawn.data["words"].index(word)]
    for name, index, length in (("step", step, maps.shape[0]), ("layer", layer, maps.shape[1])):
        if index is not None and not 0 <= index < length:
            raise ValueError(f"There is no {name} {index}: it goes from 0 to {length - 1}.")
    maps = maps.mean(0) if step is None else maps[step]
    shown = maps.mean(0) if layer is None else maps[layer]
    low, high = shown.min(), shown.max()
    level = ((shown - low) / (high - low).clamp(min=1e-9))[None, None]
    large = interpolate(level, drawn.image.size[::-1], mode="bilinear", align_corners=False)[0, 0]
    veil = Image.fromarray((large * 200).byte().numpy())
    gray = drawn.image.convert("L").convert("RGB")
    gray.paste(Image.new("RGB", gray.size, show.VERMILION), mask=veil)
    rows, columns = shown.shape
    at = divmod(int(shown.argmax()), columns)
    where = f"most at row {at[0] + 1} of {rows}, column {at[1] + 1} of {columns}"
    which = "all layers" if layer is None else f"layer {layer + 1}"
    return show.Picture(gray, f"Where {word!r} is looked at in {which}, {where}: {drawn.alt}")


# ---- LoRA and encoders ----------------------------------------------------------------------------------------------


def adapters(pipe) -> list[str]:
    """The names of the LoRA adapters that are loaded, in order."""
    return sorted({name for names in pipe.get_list_adapters().values() for name in names})


@contextlib.contextmanager
def _scaled(pipe, scales: Mapping[str, float]) -> Iterator[None]:
    """The adapters at these scales while this lasts; then as they were."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, BaseTunerLayer)]
    before = [(layer, dict(layer.scaling), list(layer.active_adapters)) for layer in layers]
    learning = [(weight, weight.requires_grad) for layer in layers for weight in layer.parameters()]
    try:
        pipe.set_adapters(list(scales), list(scales.values()))
        yield
    finally:
        for layer, scaling, active in before:
            layer.scaling.update(scaling)
            layer.set_adapter(active)
        for weight, was in learning:  # set_adapter turns gradients on and off
            weight.requires_grad_(was)


def lora(pipe, prompt: str, scales: Mapping[str, float] | None = None, **settings: Any) -> Drawn:
    """Draw with LoRA adapters at scales of one's choice; 0 is without.

    Args:
        scales: a scale, -2 to 2, for each adapter to use; None is 1 for all that are loaded.
        pipe, prompt, **settings: as in `text_to_image`.

    Raises:
        ValueError: no adapter is loaded, an unknown name, or a scale out of range. Stopped: as in `text_to_image`.
    """
    there = adapters(pipe)
    if not there:
        raise ValueError('No LoRA is loaded: call pipe.load_lora_weights(folder, adapter_name="dog") first.')
    scales = dict.fromkeys(there, 1.0) if scales is None else {name: float(scale) for name, scale in scales.items()}
    for name, scale in scales.items():
        if name not in there:
            raise ValueError(f"There is no adapter {name!r}: use some of {', '.join(there)}.")
        if not (math.isfinite(scale) and -2 <= scale <= 2):
            raise ValueError(f"The scale of {name} must be from -2 to 2, not {scale:g}.")
    if not scales:
        raise ValueError(f"Give a scale for an adapter: {', '.join(there)}.")
    with turn(pipe, settings.get("stop")), _scaled(pipe, scales):
        drawn = text_to_image(pipe, prompt, **settings)
    drawn.settings["scales"] = scales
    return drawn


def encoders(
    pipe,
    prompt: str,
    keep: str = "123",
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
    """Draw with some of the text encoders: what the others say of the prompt is set to zero.

    The negative prompt keeps all three, so guidance moves from the same place.

    Args:
        keep: the encoders that speak: 1 is CLIP L/14, 2 OpenCLIP bigG/14, 3 the T5; "" is none.
        (the others as in `text_to_image`)

    Raises:
        ValueError: another `keep`, or as in `text_to_image`. Stopped: as in `text_to_image`.
    """
    from ..study.drawing import without  # brings nano's judge along, which nothing else here needs

    if set(keep) - set("123"):
        raise ValueError(f'Keep some of "123", not {keep!r}.')
    settings = _filled(pipe, dict(
        prompt=prompt, negative_prompt=negative_prompt, seed=seed, steps=steps, guidance=guidance, shift=shift,
        size=size, keep="".join(sorted(set(keep))),
    ))  # fmt: skip

    @torch.no_grad()
    def call(pipe, arguments: dict) -> Image.Image:
        embeds, empty, pooled, empty_pooled = pipe.encode_prompt(
            prompt, None, None, negative_prompt=negative_prompt, max_sequence_length=arguments["max_sequence_length"]
        )
        embeds, pooled = without(pipe, embeds, pooled, keep)
        return pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=empty,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=empty_pooled,
            width=settings["size"],
            height=settings["size"],
            **arguments,
        ).images[0]

    return _draw(pipe, settings, watch, stop, call)
