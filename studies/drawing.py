"""Studies of how nano draws: which encoders it needs, steps and shift, where words look, when things are decided."""

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence

import torch
from PIL import Image

from sd3kit.explore.encoding import without
from sd3kit.lesson import attention
from sd3kit.loading.pipeline import load
from sd3kit.recipe import scenes
from sd3kit.recipe.evaluate import ask, judge_scene, pictures, tally
from sd3kit.recipe.judge import Judge, subject_mask
from sd3kit.study import overlap

from .store import Study, mean

LENGTH = 40  # tokens for the T5
ENCODERS = {"CLIP 1": "1", "CLIP 2": "2", "T5": "3"}
SUBSETS = ["".join(part) for n in (3, 2, 1, 0) for part in itertools.combinations("123", n)]


@functools.cache
def tools() -> tuple:
    """nano's pipeline and its judge, loaded once."""
    pipe = load("nano", quiet=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe, Judge()


def draw(pipe, encoded: tuple[torch.Tensor, ...], seeds: Sequence[int], **settings) -> list[Image.Image]:
    """A picture for each of the encoded prompts, given as `encode_prompt` returns them."""
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(**dict(zip(names, encoded, strict=True)), generator=generator, **settings).images


def draw_encoded(pipe, prompts: Sequence[str], encoders: str = "123", batch: int = 20, **settings) -> list[Image.Image]:
    """A picture for each prompt (seeds from 0) with some of the encoders; the unconditional side keeps all of them."""
    made: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        embeds, empty, pooled, empty_pooled = pipe.encode_prompt(part, None, None, max_sequence_length=LENGTH)
        embeds, pooled = without(pipe, embeds, pooled, encoders)
        made += draw(pipe, (embeds, empty, pooled, empty_pooled), range(start, start + len(part)), **settings)
    return made


def encoders(row: dict, count: int = 40) -> dict:
    """Adherence with a subset of the encoders: single subjects (half of them held out), and signs."""
    pipe, judge = tools()
    asked = [
        scene
        for kind, n in (("single", count), ("sign", count // 2))
        for out in (False, True)
        for scene in ask(kind, n // 2, judge.subjects, out, 11)
    ]
    drawn = draw_encoded(pipe, [scenes.caption(scene) for scene in asked], row["encoders"])
    found = tally(judge, drawn[:count], asked[:count])
    return found | {"text": tally(judge, drawn[count:], asked[count:])["text"]}


def drawn_right(count: int, pipe=None, **settings) -> dict:
    """Adherence of single subjects, and the distance to the art that was asked for: its mean, and of each picture.

    The prompts and seeds are the same whatever the settings, so that rows can be compared picture by picture.
    `pipe` is nano's where none is given.
    """
    own, judge = tools()
    pipe = pipe or own
    asked = ask("single", count, judge.subjects, False, 12)
    drawn = pictures(pipe, [scenes.caption(scene) for scene in asked], **settings)
    far = [
        # where nothing is seen, half the range
        round(min(judge.distance(image, scene.subjects[0].name, scene.style), 128.0), 2)
        for image, scene in zip(drawn, asked, strict=True)
    ]
    return tally(judge, drawn, asked) | {"distance": mean(far), "each": far}


def steps(row: dict, count: int = 30) -> dict:
    """Adherence and distance by shift, number of steps and size."""
    pipe, _ = tools()
    shift = pipe.scheduler.config.shift
    pipe.scheduler.set_shift(row["shift"])
    try:
        return drawn_right(count, num_inference_steps=row["steps"], width=row["side"], height=row["side"])
    finally:
        pipe.scheduler.set_shift(shift)


def guidance(row: dict, count: int = 40) -> dict:
    """Adherence and distance by guidance scale."""
    return drawn_right(count, guidance_scale=row["guidance scale"])


def switch_prompts(pipe, first: list[str], second: list[str], after: int) -> list[Image.Image]:
    """Draw the first prompts for so many steps, then go on with the second."""
    one = pipe.encode_prompt(first, None, None, max_sequence_length=LENGTH)
    two = pipe.encode_prompt(second, None, None, max_sequence_length=LENGTH)

    def change(pipe, step, timestep, values):
        if step + 1 == after:
            values["prompt_embeds"] = torch.cat([two[1], two[0]])
            values["pooled_prompt_embeds"] = torch.cat([two[3], two[2]])
        return values

    names = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    extra = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    return draw(pipe, two if after == 0 else one, range(len(first)), **extra)


def decided(row: dict, count: int = 20) -> dict:
    """How much of a second prompt is drawn when it takes the first one's place after so many steps of 28."""
    pipe, judge = tools()
    rng, found = random.Random(13), {}
    for kind in ("single", "sign"):
        # signs of one line, so that the second word takes the same cells
        firsts = [s for s in ask(kind, 4 * count, judge.subjects, False, 13) if " " not in s.text][:count]
        seconds = []
        for scene in firsts:
            word = rng.choice([w for w in scenes.WORDS if w != scene.text and len(w) == len(scene.text)] or ["open"])
            changed = {
                "subjects": (rng.choice([s for s in judge.subjects if s not in scene.subjects]),),
                "style": rng.choice([s for s in scenes.STYLES if s != scene.style]),
                "colour": rng.choice([c for c in scenes.COLOURS if c != scene.colour]),
            }
            # of a sign only the word changes: whether its letters can still follow
            seconds.append(dataclasses.replace(scene, **({"text": word} if kind == "sign" else changed)))
        drawn = switch_prompts(pipe, *([scenes.caption(s) for s in part] for part in (firsts, seconds)), row["after"])
        answers = tally(judge, drawn, seconds)
        found |= answers if kind == "single" else {"text": answers["text"]}
    pipe.scheduler.set_timesteps(28)
    return found | {"sigma": float(pipe.scheduler.sigmas[row["after"]])}


@functools.cache
def looked_at(count: int) -> list[dict]:
    """So many pictures with the maps of their words, less those on which the judge does not find the subject."""
    pipe, judge = tools()
    kept = []
    for seed, scene in enumerate(ask("single", count, judge.subjects, False, 14)):
        asked_words = [scene.subjects[0].name, scene.colour, "background"]
        found = attention.maps(pipe, scenes.caption(scene), asked_words, seed=seed)
        if judge_scene(judge, found["image"], scene)["subject"]:
            kept.append(found | {"mask": subject_mask(found["image"])})
    return kept


def words(row: dict, count: int = 40) -> dict:
    """How well a word's map covers the subject, for the right word and for a wrong one of the same prompt."""
    scores = []
    for found in looked_at(count):
        heat = found["concept" if row["method"] == "ConceptAttention" else "raw"]
        heat = heat[0 if row["word"] == "the subject" else 2]
        # layers averaged; the raw map of one step in the middle, or the mean of all steps
        heat = heat[8].mean(0) if row["method"] == "raw, step 8" else heat.mean((0, 1))
        scores.append(overlap(heat, found["mask"]))
    return {"iou": mean(scores)}


STUDIES = {
    "encoders": Study("adherence with each subset of the text encoders", [{"encoders": s} for s in SUBSETS], encoders),
    "steps": Study(
        "shift by steps by size: adherence and distance to the art",
        [
            {"side": side, "shift": shift, "steps": n}
            for side in (128, 64, 192)
            for shift in (1.0, 2.0, 3.0, 4.5, 7.0)
            for n in ((4, 8, 14, 28) if side == 128 else (14,))
        ],
        steps,
    ),
    "guidance": Study(
        "guidance scale: adherence and distance to the art",
        [{"guidance scale": scale} for scale in (1.0, 2.0, 4.0, 7.0, 12.0, 20.0)],
        guidance,
    ),
    "decided": Study(
        "at which sigma background, style, subject and letters are decided",
        [{"after": n} for n in (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 17, 20, 24)],
        decided,
    ),
    "words": Study(
        "where words look: intersection over union with the true mask",
        [
            {"method": method, "word": word}
            for method in ("raw, step 8", "raw, mean of steps", "ConceptAttention")
            for word in ("the subject", "'background'")
        ],
        words,
    ),
}
