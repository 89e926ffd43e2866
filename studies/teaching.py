"""The study of lesson 06: what DreamBooth on nano teaches, and what it spoils, under one change at a time."""

import functools
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image

from sd3kit.dreambooth import subject
from sd3kit.dreambooth.model import ATTENTION
from sd3kit.loading.device import environment_alone
from sd3kit.loading.pipeline import load
from sd3kit.recipe.evaluate import pictures
from sd3kit.records import mean, share

from .drawing import tools
from .store import Study

BASE = dict(
    pretrained_model_name_or_path="nano",
    instance_prompt="a sks robot",
    caption_column="text",
    resolution=128,
    max_sequence_length=20,
    train_batch_size=5,
    max_train_steps=100,
    learning_rate=4e-3,
    lr_scheduler="cosine",
    lr_warmup_steps=5,
    rank=16,
    lora_layers=",".join([*ATTENTION, "ff.net.0.proj", "ff.net.2"]),
    cache_latents=True,
    report_to="none",
)
DRAWING = dict(num_inference_steps=14, max_sequence_length=BASE["max_sequence_length"])  # as it was trained
FULL = dict(full_finetuning=True, lora_layers=None, learning_rate=1e-3)
UNTAUGHT = dict(max_train_steps=None)
PRIOR = dict(with_prior_preservation=True, class_prompt="a robot", num_class_images=10, sample_batch_size=10)
# One change to BASE each; a caption that does not belong to its picture is made in the folder, see `_pictures`.
CHANGES: dict[str, dict] = {
    "before": UNTAUGHT,
    "base": {},
    "rank 2": {"rank": 2},
    "rank 64": {"rank": 64},
    "attention alone": {"lora_layers": None},
    "30 steps": {"max_train_steps": 30},
    "300 steps": {"max_train_steps": 300},
    "rate 1e-3": {"learning_rate": 1e-3},
    "rate 1.6e-2": {"learning_rate": 1.6e-2},
    "prior preservation": PRIOR,
    "in full": FULL,
    "in full, guidance 3": FULL,
    "before, guidance 3": UNTAUGHT,  # the control of the row above
    "captions shuffled": {},
    "sigma squared in the loss": {"precondition_outputs": 1},
}
GUIDANCE = {"in full, guidance 3": 3.0, "before, guidance 3": 3.0}  # what is drawn otherwise than at 7
COLOURS = ("blue", "red", "purple", "orange", "brown", "black")  # none of them in the five pictures
OTHERS = ("robot", "fox", "panda", "rocket", "mushroom", "star")


def prompts(count: int) -> tuple[list[str], list[str]]:
    """So many prompts of the new subject on new backgrounds, and as many of other subjects."""
    new = [f"a sks robot on a {COLOURS[i % 6]} background" for i in range(count)]
    others = [f"a {OTHERS[i % 6]} on a {COLOURS[(i + i // 6) % 6]} background, flat" for i in range(count)]
    return new, others


@functools.cache
def before(count: int, scale: float) -> list[np.ndarray]:
    """The other subjects as nano draws them untaught, at this guidance scale."""
    drawn = pictures(tools()[0], prompts(count)[1], guidance_scale=scale, **DRAWING)
    return [np.asarray(image, np.float32) for image in drawn]


def taught(change: str, seed: int, folder: Path, **more):
    """The pipeline after a training with one change (or a drawing with one); its result is written to `folder`/out.

    nano itself is not changed: a LoRA is loaded into a pipeline of its own.
    """
    options = BASE | CHANGES[change] | more
    if options["max_train_steps"] is None:
        return load("nano", quiet=True)
    options |= dict(
        instance_data_dir=_pictures(folder, shuffled=change == "captions shuffled", seed=seed),
        class_data_dir=folder / "class",
        output_dir=folder / "out",
        checkpointing_steps=10_000,
        seed=seed,
    )
    words = [f"--{k}" if v is True else f"--{k}={v}" for k, v in options.items() if v is not None]
    command = [sys.executable, "-m", "sd3kit.dreambooth", *words]
    done = subprocess.run(command, env=environment_alone(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    if options.get("full_finetuning"):
        return load(folder / "out", quiet=True)
    pipe = load("nano", quiet=True)
    pipe.load_lora_weights(folder / "out", weight_name=LORA_WEIGHT_NAME_SAFE)  # named, or it is looked for on the Hub
    return pipe


def _pictures(folder: Path, shuffled: bool, seed: int) -> Path:
    """A copy of the five pictures; `shuffled` gives each picture the caption of another."""
    copy = folder / "pictures"
    shutil.copytree(subject.PICTURES, copy)
    if shuffled:
        table = copy / "metadata.jsonl"
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
        order = list(range(len(rows)))
        random.Random(seed).shuffle(order)
        # a cycle, so that no picture keeps its own
        for i, j in zip(order, order[1:] + order[:1], strict=True):
            rows[i] = rows[i] | {"caption": rows[j]["text"]}
        lines = [json.dumps({"file_name": row["file_name"], "text": row["caption"]}) + "\n" for row in rows]
        table.write_text("".join(lines), encoding="utf-8")
    return copy


def dreambooth(row: dict, count: int = 18, **more) -> dict:
    """What was learnt (our robot, on the background asked for) and what was lost (other subjects), by nano's judge."""
    judge = subject.judge()
    with tempfile.TemporaryDirectory() as folder:
        pipe = taught(row["change"], row["seed"], Path(folder), **more)
    new, others = prompts(count)
    scale = GUIDANCE.get(row["change"], 7.0)
    drawn, rest = (pictures(pipe, asked, guidance_scale=scale, **DRAWING) for asked in (new, others))
    kept = [judge.subject(image) for image in rest]
    return {
        "our robot": share([subject.is_robot(judge, image) for image in drawn]),
        "background": share(
            [f" {judge.background(image)} " in prompt for image, prompt in zip(drawn, new, strict=True)]
        ),
        "others kept": share([k is not None and k[0] in p.split() for k, p in zip(kept, others, strict=True)]),
        "others turned into it": share([subject.is_robot(judge, image) for image in rest]),
        "drift": mean([_change(a, b) for a, b in zip(rest, before(count, scale), strict=True)]),
    }


def _change(image: Image.Image, earlier: np.ndarray) -> float:
    """The mean absolute difference of two pictures, of 255."""
    return float(np.abs(np.asarray(image, np.float32) - earlier).mean())


STUDIES = {
    "dreambooth": Study(
        "what DreamBooth on nano teaches and spoils, one change at a time, 3 seeds",
        [{"change": change, "seed": 0} for change in CHANGES if CHANGES[change] == UNTAUGHT]
        + [{"change": change, "seed": s} for s in range(3) for change in CHANGES if CHANGES[change] != UNTAUGHT],
        dreambooth,
    )
}
