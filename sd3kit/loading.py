"""`load`: a plain diffusers pipeline for nano, the real SD3 models, or any folder; and every way it can fail."""

import contextlib
import difflib
import errno
import importlib.metadata
import importlib.resources
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from . import configs

NANO = Path(str(importlib.resources.files(__package__))) / "nano"
MODELS = ("nano", *configs.HUB)


class LoadError(RuntimeError):
    """A model could not be loaded; the message is one sentence that says what to do."""


def resolve(model: str | os.PathLike | None = None) -> str:
    """The folder or Hub id that a name stands for.

    `None` is the environment variable SD3KIT_MODEL, or nano. A name of `MODELS`, a folder with a model_index.json, or
    a Hub id "owner/name" is accepted.

    Raises:
        LoadError: an unknown name (the nearest ones are offered), or a folder that holds no pipeline.
    """
    name = os.fspath(model or os.environ.get("SD3KIT_MODEL") or "nano")
    if name == "nano":
        return str(NANO)
    if name in configs.HUB:
        return configs.HUB[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "model_index.json").is_file():
            return str(folder)
        raise LoadError(
            f"The folder {folder} holds no model_index.json, so it is not a saved pipeline: give the folder that "
            "save_pretrained wrote."
        )
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~"):
        return name
    near = difflib.get_close_matches(name.lower(), MODELS, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(MODELS)},"
    raise LoadError(f"There is no model or folder named {name!r}: {hint} A folder or a Hub id (owner/name) works too.")


def pick_device() -> str:
    """The fastest device of this machine: cuda, mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def processes():
    """accelerate's state of the processes that were launched together, or of this one alone.

    Processes on a CPU are joined only where accelerate is told that it is one (read in 1.15.0); otherwise each would
    take itself for the only one, and do all the work.
    """
    from accelerate import PartialState

    return PartialState(cpu=pick_device() == "cpu")


def environment_alone() -> dict[str, str]:
    """This process's environment for one that is started from it and is no part of a launch."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def pick_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The precision for a model (a name, a folder or a Hub id) on a device, and why."""
    folder = NANO if name == "nano" else Path(name)
    if folder.is_dir() and sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < 2**30:
        return torch.float32, "it is small enough for full precision"
    if device == "cpu":
        return torch.bfloat16, "half the memory of float32, and fp16 is slow on a CPU"
    if name.startswith("3.5") and device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the precision that SD3.5 was released in"
    return torch.float16, "the precision that SD3 was released in"


def load(
    model: str | os.PathLike | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    weights: str = "trained",
    quiet: bool = False,
    **kwargs: Any,
):
    """A `StableDiffusion3Pipeline` of diffusers, on a device and ready to be called.

    Args:
        model: a name of `MODELS`, a folder or a Hub id; None is the environment variable SD3KIT_MODEL, or nano.
        device: "cuda", "mps", "cpu"; None picks the fastest.
        dtype: None picks what suits the model and the device.
        weights: "trained", or "random" to build a model of `MODELS` at its true size with no download, for measuring
            speed and memory; what it draws is noise.
        quiet: do not print the line that says what was picked and why.
        **kwargs: passed on to `StableDiffusion3Pipeline.from_pretrained`, such as `text_encoder_3=None,
            tokenizer_3=None`. Without weights in safetensors nothing is loaded: a pickle is never opened.

    Raises:
        LoadError: whatever goes wrong, in one sentence with the next step.
        ValueError: `weights` is neither of the two.
    """
    if weights not in ("trained", "random"):
        raise ValueError(f'weights must be "trained" or "random", not {weights!r}.')
    name = os.fspath(model or os.environ.get("SD3KIT_MODEL") or "nano")
    source = resolve(name)
    device = device or pick_device()
    picked, reason = pick_dtype(name, device)
    if dtype is None:
        dtype = picked
    else:
        reason = "as asked"
    if weights == "random":
        pipe = _random(name, dtype, device, kwargs)
        reason += "; its weights are random, so it draws noise"
    else:
        pipe = _trained(name, source, dtype, kwargs)
        if "device_map" not in kwargs:
            pipe.to(device)
    if not quiet:
        print(f"{name} on {device} in {str(dtype).removeprefix('torch.')}: {reason}.")
    return pipe


@contextlib.contextmanager
def _undisturbed(local: bool) -> Iterator[None]:
    """Keep the libraries' notes on optional packages, and for a local folder their progress bars, off the page."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    verbosity, packer = transformers_logging.get_verbosity(), logging.getLogger("bitsandbytes")
    level = packer.level
    libraries = (diffusers_logging, transformers_logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    transformers_logging.set_verbosity_error()
    packer.setLevel(logging.ERROR)  # it warns of kernels that this processor could have
    if local:
        for library in libraries:
            library.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        packer.setLevel(level)
        for library, was in zip(libraries, shown, strict=True):
            if was:
                library.enable_progress_bar()


def dtype_argument(dtype: torch.dtype | None) -> dict[str, torch.dtype | None]:
    """The precision as an argument of diffusers' `from_pretrained`: before 0.40 `dtype` is ignored without a word."""
    return {"dtype" if Version(importlib.metadata.version("diffusers")) >= Version("0.40.0") else "torch_dtype": dtype}


def with_dtype(cls: type) -> type:
    """A diffusers class whose `from_pretrained` takes `dtype`: itself, or before 0.40 a subclass that passes it on."""
    if "dtype" in dtype_argument(None):
        return cls

    class Older(cls):
        @classmethod
        def from_pretrained(cls, *args, dtype=None, **kwargs):
            return super().from_pretrained(*args, **dtype_argument(dtype), **kwargs)

    Older.__name__ = cls.__name__  # diffusers knows its pipelines by name
    return Older


def _trained(name: str, source: str, dtype: torch.dtype, kwargs: dict):
    try:
        with _undisturbed(local=Path(source).is_dir()):
            from diffusers import StableDiffusion3Pipeline

            kwargs = dtype_argument(dtype) | kwargs
            return StableDiffusion3Pipeline.from_pretrained(source, use_safetensors=True, **kwargs)
    except Exception as error:
        sentence = explain(error, name, source)
        if sentence is None:
            raise
        raise LoadError(sentence) from error


def explain(error: BaseException, name: str, source: str) -> str | None:
    """What went wrong when loading and what to do about it, in one sentence; None for an error not known here."""
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError

    chain = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    page = f"https://huggingface.co/{source}"
    local = Path(source).is_dir()
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in chain):
        return (
            f"The disk is full while loading {name}: free some space (SD3 Medium needs 16 GB) or set HF_HOME to "
            "another disk."
        )
    if has(hub.GatedRepoError):
        return f"{name} is gated: accept its licence at {page}, log in once with `hf auth login`, and run this again."
    if has(hub.RepositoryNotFoundError):
        return f"The Hub has no model {source}, or it is private: check the name, or log in with `hf auth login`."
    if has(SafetensorError) or any("safetensors" in str(e).lower() and "header" in str(e).lower() for e in chain):
        where = source if local else "its folder in the Hub cache"
        return f"A weights file of {name} is damaged: delete {where} and load it again."
    unreachable = has(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if unreachable or any("connect" in type(e).__name__.lower() for e in chain):
        return (
            f"{name} is not on this machine and the Hub cannot be reached: check the network, or use nano, which "
            "needs none."
        )
    if has(OSError) and local:
        return f"The folder {source} lacks a file of its pipeline ({str(chain[0]).splitlines()[0]}): save it again."
    if has(OSError):
        return f"{name} could not be loaded from the Hub: check the name and the network ({page})."
    return None


def _random(name: str, dtype: torch.dtype, device: str, kwargs: dict):
    """The pipeline of a name at its true size, its weights drawn at random on the device itself."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    parts = _trained("nano", str(NANO), dtype, {}).components
    if name == "nano":
        for module in parts.values():
            if isinstance(module, torch.nn.Module):
                for weight in module.parameters():
                    torch.nn.init.normal_(weight, std=0.02)
    elif name not in configs.HUB:
        raise LoadError(f'weights="random" knows the configurations of {", ".join(MODELS)} only, not of {name!r}.')
    else:
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                parts["transformer"] = SD3Transformer2DModel(**configs.TRANSFORMER[name])
                parts["vae"] = AutoencoderKL(**configs.VAE)
                parts["text_encoder"] = CLIPTextModelWithProjection(CLIPTextConfig(**configs.CLIP_L))
                parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**configs.CLIP_G))
                if kwargs.get("text_encoder_3", ...) is not None:
                    parts["text_encoder_3"] = T5EncoderModel(T5Config(**configs.T5_XXL))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise LoadError(
                f"{name} does not fit on {device} in {dtype}: leave out the T5 (text_encoder_3=None)."
            ) from error
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
