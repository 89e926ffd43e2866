"""The device, the precision and the processes that a model runs on."""

import os
from pathlib import Path

import torch

from .names import LoadError, resolve

THREADS = torch.get_num_threads()  # torch's own choice, before anybody's


def pick_device() -> str:
    """The device of the environment variable SD3KIT_DEVICE, or the fastest of this machine: cuda, mps or cpu.

    Raises:
        LoadError: SD3KIT_DEVICE names a device that this machine does not have.
    """
    if asked := os.environ.get("SD3KIT_DEVICE"):
        return check_device(asked, "SD3KIT_DEVICE")
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str | torch.device, where: str = "device") -> str:
    """The name of a device, such as "cuda:1", if this machine has it.

    Raises:
        LoadError: it has not; `where` says what asked for it.
    """
    name = str(device)
    try:
        torch.empty(1, device=name).item()  # the device "meta" holds no numbers
    except torch.OutOfMemoryError:
        pass  # it is there, and full
    except (RuntimeError, AssertionError, NotImplementedError):
        there = [f"cuda:{i}" if i else "cuda" for i in range(torch.cuda.device_count())]
        there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
        raise LoadError(
            f"{where} asks for {name!r}, which this machine does not have: use {' or '.join(there)}."
        ) from None
    return name


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's or the system's way to say that the memory is full."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(said in words for said in ("out of memory", "can't allocate memory", "not enough memory"))
    )


def use_threads(small: bool) -> None:
    """One thread of torch for a model as small as nano, all for another; OMP_NUM_THREADS, where it is set, stays.

    Threads that sleep while they wait cost a small model more than they give, and threads that spin cost it far more
    beside other work. A pass of nano on two cores, ms alone (and beside two busy threads), in three runs: one thread
    63 to 70 (81 to 89), two that spin 57 to 64 (132 to 2,460), two that sleep 93 (87). Two with GOMP_SPINCOUNT=3000
    take 45 to 58 (130 to 160): set that where the machine is yours alone. `benchmarks/threads.py`, 2026-11-28, AMD
    EPYC, torch 2.13.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() in (1, THREADS):
        torch.set_num_threads(1 if small else THREADS)


def check_launch(device: str) -> None:
    """That each of the processes that were launched together on GPUs has one.

    Raises:
        LoadError: there are more processes than GPUs.
    """
    launched, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if device == "cuda" and launched > there:
        raise LoadError(
            f"{launched} processes were launched, and this machine has {there} GPU{'s' * (there != 1)}: launch "
            f"--num_processes {there}, or set SD3KIT_DEVICE=cpu."
        )


def processes():
    """accelerate's state of the processes that were launched together, or of this one alone.

    Processes on a CPU are joined only where accelerate is told that it is one (read in 1.15.0); otherwise each would
    take itself for the only one, and do all the work.

    Raises:
        LoadError: there are more processes than GPUs.
    """
    from accelerate import PartialState

    device = pick_device()
    check_launch(device)
    state = PartialState(cpu=device == "cpu")
    if state.num_processes == 1:
        state.device = torch.device(device)  # accelerate knows no "cuda:1" of a process alone
    return state


def environment_alone() -> dict[str, str]:
    """This process's environment for one that is started from it and is no part of a launch."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def pick_dtype(name: str, device: str) -> tuple[torch.dtype, str]:
    """The precision for a model (a name, a folder or a Hub id) on a device, and why."""
    folder, kind = Path(resolve(name)), torch.device(device).type
    if folder.is_dir() and sum(f.stat().st_size for f in folder.rglob("*.safetensors") if f.exists()) < 2**30:
        return torch.float32, "it is small enough for full precision"
    if kind == "cpu":
        return torch.bfloat16, "half the memory of float32, and fp16 is slow on a CPU"
    if (
        resolve(name).rpartition("/")[2].removeprefix("stable-diffusion-").startswith("3.5")
        and kind == "cuda"
        and torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return torch.bfloat16, "the precision that SD3.5 was released in"
    return torch.float16, "the precision that SD3 was released in"
