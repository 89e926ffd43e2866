"""The command line: `sd3kit generate`, `check` (what this machine can run), `measure` and `reset`."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from . import __version__, configs, generate, measure
from .loading import MODELS, LoadError, pick_device, pick_dtype, resolve


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sd3kit", description="Learn Stable Diffusion 3, on a small real SD3.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    generate.add_parser(commands)
    commands.add_parser("check", help="what this machine has and what it can run")
    measure.add_parser(commands)
    reset = commands.add_parser("reset", help="put a lesson back as it was published, and keep your copy")
    reset.add_argument("lesson", help="how its name begins, such as 03")
    reset.add_argument("--folder", type=Path, default=Path("notebooks"), help="where the lessons are (%(default)s)")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "generate":
            generate.run(options)
        elif options.command == "measure":
            from . import bench  # imports what only measuring needs

            return bench.run(options)
        elif options.command == "reset":
            from .reset import reset

            lesson, copy = reset(options.lesson, options.folder)
            print(f"{lesson} is as it was published; yours is {copy}")
        else:
            check()
    except (generate.UserError, LoadError, measure.StudyError) as error:
        print(f"sd3kit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "sd3kit: stopped; finished pictures of a folder are kept, and the same command goes on.",
            file=sys.stderr,
        )
        return 130
    return 0


def check() -> None:
    import torch

    print(f"sd3kit {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")
    device = pick_device()
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / 2**30
        print(f"GPU: {properties.name}, {memory:.1f} GiB")
    elif device == "mps":
        memory = _ram()
        print(f"GPU: Apple, sharing {memory:.0f} GiB with the processor")
    else:
        memory = _ram()
        print(f"GPU: none; processor with {os.cpu_count()} cores, {memory:.0f} GiB of memory")
    print(f"free disk in the home folder: {shutil.disk_usage(Path.home()).free / 2**30:.0f} GiB")
    for name in MODELS:
        dtype, _ = pick_dtype(name, device)
        size = weight_bytes(name) / 2**30
        if size > memory:
            verdict = "its weights do not fit at once; lesson 04 shows how to make it fit"
        elif device == "cpu" and name != "nano":
            verdict = "fits, but takes many minutes a picture without a GPU"
        else:
            verdict = "yes"
        print(f"  {name:<16} {size:6.2f} GiB in {str(dtype).removeprefix('torch.'):<9} {verdict}")


def _ram() -> float:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return float("nan")


def weight_bytes(name: str) -> int:
    """Bytes of a model's weights at two bytes each, counted on the meta device from its configuration."""
    import torch
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    if name == "nano":
        return sum(file.stat().st_size for file in Path(resolve("nano")).rglob("*.safetensors"))
    with torch.device("meta"):
        modules = [
            SD3Transformer2DModel(**configs.TRANSFORMER[name]),
            AutoencoderKL(**configs.VAE),
            CLIPTextModelWithProjection(CLIPTextConfig(**configs.CLIP_L)),
            CLIPTextModelWithProjection(CLIPTextConfig(**configs.CLIP_G)),
            T5EncoderModel(T5Config(**configs.T5_XXL)),
        ]
    return 2 * sum(p.numel() for module in modules for p in module.parameters())
