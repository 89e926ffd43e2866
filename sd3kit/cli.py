"""The command line: `sd3kit generate` draws, `check` says what this machine can run, `measure` measures it."""

import argparse
import errno
import os
import shutil
import sys
from pathlib import Path

from . import __version__, configs, measure
from .loading import MODELS, LoadError, load, pick_device, pick_dtype, prompt_length, resolve


class UserError(Exception):
    """A wrong argument; the message is one sentence that says what to do."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sd3kit", description="Learn Stable Diffusion 3, on a small real SD3.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    generate = commands.add_parser("generate", help="draw a picture of a prompt")
    generate.add_argument("prompt", help='such as "a fox on a blue background"')
    generate.add_argument("-o", "--output", type=Path, default=Path("sd3kit.png"), help="PNG or JPEG (%(default)s)")
    generate.add_argument("--model", help=f"{', '.join(MODELS)}, a folder or a Hub id (SD3KIT_MODEL, or nano)")
    generate.add_argument("--negative", default="", metavar="PROMPT", help="what the picture should not show")
    generate.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture (%(default)s)")
    generate.add_argument("--steps", type=int, default=28, help="1 to 1000 (%(default)s)")
    generate.add_argument("--guidance", type=float, default=7.0, help="1 to 20; 1 is none (%(default)s)")
    generate.add_argument("--size", type=int, help="pixels of each side, divisible by 16 (the model's own)")
    commands.add_parser("check", help="what this machine has and what it can run")
    measure.add_parser(commands)
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "generate":
            generate(options)
        elif options.command == "measure":
            from . import bench  # imports what only measuring needs

            return bench.run(options)
        else:
            check()
    except (UserError, LoadError, measure.StudyError) as error:
        print(f"sd3kit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sd3kit: stopped; nothing was written.", file=sys.stderr)
        return 130
    return 0


def _validate(options: argparse.Namespace) -> None:
    """Whatever can be wrong is said before a model is loaded."""
    if not options.prompt.strip():
        raise UserError('the prompt is empty: say what to draw, such as "a fox on a blue background".')
    if not 1 <= options.steps <= 1000:
        raise UserError(f"--steps must be 1 to 1000, not {options.steps}.")
    if not 1 <= options.guidance <= 20:
        raise UserError(f"--guidance must be 1 to 20, not {options.guidance:g}.")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed must be a whole number from 0 to 2^63 - 1, not {options.seed}.")
    if options.size is not None:
        if options.size % 16 or options.size < 64:
            near = max(64, round(options.size / 16) * 16)
            raise UserError(f"--size must be divisible by 16 and at least 64, not {options.size}: try {near}.")
        if resolve(options.model) == resolve("nano") and options.size > 256:
            raise UserError(
                f"nano draws up to 256 pixels, not {options.size}: give a smaller --size or another --model."
            )
    if options.output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"the output must end in .png or .jpg, not {options.output.name!r}.")
    folder = options.output.parent
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: make it first, or give another -o.")
    if not os.access(folder, os.W_OK) or options.output.is_dir():
        raise UserError(f"{options.output} cannot be written: give another -o.")


def generate(options: argparse.Namespace) -> None:
    import torch

    _validate(options)
    pipe = load(options.model)
    size = {} if options.size is None else {"width": options.size, "height": options.size}
    image = pipe(
        options.prompt,
        negative_prompt=options.negative,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
        max_sequence_length=prompt_length(pipe, options.prompt, options.negative),
        **size,
    ).images[0]
    part = options.output.with_suffix(f".part{options.output.suffix}")
    try:
        image.save(part)
        os.replace(part, options.output)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(f"{options.output} could not be written ({reason}): give another -o.") from error
    print(options.output)


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
