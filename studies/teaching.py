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
from sd3kit.records import share

from .drawing import tools
from .store import Study, mean

BASE = dict(
    pretrained_model_name_or_path="nano",
    instance_prompt="a sks robot",
    caption_column="text",
    resolution=128,
    max_sequence_length=20,
    train_batch_size=8,
    max_train_steps=100,
    learning_rate=6e-3,
    lr_scheduler="cosine",
    lr_warmup_steps=5,
    rank=16,
    lora_layers=",".join([*ATTENTION, "ff.net.0.proj", "ff.net.2"]),
    cache_latents=True,
    report_to="none",
)
DRAWING = dict(num_inference_steps=10, max_sequence_length=BASE["max_sequence_length"])  # as it was trained
UNTAUGHT = dict(max_train_steps=None)
# One change to BASE each; a caption that does not belong to its picture is made in the folder, see `_pictures`.
CHANGES: dict[str, dict] = {
    "before": UNTAUGHT,
    "base": {},
    "a third of the steps": {"max_train_steps": BASE["max_train_steps"] // 3},
    "attention alone": {"lora_layers": None},
    "prior preservation": dict(
        with_prior_preservation=True,
        class_prompt="a robot",
        num_class_images=8,
        sample_batch_size=8,
        train_batch_size=4,
    ),
    "captions shuffled": {},
    "in full": dict(full_finetuning=True, lora_layers=None, learning_rate=1e-3),
}
SCALES = {"before": (1.0, 3.0, 7.0), "base": (1.0, 3.0, 7.0), "in full": (3.0, 7.0)}  # of guidance; 7 for the others
COLOURS = ("blue", "red", "purple", "orange", "brown", "black")  # none of them in the eight pictures
OTHERS = ("fox", "panda", "rocket", "mushroom", "star")


def prompts(count: int) -> dict[str, list[str]]:
    """Prompts of the new subject on new backgrounds, of other subjects, and half as many of the class without `sks`."""
    return {
        "new": [f"a sks robot on a {COLOURS[i % 6]} background" for i in range(count)],
        "others": [f"a {OTHERS[i % 5]} on a {COLOURS[i % 6]} background, flat" for i in range(count)],
        "class": [f"a robot on a {COLOURS[i % 6]} background, flat" for i in range(count // 2)],
    }


@functools.cache
def before(count: int, scale: float) -> list[np.ndarray]:
    """The other subjects as nano draws them untaught, at this guidance scale."""
    drawn = pictures(tools()[0], prompts(count)["others"], guidance_scale=scale, **DRAWING)
    return [np.asarray(image, np.float32) for image in drawn]


@functools.lru_cache(maxsize=1)  # the rows of one training stand together
def model(change: str, seed: int):
    """The pipeline that a change taught, of `taught`; its files are gone."""
    with tempfile.TemporaryDirectory() as folder:
        return taught(change, seed, Path(folder))


def taught(change: str, seed: int, folder: Path, **more):
    """The pipeline after a training with one change; its result is written to `folder`/out.

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
    """A copy of the eight pictures; `shuffled` gives each picture the caption of another."""
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


def dreambooth(row: dict, count: int = 12) -> dict:
    """What was learnt (our robot, on the background asked for) and what was lost (the class, others), by the judge."""
    judge, scale = subject.judge(), row["guidance"]
    pipe, asked = model(row["change"], row["seed"]), prompts(count)
    drawn = {name: pictures(pipe, some, guidance_scale=scale, **DRAWING) for name, some in asked.items()}
    kept = [judge.subject(image) for image in drawn["others"]]
    return {
        "our robot": share([subject.is_robot(judge, image) for image in drawn["new"]]),
        "background": share(
            [f" {judge.background(image)} " in words for image, words in zip(drawn["new"], asked["new"], strict=True)]
        ),
        "others kept": share([k is not None and k[0] in p.split() for k, p in zip(kept, asked["others"], strict=True)]),
        "robots turned into it": share([subject.is_robot(judge, image) for image in drawn["class"]]),
        "drift": mean([_change(a, b) for a, b in zip(drawn["others"], before(count, scale), strict=True)]),
    }


def _change(image: Image.Image, earlier: np.ndarray) -> float:
    """The mean absolute difference of two pictures, of 255."""
    return float(np.abs(np.asarray(image, np.float32) - earlier).mean())


SEEDS = {"base": (0, 1)}  # of the trainings; one for the others
STUDIES = {
    "dreambooth": Study(
        "what DreamBooth on nano teaches and spoils, one change at a time",
        [
            {"change": change, "seed": seed, "guidance": scale}
            for change in CHANGES
            for seed in SEEDS.get(change, (0,))
            for scale in (SCALES.get(change, (7.0,)) if seed == 0 else (7.0,))
        ],
        dreambooth,
    )
}
