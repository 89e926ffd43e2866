"""Honest figures: intervals, and the stamp that says where a record comes from."""

import datetime
import importlib.metadata
import math
import os
import platform
from collections.abc import Sequence

import torch


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson interval (low, high), in 0..1, of a share that was `right` times in `total`.

    Raises:
        ValueError: no trials, or more right than trials.
    """
    if total <= 0 or not 0 <= right <= total:
        raise ValueError(f"A share needs 0 <= right <= total and total > 0, not {right} of {total}.")
    share, square = right / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(answers: Sequence[bool]) -> dict:
    """A record of a share of right answers: its value, its 95% interval and how many there were."""
    right, total = sum(map(bool, answers)), len(answers)
    low, high = wilson(right, total)
    return {"share": right / total, "low": low, "high": high, "n": total}


def processor() -> str:
    """The name of this machine's processor, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def stamp(command: str) -> dict:
    """Where and how a record was made: machine, versions, date, and the command that makes it again."""
    packages = ("torch", "diffusers", "transformers", "sd3kit")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }
