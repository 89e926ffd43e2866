"""Studies of lesson 07: what few steps cost, and what each way of distilling buys for the same number of steps."""

import functools
import random

import numpy as np
import torch
from peft import LoraConfig

from sd3kit.loading.pipeline import load
from sd3kit.recipe import scenes, turbo
from sd3kit.recipe.evaluate import ask, pictures, tally
from sd3kit.recipe.judge import Judge, subject_mask

from .drawing import drawn_right
from .store import Study, mean

PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")
ADAPTER = "../nano-turbo"  # beside nano's folder
LOOSE = ("a fox", "a house", "a car", "an owl", "a cactus")  # prompts that leave style and background open
WAYS = ("nothing", "guidance alone", "the teacher's path", "the student's own path")
STEPS = (("nano", 28, 7.0), ("nano", 4, 7.0), ("nano", 4, 1.0), *(("nano-turbo", n, 1.0) for n in (4, 2, 1)))


@functools.cache
def ready(model: str) -> tuple:
    """A model and the judge, loaded once."""
    pipe = load(model, quiet=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe, Judge()


def spread(pipe, seeds: int = 6, **settings) -> dict[str, dict]:
    """How much pictures of one loose prompt differ: places of the subject (pixels), and the pixels themselves (of 255).

    Each figure is the mean over the prompts of the deviation over the seeds.
    """
    places, levels = [], []
    for prompt in LOOSE:
        drawn = pictures(pipe, [prompt] * seeds, seed=50, **settings)
        centres = [np.argwhere(subject_mask(image)).mean(0) for image in drawn if subject_mask(image).any()]
        places.append(float(np.sqrt(np.var(centres, axis=0, ddof=1).sum())))
        levels.append(float(np.stack([np.asarray(image, np.float32) for image in drawn]).std(0, ddof=1).mean()))
    return {"place": mean(places), "pixels": mean(levels)}


def turbo_row(row: dict, count: int = 45) -> dict:
    """Adherence on held-out prompts of each kind, and the spread over seeds, at so many steps."""
    pipe, judge = ready(row["model"])
    own, settings, found = pipe.scheduler, dict(num_inference_steps=row["steps"], guidance_scale=row["guidance"]), {}
    pipe.scheduler = turbo.scheduler(pipe, row["steps"], pipe.scheduler.config.get("shift_terminal"))
    try:
        for kind, n in (("single", count), ("sign", count // 3), ("pair", count // 3), ("count", count // 3)):
            asked = ask(kind, n, judge.subjects, True, 15)
            drawn = pictures(pipe, [scenes.caption(scene) for scene in asked], **settings)
            right = tally(judge, drawn, asked)
            kept = right if kind == "single" else right.keys() & {"text", "sides", "count"}
            found |= {name: right[name] for name in kept}
        return found | spread(pipe, max(2, count // 10), **settings)
    finally:
        pipe.scheduler = own


def learn(pipe, way: str, steps: int = 80, batch: int = 6, rate: float = 2e-3, seed: int = 0) -> list[float]:
    """Distil a new adapter "way" into a pipeline, for four steps, in one of `WAYS`; gives the loss of each step."""
    model, judge, rng = pipe.transformer, Judge(), random.Random(seed)
    torch.manual_seed(seed)
    model.requires_grad_(False)
    config = LoraConfig(r=turbo.RANK, lora_alpha=turbo.RANK, target_modules=list(turbo.LAYERS))
    model.add_adapter(config, adapter_name="way")
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses, paths = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0), [], turbo.levels(pipe, 4, 2)
    for step in range(steps):
        if step % 4 == 0:
            asked = [scenes.caption(scenes.random_scene(rng, judge.subjects, "single")) for _ in range(batch)]
            with torch.no_grad():
                told = pipe.encode_prompt(asked, None, None, max_sequence_length=20)
            x = torch.randn(batch, 16, 16, 16, device=pipe.device)

        def guided(x, sigma, told=told):
            model.disable_adapters()
            both = torch.cat([told[1], told[0]]), torch.cat([told[3], told[2]])
            empty, caption = model(x.repeat(2, 1, 1, 1), *both, sigma.expand(2 * len(x)) * 1000).sample.chunk(2)
            model.enable_adapters()
            return torch.lerp(empty, caption, turbo.GUIDANCE)

        path = paths[step % 4].to(pipe.device)
        with torch.no_grad():
            if way == "guidance alone":  # the teacher's velocity here, and not where it leads
                wanted = guided(x, path[0])
                taught = x + (path[-1] - path[0]) * wanted
            else:
                taught = turbo.teach(guided, x, path)
                wanted = (taught - x) / (path[-1] - path[0])
        velocity = model(x, told[0], told[2], path[0].expand(batch) * 1000).sample
        loss = (velocity - wanted).square().mean() * (path[0] - path[-1])
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        own = (x + (path[-1] - path[0]) * velocity).detach()
        x = own if way == "the student's own path" else taught
        losses.append(loss.item())
    return losses


def way_row(row: dict, count: int = 40, **settings) -> dict:
    """Adherence and distance in four steps without guidance, after one way of distilling."""
    pipe = load("nano", quiet=True)
    losses = [] if row["way"] == "nothing" else learn(pipe, row["way"], **settings)
    pipe.scheduler = turbo.scheduler(pipe)
    found = drawn_right(count, pipe=pipe, num_inference_steps=4, guidance_scale=1.0)
    return {name: value for name, value in found.items() if name != "each"} | {"loss": losses[-1:]}


STUDIES = {
    "turbo": Study(
        "nano-turbo in few steps beside nano: held-out prompts of each kind, and the spread over seeds",
        [dict(zip(("model", "steps", "guidance"), row, strict=True)) for row in STEPS],
        turbo_row,
        (*PARTS, ADAPTER),
    ),
    "ways": Study(
        "ways of distilling for the same number of steps: adherence and distance in four steps without guidance",
        [{"way": way} for way in WAYS],
        way_row,
    ),
}
