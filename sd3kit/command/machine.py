"""`sd3kit check`: what this machine has and what it can run."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

import psutil
import torch

from .. import __version__
from ..loading import configs
from ..loading.device import pick_device, pick_dtype
from ..loading.names import MODELS, resolve


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
    for name in MODELS:
        dtype, _ = pick_dtype(name, device)
        size = weight_bytes(name) / 2**30
        if size > memory:
            verdict = "its weights do not fit at once; lesson 04 shows how to make it fit"
        elif device == "cpu" and not name.startswith("nano"):
            verdict = "fits, but takes many minutes a picture without a GPU"
        else:
            verdict = "yes"
        print(f"  {name:<16} {size:6.2f} GiB in {str(dtype).removeprefix('torch.'):<9} {verdict}")


def weight_bytes(name: str) -> int:
    """Bytes of a model's weights at two bytes each; nano's as its files have them."""
    if name.startswith("nano"):  # nano-turbo is nano and an adapter
        folders = {resolve("nano"), resolve(name)}
        return sum(file.stat().st_size for folder in folders for file in Path(folder).rglob("*.safetensors"))
    return 2 * configs.PARAMETERS[name]
