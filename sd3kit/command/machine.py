"""`sd3kit check`: what this machine has and what it can run."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

import psutil
import torch

from .. import __version__, records
from ..loading.device import pick_device
from ..loading.names import MODELS


def check() -> None:
    device, memory = pick_device(), psutil.virtual_memory().total / 2**30
    what = "Apple's GPU, sharing its memory" if device == "mps" else f"no GPU, a processor of {os.cpu_count()} cores"
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        what, memory = properties.name, properties.total_memory / 2**30
    print(f"sd3kit {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")
    print(f"{what}, {memory:.1f} GiB of memory")
    with contextlib.suppress(OSError, RuntimeError):  # there may be no home
        print(f"free disk in the home folder: {shutil.disk_usage(Path.home()).free / 2**30:.0f} GiB")
    # what drawing 1024 x 1024 takes with all of a model on the device, as lesson 04 accounts it; nano is small
    rows = records.read(records.RESULTS / "bytes.jsonl")
    needs = {row["model"]: row["device"] / 2**30 for row in rows if row["row"] == "default"}
    for name in MODELS:
        size, verdict = needs.get(name, 0.5), "yes"
        if size > memory:
            verdict = "does not fit at once; lesson 04 shows how to make it fit"
        elif device == "cpu" and name in needs:
            verdict = "fits, but takes many minutes a picture without a GPU"
        print(f"  {name:<16} {size:5.1f} GiB  {verdict}")
