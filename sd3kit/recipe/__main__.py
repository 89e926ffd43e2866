"""The recipe on the command line: `train`, `polish` and `turbo` make models, for which `pack` carries the art to a
machine without a network; `evaluate` and `sheets` say and show how good one is."""

import argparse
import io
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, SD3Transformer2DModel

from .. import records
from ..errors import UserError, answer
from ..files import check_writable, write_whole
from ..loading.device import check_device, pick_device, use_threads
from ..loading.names import NANO, TURBO, resolve
from ..loading.pipeline import load
from . import autoencoder, digest, evaluate, flow, reading, scenes, turbo
from .art import Art, pack
from .checkpoints import whole_files
from .judge import TEMPLATES, judge_of, save_templates
from .text import Text

CARD = NANO / "README.md"
HERE = Path(__file__).parent
RECORD = HERE / "evaluation.json"


def parser() -> argparse.ArgumentParser:
    cache = Path.home() / ".cache" / "sd3kit" / "nano"
    device = picked if (picked := pick_device()).startswith("cuda") else "cpu"  # Apple's GPUs cannot
    top = argparse.ArgumentParser(prog="python -m sd3kit.recipe", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train", help="make nano from the sources; run again to go on: checkpoints are in --work"
    )
    train.add_argument("--work", type=Path, default=cache, help="keeps the sources and checkpoints (%(default)s)")
    own = "by default the package's own, which it replaces (%(default)s)"
    train.add_argument("--out", type=Path, default=NANO, help=f"the finished pipeline's folder; {own}")
    train.add_argument("--start", type=Path, help="a finished pipeline, whose transformer learns on, the rest stays")
    train.add_argument("--subjects", type=int, default=240, help="how many of the subjects (%(default)s)")
    train.add_argument("--vae-minutes", type=float, default=26, help="for the autoencoder (%(default)s)")
    train.add_argument("--text-minutes", type=float, default=15, help="for the text encoders (%(default)s)")
    train.add_argument("--flow-minutes", type=float, default=400, help="for the flow, all runs together (%(default)s)")
    train.add_argument("--device", default=device, help="cpu or cuda (%(default)s)")
    pack = commands.add_parser(
        "pack", help="write the art into a small folder, a --work for a machine without a network"
    )
    pack.add_argument("folder", type=Path, help="where it goes")
    pack.add_argument("--work", type=Path, default=cache, help="the folder of the sources (%(default)s)")
    polish = commands.add_parser(
        "polish", help="let the decoder learn to bear the flow's errors; run again to continue"
    )
    polish.add_argument("--work", type=Path, default=cache, help="keeps the sources and checkpoints (%(default)s)")
    polish.add_argument("--out", type=Path, default=NANO, help=f"the pipeline, whose decoder it replaces; {own}")
    polish.add_argument("--minutes", type=float, default=60, help="all runs together (%(default)s)")
    polish.add_argument("--device", default=device, help="cpu or cuda (%(default)s)")
    few = commands.add_parser("turbo", help="distil a LoRA that draws in four steps; run again to continue")
    few.add_argument("--work", type=Path, default=cache, help="keeps the checkpoints (%(default)s)")
    few.add_argument("--out", type=Path, default=TURBO, help=f"the LoRA's folder; {own}")
    few.add_argument("--model", default="nano", help="a folder with a pipeline (%(default)s)")
    few.add_argument("--guidance", type=float, default=turbo.GUIDANCE, help="the teacher's (%(default)s)")
    few.add_argument("--minutes", type=float, default=60, help="all runs together (%(default)s)")
    judge = commands.add_parser("evaluate", help="measure nano: each figure with its 95%% interval")
    judge.add_argument("--model", default="nano", help="a folder with a pipeline (%(default)s)")
    judge.add_argument("--count", type=int, default=300, help="single subjects seen and held out (%(default)s)")
    judge.add_argument("--work", type=Path, default=cache, help="the folder of the sources, for the floors")
    judge.add_argument("--no-floors", action="store_true", help="leave out what needs the art")
    judge.add_argument("--store", action="store_true", help="keep the record, and write it into the model card")
    sheets = commands.add_parser("sheets", help="draw the README's picture and the model card's contact sheet")
    sheets.add_argument("--model", default="nano", help="a folder with a pipeline (%(default)s)")
    sheets.add_argument("folder", type=Path, help="where the two PNG files go")
    return top


def main(arguments: list[str] | None = None) -> int:
    return answer(lambda: run(parser().parse_args(arguments)), "stopped; the same command goes on where it was saved.")


def run(options: argparse.Namespace) -> int:
    """Look at the options before hours of work, then do what they ask for. UserError: what is wrong with them."""
    # of three subjects no pair is held out, so that none could be asked for
    limits = {"subjects": (4, len(scenes.SUBJECTS)), "count": (1, 100_000), "guidance": (1, 20)}
    for name, value in vars(options).items():
        low, high = limits.get(name, (0.001, 1e6) if "minutes" in name else (None, None))
        if low is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} must be {low:g} to {high:g}, not {value:g}.")
        if name == "device":
            check_device(value, "--device")
        if name in ("work", "out", "folder") and options.command != "evaluate":
            check_writable(value, folder=True)
    if options.command == "pack":
        print(pack(options.work, options.folder))
        return 0
    commands = {"train": train, "polish": polish, "turbo": distil, "evaluate": judge, "sheets": sheets}
    return commands[options.command](options)


def train(options: argparse.Namespace) -> int:
    if options.start and not (options.start / "model_index.json").exists():
        raise UserError(f"--start: {options.start} is no pipeline's folder (no model_index.json there).")
    begun, parts = options.work / "flow.pt", [options.work / name for name in ("vae", "text.pt")]
    if begun.exists() and not options.start and not all(part.exists() for part in parts):
        raise UserError(f"{begun} began from other parts than are made now: give its --start, or another --work.")
    options.work.mkdir(parents=True, exist_ok=True)
    state = PartialState(
        cpu=options.device == "cpu"
    )  # of `accelerate launch` or torchrun; without them this is the only process
    if state.num_processes > 1 and not (options.start or (options.work / "text.pt").exists()):
        raise UserError("several processes share the training of the flow: make the rest with one first.")
    with state.main_process_first():
        art, transformer = Art(options.work), None
    if options.start:
        vae = AutoencoderKL.from_pretrained(options.start / "vae", use_safetensors=True).float()
        text = Text.from_pipeline(options.start)
        transformer = SD3Transformer2DModel.from_pretrained(options.start / "transformer", use_safetensors=True).float()
    else:
        if not (options.work / "vae").exists():
            autoencoder.train(art, options.work, options.vae_minutes, device=options.device)
        vae = AutoencoderKL.from_pretrained(options.work / "vae", use_safetensors=True)
        text = reading.train(art, vae, options.work, options.text_minutes, device=options.device)
    shared = (art, vae, text, options.work)
    model = flow.train(*shared, options.flow_minutes, options.subjects, start=transformer, device=options.device)
    if not state.is_main_process:
        return 0
    flow.export(model, text, vae, options.out)
    # nano's own folder holds a pipeline and its card
    beside = HERE if options.out.resolve() == NANO.resolve() else options.out
    save_templates(art, options.subjects, beside / TEMPLATES.name)
    held_out = "\n".join(scenes.held_out(scenes.SUBJECTS[: options.subjects]))
    write_whole(beside / scenes.HELD_OUT.name, held_out + "\n")
    return 0


def polish(options: argparse.Namespace) -> int:
    options.work.mkdir(parents=True, exist_ok=True)
    pipe = load(options.out.resolve(), device=options.device, dtype=torch.float32)  # a folder, never a name
    use_threads(small=False)  # for training; `load` chose for drawing
    subjects = len(judge_of(options.out.resolve()).subjects)
    vae = autoencoder.polish(pipe, subjects, Art(options.work), options.work, options.minutes)
    with whole_files(options.out) as part:
        vae.half().save_pretrained(part / "vae", safe_serialization=True)
        flow.tidy_configurations(part)
    return 0


def distil(options: argparse.Namespace) -> int:
    options.work.mkdir(parents=True, exist_ok=True)
    pipe, subjects = load(options.model), len(judge_of(options.model).subjects)
    use_threads(small=False)
    turbo.train(pipe, options.work, options.minutes, subjects=subjects, guidance=options.guidance)
    turbo.export(pipe, options.out)
    return 0


def judge(options: argparse.Namespace) -> int:
    if options.store and options.model != "nano":
        raise UserError("--store writes into nano's card: leave --model out.")
    if options.store:
        check_writable(RECORD)
        check_writable(CARD)
        card = CARD.read_text(encoding="utf-8")
        if not 0 <= card.find(evaluate.CARD_START) < card.find(evaluate.CARD_END):
            lines = f"{evaluate.CARD_START} and {evaluate.CARD_END}"
            raise UserError(f"{CARD} lacks the lines {lines}: put them in where the table goes.")
    pipe = load(options.model)
    art = None if options.no_floors else Art(options.work)
    record = {"weights": digest.of(resolve(options.model))}  # before hours in which a training may end
    record |= evaluate.evaluate(pipe, judge_of(options.model), count=options.count, art=art)
    command = f"python -m sd3kit.recipe evaluate --count {options.count}{' --no-floors' * options.no_floors}"
    record |= records.stamp(command)
    print(evaluate.table(record))
    if options.store:
        write_whole(RECORD, json.dumps(record, indent=1) + "\n")
        before, start, rest = CARD.read_text(encoding="utf-8").partition(evaluate.CARD_START)
        after = rest.partition(evaluate.CARD_END)[2]
        card = f"{before}{start}\n{evaluate.markdown(record)}\n{evaluate.CARD_END}{after}"
        write_whole(CARD, card)
    return 0


def sheets(options: argparse.Namespace) -> int:
    pipe = load(options.model)
    options.folder.mkdir(parents=True, exist_ok=True)
    drawn = {"nano": evaluate.showcase(pipe)}
    drawn["nano_held_out"] = evaluate.best_median_worst(pipe, judge_of(options.model))
    for name, sheet in drawn.items():
        sheet.image.save(stored := io.BytesIO(), "PNG", optimize=True)
        write_whole(options.folder / f"{name}.png", stored.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
