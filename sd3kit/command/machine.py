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

CGROUPS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")  # versions 2 and 1


def check() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(KeyError, ValueError):
        cores = min(cores, float(os.environ["CPU_LIMIT"]))  # JupyterHub's, as MEM_LIMIT, which is in bytes
    told = [os.environ.get("MEM_LIMIT", ""), *(path.read_text().strip() for path in CGROUPS if path.is_file())]
    device, memory = pick_device(), min([psutil.virtual_memory().total, *map(int, filter(str.isdigit, told))]) / 2**30
    what = "Apple's GPU, sharing its memory" if device == "mps" else f"no GPU, {cores:g} cores of a processor"
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
