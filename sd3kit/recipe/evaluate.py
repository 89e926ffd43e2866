"""How good nano is, measured: prompts it was trained on and prompts it never saw, judged by `judge`."""

import random
import statistics
import time
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .. import records
from ..lesson import show
from . import scenes
from .art import CELL, SIZE, Art, draw, to_tensor
from .judge import LEFT, RIGHT, WHOLE, Box, Judge

CARD_START, CARD_END = "<!-- figures -->", "<!-- end of figures -->"
KINDS = ("single", "sign", "pair", "split", "count")
SCALES = (1.0, 2.0, 3.0, 4.5, 7.0, 10.0)  # of guidance
ANNOUNCEMENT = "A cat holding a sign that says hello world"
SHOWCASE = (
    ANNOUNCEMENT,
    "a fox on a blue background, 3d",
    "a rocket on a yellow background, flat",
    "a panda on a red background, noto",
    "a sunflower on a teal background, 3d",
    "an octopus on a purple background, flat",
    "a penguin holding a sign that says open",
    "a robot with a sign that says hi on a pink background, 3d",
    "a frog next to a mushroom on a white background, flat",
    "a dog and a pizza on a gray background, 3d",
    "three strawberries on a white background, noto",
    "four butterflies on a green background, flat",
)


def above_sign(scene: scenes.Scene) -> Box:
    """The part of a sign's picture that its subject has to itself."""
    return (0, 0, SIZE, (7 - len(scene.text.split())) * CELL - 4)


def judge_scene(judge: Judge, image: Image.Image, scene: scenes.Scene) -> dict[str, bool]:
    """What the picture got right of the scene, one answer for each thing that was asked."""
    if scene.kind == "split":
        seen = [(judge.background(image, box), judge.subject(image, box)) for box in (LEFT, RIGHT)]
        answers = {
            "background": [colour for colour, _ in seen] == [scene.colour, scene.other],
            "sides": [found and found[0] for _, found in seen] == [s.name for s in scene.subjects],
        }
        return answers | {"colours bound": all(answers.values())}
    answers = {"background": judge.background(image) == scene.colour}
    if scene.kind in ("single", "sign"):
        found = judge.subject(image, WHOLE if scene.kind == "single" else above_sign(scene))
        answers["subject"] = found is not None and found[0] == scene.subjects[0].name
        answers["style"] = found is not None and found[1] == scene.style
    if scene.kind == "sign":
        answers["text"] = judge.text(image) == scene.text
    elif scene.kind == "pair":
        found = [judge.subject(image, box) for box in (LEFT, RIGHT)]
        answers["sides"] = [f and f[0] for f in found] == [s.name for s in scene.subjects]
    elif scene.kind == "count":
        names = judge.names(image, scene.count)
        answers["count"] = judge.count(image) == scene.count and set(names) == {scene.subjects[0].name}
    return answers


def tally(judge: Judge, pictures: Iterable[Image.Image], asked: Iterable[scenes.Scene]) -> dict[str, dict]:
    """The share of right answers for each thing asked, with intervals."""
    answers: dict[str, list[bool]] = {}
    for image, scene in zip(pictures, asked, strict=True):
        for name, right in judge_scene(judge, image, scene).items():
            answers.setdefault(name, []).append(right)
    return {name: records.share(given) for name, given in answers.items()}


def distances(judge: Judge, pictures: Iterable[Image.Image], asked: Iterable[scenes.Scene]) -> dict[str, float]:
    """The median and the 90th percentile of the distance (of 255) to the art that was asked for; single subjects."""
    found = [
        judge.distance(image, scene.subjects[0].name, scene.style) for image, scene in zip(pictures, asked, strict=True)
    ]
    return {"median": float(np.median(found)), "90th percentile": float(np.quantile(found, 0.9)), "n": len(found)}


def pictures(pipe, prompts: list[str], *, seed: int = 0, batch: int = 25, **kwargs) -> list[Image.Image]:
    """One picture a prompt, seeds counted up from `seed`; T5 at 40 tokens unless told otherwise."""
    made: list[Image.Image] = []
    kwargs.setdefault("max_sequence_length", 40)
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(prompts), batch), desc="drawing", unit="batch"):
        part = prompts[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        made += pipe(part, generator=generators, **kwargs).images
    return made


def edit_distance(a: str, b: str) -> int:
    """How many letters must be added, dropped or changed to make one text of the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def ask(kind: str, count: int, subjects: list[scenes.Subject], held_out: bool, seed: int) -> list[scenes.Scene]:
    """Scenes to ask for; signs carry words of the list, not random letters."""
    rng = random.Random(f"{kind}{held_out}{seed}")
    return [scenes.random_scene(rng, subjects, kind, held_out=held_out, spell=0.0) for _ in range(count)]


def floors(judge: Judge, art: Art, vae, count: int) -> dict[str, dict]:
    """The judge's own score on real renders, on the autoencoder's copies of them, and on shuffled prompts."""
    from .autoencoder import copied, psnr

    rng, record = random.Random(5), {}
    for kind in KINDS:
        asked = ask(kind, count, judge.subjects, False, 5)
        arrays = [draw(scene, art, rng) for scene in asked]
        tensors = to_tensor(arrays)
        real = [Image.fromarray(a.round().astype(np.uint8)) for a in arrays]
        copies = [show.to_image(x) for x in copied(vae, tensors)]
        record[kind] = {
            "real renders": tally(judge, real, asked),
            "autoencoder's copies": tally(judge, copies, asked),
            "shuffled prompts": tally(judge, real, asked[1:] + asked[:1]),
            "psnr": float(psnr(vae, tensors).mean()),
        }
        if kind == "single":
            record["distance"] = {
                "real renders": distances(judge, real, asked), "autoencoder's copies": distances(judge, copies, asked)
            }  # fmt: skip
    return record


def evaluate(pipe, judge: Judge, *, count: int = 300, art: Art | None = None, **kwargs) -> dict:
    """All figures as one record. `art` adds the floors, which need the real renders."""
    record: dict = {"subjects": len(judge.subjects), "figures": {}}
    for kind in KINDS:
        for held_out in (False, True):
            asked = ask(kind, count if kind == "single" else max(2, count // 3), judge.subjects, held_out, 0)
            drawn = pictures(pipe, [scenes.caption(scene) for scene in asked], **kwargs)
            if kind == "single" and held_out:
                record["distance"] = distances(judge, drawn, asked)
            record["figures"][f"{kind}, {'held out' if held_out else 'seen'}"] = tally(judge, drawn, asked)
    twenty = pictures(pipe, [ANNOUNCEMENT] * 20, **kwargs)
    near = [edit_distance(judge.text(image), "hello world") <= 2 for image in twenty]
    record["announcement"] = records.share(near)
    asked = ask("single", max(2, count // 2), judge.subjects, True, 0)
    record["guidance"] = {}
    for scale in SCALES:
        drawn = pictures(pipe, [scenes.caption(scene) for scene in asked], **kwargs | {"guidance_scale": scale})
        right = [all(judge_scene(judge, *pair).values()) for pair in zip(drawn, asked, strict=True)]
        record["guidance"][f"{scale:g}"] = records.share(right)
    record["seconds a picture"] = {"sd3kit": seconds(pipe, 40), "diffusers' defaults": seconds(pipe, 256)}
    if art is not None:
        from .autoencoder import psnr, random_picture

        record["floors"] = floors(judge, art, pipe.vae, max(2, count // 3))
        rng = random.Random(6)
        record["psnr"] = float(psnr(pipe.vae, to_tensor([random_picture(art, rng) for _ in range(count)])).mean())
    return record


def seconds(pipe, length: int, calls: int = 5, **kwargs) -> float:
    """The median time of one picture, 28 guided steps, by that T5 length, after one call to warm up."""
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        pipe("a fox on a blue background, flat", max_sequence_length=length, **kwargs)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[1:]), 3)


def rows(record: dict) -> list[tuple[str, str, str]]:
    """The record as rows: what was asked, the figure, its interval or nothing."""

    def of(title: str, figures: dict) -> list[tuple[str, str, str]]:
        return [
            (f"{title}: {name}", f"{f['share']:.1%}", f"{f['low']:.1%} to {f['high']:.1%}, n = {f['n']}")
            for name, f in figures.items()
        ]

    found = []
    for title, figures in record["figures"].items():
        found += of(title, figures)
    found += of("the announcement's prompt, within two letters", {"text": record["announcement"]})
    found += of("single, held out, all of it right, by guidance scale", record.get("guidance", {}))
    floors_of = dict(record.get("floors", {}))
    drawn = {"drawn, held out": record["distance"]} if "distance" in record else {}  # older records have none
    distance = drawn | floors_of.pop("distance", {})
    for title, figures in distance.items():
        spread = f"90th percentile {figures['90th percentile']:.1f}, n = {figures['n']}"
        found.append((f"single, {title}: median distance to the art, in levels", f"{figures['median']:.1f}", spread))
    for kind, floors in floors_of.items():
        for title in ("real renders", "autoencoder's copies", "shuffled prompts"):
            found += of(f"{kind}, {title}", floors[title])
        found.append((f"{kind}: PSNR of the autoencoder", f"{floors['psnr']:.2f} dB", ""))
    if "psnr" in record:
        found.append(("all the art: PSNR of the autoencoder", f"{record['psnr']:.2f} dB", ""))
    found += [(f"seconds a picture, {name}", f"{value:.2f}", "") for name, value in record["seconds a picture"].items()]
    return found


def table(record: dict) -> str:
    """The record for the terminal."""
    lines = [f"{record['subjects']} subjects; share right, with its 95% interval"]
    return "\n".join(lines + [f"{what:<74}{figure:>9}  {interval}" for what, figure, interval in rows(record)])


def markdown(record: dict) -> str:
    """The record for the model card."""
    head = f"{record['subjects']} subjects. `{record['command']}`, {record['date']}, {record['device']}, "
    head += f"{record['cores']} cores, " + ", ".join(f"{k} {v}" for k, v in record["versions"].items() if k != "sd3kit")
    lines = [head + ".", "", "| figure | value | 95% interval |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows(record)])


def showcase(pipe) -> show.Picture:
    """The README's picture: twelve prompts, seed 0 each, none picked, at the model's own guidance scale."""
    images = [pictures(pipe, [prompt], guidance_scale=pipe.own_settings["guidance"])[0] for prompt in SHOWCASE]
    return show.grid(images, labels=SHOWCASE, columns=6, side=144, title="Drawn by nano, seed 0 each, none picked")


def best_median_worst(pipe, judge: Judge, count: int = 150, each: int = 8) -> show.Picture:
    """Held-out single subjects, by the distance to the art that was asked for: a row each of best, median and worst."""
    asked = ask("single", count, judge.subjects, True, 7)
    scale = pipe.own_settings["guidance"]
    drawn = pictures(pipe, [scenes.caption(scene) for scene in asked], seed=1000, guidance_scale=scale)
    order = sorted(range(count), key=lambda i: judge.distance(drawn[i], asked[i].subjects[0].name, asked[i].style))
    middle = (count - each) // 2
    chosen = order[:each] + order[middle : middle + each] + order[-each:]
    return show.grid(
        [drawn[i] for i in chosen],
        labels=[scenes.caption(asked[i]) for i in chosen],
        columns=each,
        side=128,
        title=f"Best (top), median and worst (bottom) of {count} held-out prompts, by distance to the art asked for",
    )
