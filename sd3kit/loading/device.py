"""The device, the precision and the processes that a model runs on."""

import os
from pathlib import Path

import torch

from .names import NANO


def pick_device() -> str:
    """The device that the environment variable SD3KIT_DEVICE names, or the fastest of this machine: cuda, mps, cpu."""
    if named := os.environ.get("SD3KIT_DEVICE"):
        return named
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
