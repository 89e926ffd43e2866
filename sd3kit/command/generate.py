"""`sd3kit generate`: one picture of a prompt, or a folder of pictures, spread over processes and resumable.

The pictures are those of `explore.text_to_image`: a PNG holds its settings, `explore.from_png` brings them back.
"""

import argparse
import errno
import io
import json
import os
from pathlib import Path

from ..errors import UserError
from ..loading.names import MODELS, resolve


def add_parser(commands) -> None:
    """Add `generate` to the command line's subparsers."""
    parser = commands.add_parser(
        "generate",
        help="draw a picture of a prompt, or many of a file of prompts",
        description="Draw a picture of a prompt. With --prompts or --count many are drawn, into a folder: the same "
        "command goes on where it was stopped, and under `accelerate launch -m sd3kit generate ...` each process "
        "draws its share.",
    )
    parser.add_argument("prompt", nargs="?", help='such as "a fox on a blue background"')
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line")
    parser.add_argument("--count", type=int, default=1, help="pictures of each prompt, seed after seed (%(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, help="PNG or JPEG (sd3kit.png); for many pictures a folder (sd3kit-pictures)"
    )
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder or a Hub id (SD3KIT_MODEL, or nano)")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="what the picture should not show")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture (%(default)s)")
    parser.add_argument("--steps", type=int, default=28, help="1 to 1000 (%(default)s)")
    parser.add_argument("--guidance", type=float, default=7.0, help="1 to 20; 1 is none (%(default)s)")
    parser.add_argument("--size", type=int, help="pixels of each side, divisible by 16 (the model's own)")


def run(options: argparse.Namespace) -> None:
    """Draw what the options ask for, and print the path of the picture or the folder.

    Raises:
        UserError, LoadError: one sentence, before anything is drawn, or when a picture cannot be written.
    """
    prompts = _validate(options)
    if options.prompts is None and options.count == 1:
        _one(options, prompts[0])
    else:
        _many(options, prompts)


def _validate(options: argparse.Namespace) -> list[str]:
    """The prompts; whatever can be wrong is said before a model is loaded."""
    prompts = _prompts(options)
    if not 1 <= options.count <= 10_000:
        raise UserError(f"--count must be 1 to 10000, not {options.count}.")
    if not 1 <= options.steps <= 1000:
        raise UserError(f"--steps must be 1 to 1000, not {options.steps}.")
    if not 1 <= options.guidance <= 20:
        raise UserError(f"--guidance must be 1 to 20, not {options.guidance:g}.")
    if not 0 <= options.seed <= 2**63 - options.count:
        raise UserError(f"--seed must be a whole number from 0 to 2^63 - 1, not {options.seed}.")
    if options.size is not None:
        if options.size % 16 or options.size < 64:
            near = max(64, round(options.size / 16) * 16)
            raise UserError(f"--size must be divisible by 16 and at least 64, not {options.size}: try {near}.")
        if resolve(options.model) == resolve("nano") and options.size > 256:
            raise UserError(
                f"nano draws up to 256 pixels, not {options.size}: give a smaller --size or another --model."
            )
    resolve(options.model)
    return prompts


def _prompts(options: argparse.Namespace) -> list[str]:
    if (options.prompt is None) == (options.prompts is None):
        raise UserError('give either a prompt, such as "a fox on a blue background", or --prompts FILE.')
    if options.prompts is None:
        if not options.prompt.strip():
            raise UserError('the prompt is empty: say what to draw, such as "a fox on a blue background".')
        return [options.prompt]
    try:
        text = options.prompts.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{options.prompts} could not be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{options.prompts} is not UTF-8 text: give a text file with a prompt on each line.") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"{options.prompts} holds no prompt: write one on each line.")
    return prompts


def _settings(options: argparse.Namespace) -> dict:
    return {
        "negative_prompt": options.negative, "steps": options.steps, "guidance": options.guidance, "size": options.size
    }  # fmt: skip


def _one(options: argparse.Namespace, prompt: str) -> None:
    from tqdm.auto import tqdm

    from ..explore import text_to_image
    from ..loading.pipeline import load

    path = options.output or Path("sd3kit.png")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"the output must end in .png or .jpg, not {path.name!r}.")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}: make it first, or give another -o.")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UserError(f"{path} cannot be written: give another -o.")
    pipe = load(options.model)
    with tqdm(total=options.steps, desc="steps", unit="step") as bar:
        drawn = text_to_image(pipe, prompt, seed=options.seed, watch=lambda step: bar.update(1), **_settings(options))
    data = drawn.png()
    if path.suffix.lower() != ".png":
        jpeg = io.BytesIO()
        drawn.image.save(jpeg, "JPEG", quality=95)
        data = jpeg.getvalue()
    _write(path, data)
    print(path)


def _many(options: argparse.Namespace, prompts: list[str]) -> None:
    from tqdm.auto import tqdm

    from ..explore import text_to_image
    from ..loading.device import processes
    from ..loading.pipeline import load

    folder = options.output or Path("sd3kit-pictures")
    if folder.is_file() or folder.suffix.lower() in (".png", ".jpg", ".jpeg"):
        raise UserError(f"many pictures go into a folder: give -o the name of one, not {folder.name!r}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} could not be made ({error.strerror}): give another -o.") from error
    jobs = {
        f"{number:05d}-{seed}.png": {"prompt": prompt, "seed": seed}
        for number, prompt in enumerate(prompts, 1)
        for seed in range(options.seed, options.seed + options.count)
    }
    state = processes()
    done = {name for name in jobs if (folder / name).exists()}
    for name in sorted(done):
        _same(folder / name, jobs[name] | _settings(options))
    missing = [(name, job) for name, job in jobs.items() if name not in done]
    state.wait_for_everyone()  # all have seen the same folder before anyone draws into it
    with state.split_between_processes(missing) as share:
        if share:
            pipe = load(options.model, device=str(state.device), quiet=not state.is_main_process)
        for name, job in tqdm(share, desc="pictures", unit="picture", disable=not state.is_main_process):
            _write(folder / name, text_to_image(pipe, **job, **_settings(options)).png())
    state.wait_for_everyone()
    if state.is_main_process:
        # the layout that `datasets` calls an image folder
        rows = [{"file_name": name, "text": job["prompt"], "seed": job["seed"]} for name, job in jobs.items()]
        _write(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        print(folder)
    if state.num_processes > 1:
        state.destroy_process_group()


def _same(path: Path, asked: dict) -> None:
    """Refuse a folder whose pictures were drawn with other settings: it would hold a mixture."""
    from ..explore import from_png

    try:
        stored = from_png(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} was not drawn by sd3kit generate: give another -o.") from error
    for name, value in asked.items():
        if value is not None and stored.get(name) != value:
            raise UserError(
                f"{path} was drawn with {name.replace('_', ' ')} {stored.get(name)!r}, not {value!r}: give another -o."
            )


def _write(path: Path, data: bytes) -> None:
    """A file that appears whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(f"{path} could not be written ({reason}): free space, or give another -o.") from error
