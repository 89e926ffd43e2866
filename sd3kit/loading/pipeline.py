"""`load`: a plain diffusers pipeline for nano, the real SD3 models, or any folder."""

import contextlib
import gc
import itertools
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import configs, hub, parts
from .device import check_device, is_out_of_memory, pick_device, pick_dtype, use_threads
from .names import MODELS, NANO, TURBO, LoadError, own_settings, resolve

LORA = "pytorch_lora_weights.safetensors"
PARTS = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "image_encoder", "feature_extractor")
_one = threading.RLock()  # transformers, diffusers and what is below patch globals while a model loads


def load(
    model: str | os.PathLike | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    quiet: bool = False,
    **kwargs: Any,
):
    """A `StableDiffusion3Pipeline` of diffusers, on a device and ready to be called.

    Args:
        model: a name of `MODELS`, a folder or a Hub id; None is the environment variable SD3KIT_MODEL, or nano.
        device: "cuda", "mps", "cpu"; None is the environment variable SD3KIT_DEVICE, or the fastest.
        dtype: None picks what suits the model and the device.
        weights: "trained", or "random" to build a model of `MODELS` at its true size with no download, for measuring
            speed and memory; what it draws is noise. None is the environment variable SD3KIT_WEIGHTS for the models of
            the Hub (nano needs no download), or "trained".
        quiet: do not print the line that says what was picked and why.
        **kwargs: passed on to `StableDiffusion3Pipeline.from_pretrained`, such as `text_encoder_3=None,
            tokenizer_3=None`. Without weights in safetensors nothing is loaded: a pickle is never opened.

    "nano-turbo" is nano with its few-step LoRA fused. `pipe.own_settings` has the steps and the guidance that the model
    is made for, which the explorers and `sd3kit generate` use.

    Every weight must be there, known, of its shape and finite. With a `device_map` or a `quantization_config` the
    libraries load on their own terms, and show their own report of weights.

    Raises:
        LoadError: whatever goes wrong, in one sentence with the next step; it names the file, the part or the tensor.
        ValueError: `weights` is neither of the two.
    """
    name = os.fspath(model or os.environ.get("SD3KIT_MODEL") or "nano")
    if weights is None:
        weights = (name in configs.HUB and os.environ.get("SD3KIT_WEIGHTS")) or "trained"
    if weights not in ("trained", "random"):
        raise ValueError(f'weights must be "trained" or "random", not {weights!r}.')
    source = resolve(name)
    device = pick_device() if device is None else check_device(device)
    if device == "cpu":
        use_threads(small=source in (str(NANO), str(TURBO)))
    picked, reason = pick_dtype(name, device)
    dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype  # the argument's older name
    if dtype is None:
        dtype = picked
    else:
        reason = "as asked"
    try:
        with _one, _quick_imports():
            if weights == "random":
                pipe = _random(name, dtype, device, kwargs)
                reason += "; its weights are random, so it draws noise"
            else:
                pipe = _trained(name, source, dtype, device, kwargs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise LoadError(f"{name} does not fit on {device} in {dtype}: lesson 04 shows how to make it fit.") from error
    pipe.own_settings = own_settings(name)
    if not quiet:
        print(f"{name} on {device} in {str(dtype).removeprefix('torch.')}: {reason}.")
    return pipe


@contextlib.contextmanager
def _quick_imports() -> Iterator[None]:
    """Import diffusers in two thirds of the time.

    bitsandbytes hands functions of its CPU kernels to torch.compile as it is imported, and so brings all of inductor;
    torch's own switch leaves them as they are. The garbage collector would look through every module again and again.
    """
    was, collecting = os.environ.get("TORCHDYNAMO_DISABLE"), gc.isenabled()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # read at each torch.compile, so that it serves again afterwards
    gc.disable()
    try:
        yield
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        os.environ |= {} if was is None else {"TORCHDYNAMO_DISABLE": was}
        if collecting:
            gc.enable()


@contextlib.contextmanager
def undisturbed(local: bool) -> Iterator[None]:
    """Keep the libraries' notes on weights and optional packages, and for a local folder their progress bars, away."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("diffusers.models", "transformers", "bitsandbytes")]
    levels = [logger.level for logger in loggers]
    bars = [one for one in (diffusers_logging, transformers_logging) if local and one.is_progress_bar_enabled()]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for library in bars:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for library in bars:
            library.enable_progress_bar()


def _trained(name: str, source: str, dtype: torch.dtype, device: str, kwargs: dict):
    options = {key: kwargs[key] for key in hub.OPTIONS if key in kwargs}
    kwargs = {key: value for key, value in kwargs.items() if key not in hub.OPTIONS}
    variant, turbo = kwargs.pop("variant", None), source == str(TURBO)
    folder, local = NANO if turbo else Path(source), Path(source).is_dir()
    given = {key for key in kwargs if key.rstrip("_23") in PARTS}
    # placed or quantized by the libraries: then they load all at once, and their reports are shown
    theirs = kwargs.get("device_map") is not None or kwargs.get("quantization_config") is not None
    try:
        with contextlib.nullcontext() if theirs else undisturbed(local):
            from diffusers import StableDiffusion3Pipeline

            if not local:
                folder = hub.folder(name, source, variant, given, **options)
            loaded = {} if theirs else parts.load(folder, given, variant, dtype)
            for part in sorted(parts.index(folder).keys() - given) if theirs else ():
                parts.look(folder / part)
            pipe = StableDiffusion3Pipeline.from_pretrained(
                folder, dtype=dtype, variant=variant, use_safetensors=True, **kwargs | loaded
            )
            if turbo:
                _fuse(pipe)
        if kwargs.get("device_map") is None:
            pipe.to(device)
        parts.check_finite(folder, loaded)
        return pipe
    except parts.Damaged as error:
        raise LoadError(_again(error, name, source, folder)) from error


def _fuse(pipe) -> None:
    """Fuse nano-turbo's LoRA into nano's weights, and take the scheduler beside it."""
    try:
        # pipe.load_lora_weights does the same, and warns that there is none for the text encoders
        pipe.transformer.load_lora_adapter(TURBO, prefix="transformer", weight_name=LORA, adapter_name="turbo")
        pipe.fuse_lora(["transformer"])
        pipe.unload_lora_weights()
        pipe.scheduler = type(pipe.scheduler).from_pretrained(TURBO, subfolder="scheduler")
    except Exception as error:  # peft, diffusers and safetensors each have errors of their own
        parts.look(TURBO)
        parts.look(TURBO / "scheduler")
        raise parts.Damaged(TURBO, f"cannot be loaded ({type(error).__name__})") from error


def _again(error: parts.Damaged, name: str, source: str, folder: Path) -> str:
    """What is damaged, and how to get it again; never by deleting what may be somebody's own."""
    if source in (str(NANO), str(TURBO)):
        return f"{error}: install sd3kit again, or take it from the repository of sd3kit."
    if Path(source).is_dir():
        return f"{error}: copy it again from where it came from, or save the pipeline again."
    path = error.path.relative_to(folder)
    only = "" if error.path == folder else f" --include '{path}/*'" if error.path.is_dir() else f" {path}"
    return f"{path} of {name} {error.what}: `hf download {source}{only} --force-download` gets it again."


def build(model: str, part: str) -> torch.nn.Module:
    """A part of a model of `configs` at its true size, on torch's default device and in its default precision.

    Its weights are random. All parts but the transformer are the same in all models.
    """
    import diffusers
    import transformers

    if part == "transformer":
        return diffusers.SD3Transformer2DModel(**configs.TRANSFORMER[model])
    if part == "vae":
        return diffusers.AutoencoderKL(**configs.VAE)
    if part == "text_encoder_3":
        return transformers.T5EncoderModel(transformers.T5Config(**configs.T5_XXL))
    config = configs.CLIP_L if part == "text_encoder" else configs.CLIP_G
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**config))


def _random(name: str, dtype: torch.dtype, device: str, kwargs: dict):
    """The pipeline of a name at its true size, its weights drawn at random on the device itself."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    if name not in MODELS:
        raise LoadError(f'weights="random" knows the configurations of {", ".join(MODELS)} only, not of {name!r}.')
    parts = _trained("nano", str(NANO), dtype, "cpu", {}).components
    modules = [part for part, module in parts.items() if isinstance(module, torch.nn.Module)]
    if name in ("nano", "nano-turbo"):
        for weight in itertools.chain(*(parts[part].parameters() for part in modules)):
            torch.nn.init.normal_(weight, std=0.02)
    else:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                parts |= {part: build(name, part) for part in modules if kwargs.get(part, ...) is not None}
        finally:
            torch.set_default_dtype(previous)
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=configs.SHIFT)
    pipe = StableDiffusion3Pipeline(**(parts | kwargs))
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return pipe.to(device)


def prompt_length(pipe, *prompts: str) -> int:
    """The T5 length to pad to: the pipeline's 256 costs nano nearly twice the time, and nearly all of it is padding."""
    if pipe.tokenizer_3 is None:
        return 40
    longest = max(len(pipe.tokenizer_3(prompt).input_ids) for prompt in prompts)
    return min(256, max(40, longest))
