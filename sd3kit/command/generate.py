"""`sd3kit generate`: one picture of a prompt, or a folder of pictures, spread over processes and resumable.

The pictures are those of `explore.text_to_image`: a PNG holds its settings, `explore.from_png` brings them back.
"""

import argparse
import contextlib
import io
import json
from pathlib import Path

from .. import files
from ..errors import UserError
from ..loading.names import MODELS, NANO, TURBO, own_settings, resolve

SETTINGS = "settings.json"  # what the pictures of a folder share
MOST = 100_000  # pictures of one folder
LONGEST = 10_000  # characters of a prompt; the text encoders read some hundred


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
    parser.add_argument("-o", "--output", help="PNG or JPEG (sd3kit.png); for many pictures a folder (sd3kit-pictures)")
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder or a Hub id (SD3KIT_MODEL, or nano)")
    parser.add_argument("--negative", default="", metavar="PROMPT", help="what the picture should not show")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture (%(default)s)")
    parser.add_argument("--steps", type=int, help="1 to 1000 (what the model is made for: nano 28, nano-turbo 4)")
    parser.add_argument("--guidance", type=float, help="1 to 20; 1 is none (the model's own: nano 4, nano-turbo 1)")
    parser.add_argument("--size", type=int, help="pixels of each side, divisible by 16 (the model's own)")


def run(options: argparse.Namespace) -> None:
    """Draw what the options ask for, and print the path of the picture or the folder.

    Raises:
        UserError, LoadError: one sentence, before anything is drawn, or when a picture cannot be written.
    """
    prompts = _validate(options)
    try:
        if options.prompts is None and options.count == 1:
            _one(options, prompts[0])
        else:
            _many(options, prompts)
    except Exception as error:
        from ..loading.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise UserError(
            "the memory is full: give a smaller --size or --model; lesson 04 shows what else fits."
        ) from error


def _validate(options: argparse.Namespace) -> list[str]:
    """The prompts; whatever can be wrong is said before a model is loaded."""
    prompts = _prompts(options)
    for name, value in own_settings(options.model).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for text in (*prompts, options.negative):
        if len(text) > LONGEST:
            raise UserError(f"a prompt may have {LONGEST} characters, not {len(text)}: shorten {text[:40]!r}...")
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"the prompt {text[:80]!r} holds bytes that are no UTF-8 text: write it again.")
    for name, most in (("count", 10_000), ("steps", 1000), ("guidance", 20)):
        if not 1 <= getattr(options, name) <= most:
            raise UserError(f"--{name} must be 1 to {most}, not {getattr(options, name)}.")
    if len(prompts) * options.count > MOST:
        raise UserError(
            f"a folder may have {MOST} pictures, not {len(prompts) * options.count}: give a smaller --count."
        )
    if not 0 <= options.seed <= 2**63 - options.count:
        raise UserError(f"--seed must be a whole number from 0 to 2^63 - 1, not {options.seed}.")
    source = resolve(options.model)
    if options.size is not None:
        if options.size % 16 or options.size < 64:
            near = max(64, round(options.size / 16) * 16)
            raise UserError(f"--size must be divisible by 16 and at least 64, not {options.size}: try {near}.")
        if options.size > (most := _largest(source)):
            raise UserError(
                f"this model draws up to {most} pixels, not {options.size}: give a smaller --size or another --model."
            )
    if options.output == "":
        raise UserError("the name after -o is empty: give a file, or for many pictures a folder.")
    return prompts


def _largest(source: str) -> int:
    """The pixels of a side that a model has positions for, from its settings, before its weights are loaded."""
    from ..loading import hub, parts

    file = hub.file(source, str(NANO) if source == str(TURBO) else source, "transformer/config.json")
    return 16 * parts.read_json(file).get("pos_embed_max_size", 96)  # diffusers' own, where it is left out


def _prompts(options: argparse.Namespace) -> list[str]:
    if (options.prompt is None) == (options.prompts is None):
        raise UserError('give either a prompt, such as "a fox on a blue background", or --prompts FILE.')
    texts = [options.prompt]
    if options.prompts is not None:
        try:
            texts = [line.strip() for line in options.prompts.read_text(encoding="utf-8-sig").splitlines()]
        except OSError as error:
            raise UserError(f"{options.prompts} could not be read ({error.strerror}): check the path.") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{options.prompts} is not UTF-8 text: write a prompt on each line.") from error
    prompts = [text for text in texts if text.strip()]
    if not prompts:
        raise UserError('there is no prompt: say what to draw, such as "a fox on a blue background".')
    return prompts


def _settings(options: argparse.Namespace) -> dict:
    return {
        "negative_prompt": options.negative, "steps": options.steps, "guidance": options.guidance, "size": options.size
    }  # fmt: skip


def _one(options: argparse.Namespace, prompt: str) -> None:
    path = Path(options.output or "sd3kit.png")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"the output must end in .png or .jpg, not {path.name[-80:]!r}.")
    files.check_writable(path)
    from tqdm.auto import tqdm

    from ..loading.pipeline import load

    pipe = load(options.model)
    from ..explore import text_to_image  # after `load`, which imports diffusers in less time

    with tqdm(total=options.steps, desc="steps", unit="step") as bar:
        drawn = text_to_image(pipe, prompt, seed=options.seed, watch=lambda step: bar.update(1), **_settings(options))
    data = drawn.png()
    if path.suffix.lower() != ".png":
        jpeg = io.BytesIO()
        drawn.image.save(jpeg, "JPEG", quality=95)
        data = jpeg.getvalue()
    files.write_whole(path, data)
    print(path)


def _many(options: argparse.Namespace, prompts: list[str]) -> None:
    folder = Path(options.output or "sd3kit-pictures")
    if folder.suffix.lower() in (".png", ".jpg", ".jpeg"):
        raise UserError(f"many pictures go into a folder: give -o the name of one, not {folder.name[-80:]!r}.")
    with files.lock(folder):  # two commands never draw into one folder at once
        jobs = {
            f"{number:05d}-{seed}.png": {"prompt": prompt, "seed": seed}
            for number, prompt in enumerate(prompts, 1)
            for seed in range(options.seed, options.seed + options.count)
        }
        _draw_all(options, folder, jobs)


def _draw_all(options: argparse.Namespace, folder: Path, jobs: dict[str, dict]) -> None:
    from tqdm.auto import tqdm

    from ..explore import text_to_image
    from ..loading.device import processes
    from ..loading.pipeline import load

    shared = {"model": resolve(options.model), **_settings(options)}
    missing = _missing(folder, jobs, shared)
    state = processes()
    if state.is_main_process:
        for left in folder.glob(".sd3kit-*.part"):  # of a run that was killed
            left.unlink()
        files.write_whole(folder / SETTINGS, json.dumps(shared, indent=1) + "\n")
    state.wait_for_everyone()  # all have seen the same folder before anyone draws into it
    with state.split_between_processes(missing) as share:
        if share:
            pipe = load(options.model, device=str(state.device), quiet=not state.is_main_process)
        for name in tqdm(share, desc="pictures", unit="picture", disable=not state.is_main_process):
            files.write_whole(folder / name, text_to_image(pipe, **jobs[name], **_settings(options)).png())
    state.wait_for_everyone()
    if state.is_main_process:
        files.write_whole(folder / "metadata.jsonl", _table(folder))
        print(folder)
    if state.num_processes > 1:
        state.destroy_process_group()


def _missing(folder: Path, jobs: dict[str, dict], shared: dict) -> list[str]:
    """The pictures that a folder lacks.

    Raises:
        UserError: its pictures were drawn with other settings, so that it would hold a mixture, or are not known.
    """
    from ..explore import from_png
    from ..loading.parts import Damaged, read_json

    path, missing = folder / SETTINGS, []
    try:
        if path.exists():
            _same(path, shared, read_json(path))
        for name, job in jobs.items():
            path = folder / name
            if path.exists():  # it holds what it was drawn with, its size too where none is asked for
                known = {setting: value for setting, value in shared.items() if value is not None}
                _same(path, job | known, from_png(path) | {"model": shared["model"]})
            else:
                missing.append(name)
    except (OSError, ValueError, Damaged) as error:
        raise UserError(f"{path} was not written by sd3kit generate, or is damaged: give another -o.") from error
    return missing


def _same(path: Path, asked: dict, stored: dict) -> None:
    for name, value in asked.items():
        if stored.get(name) != value:
            raise UserError(
                f"{path} was drawn with {name.replace('_', ' ')} {stored.get(name)!r}, not {value!r}: give another -o."
            )


def _table(folder: Path) -> str:
    """The table of what `datasets` calls an image folder, from what each picture was drawn with."""
    from ..explore import from_png

    lines = []
    for path in sorted(folder.glob("*.png")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # somebody else's
            drawn = from_png(path)
            lines.append(json.dumps({"file_name": path.name, "text": drawn["prompt"], "seed": drawn["seed"]}) + "\n")
    return "".join(lines)
