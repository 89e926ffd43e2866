"""Studies of how a small MMDiT learns: timestep samplers, faults of training scripts, QK-norm.

The model, its data and its loss are those of lesson 03: eight subjects on four backgrounds, 64 px, nano's autoencoder
and text encoders fixed. A run is a number of steps, not of seconds, and its random numbers are the processor's, so that
it gives the same on any machine.
"""

import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import compute_loss_weighting_for_sd3
from PIL import Image
from torch.nn.functional import mse_loss

from sd3kit.lesson import attention
from sd3kit.recipe import scenes
from sd3kit.recipe.judge import TEMPLATES

from .drawing import tools
from .store import Study

NAMES = ("apple", "star", "heart", "sun", "frog", "pizza", "panda", "tree")
COLOURS = ("red", "blue", "green", "yellow")
PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae:encoder")
STEPS, BATCH, RATE = 400, 32, 2e-3
Sampler = Callable[[int], torch.Tensor]


def lognorm(mean: float, deviation: float) -> Sampler:
    return lambda n: torch.sigmoid(mean + deviation * torch.randn(n))


def mode(scale: float) -> Sampler:
    def sample(n: int) -> torch.Tensor:
        u = torch.rand(n)
        return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    return sample


def cosmap(n: int) -> torch.Tensor:
    return 1 - 1 / (torch.tan(math.pi * torch.rand(n) / 2) + 1)


# The paper's section 3.1, with its average ranks over 24 runs of 61 formulations (table 1) where it gives one.
SAMPLERS: dict[str, Sampler] = {
    "uniform": torch.rand,
    "lognorm(0, 1)": lognorm(0.0, 1.0),
    "lognorm(0.5, 0.6)": lognorm(0.5, 0.6),
    "lognorm(1, 0.6)": lognorm(1.0, 0.6),
    "mode(1.29)": mode(1.29),
    "cosmap": cosmap,
}


FORGOTTEN = 0.0609 * 1.5305  # what SD3's latents are off by without the shift factor; nano's own is 0
FAULTS = (
    "none",
    "captions shuffled apart",
    "sigma squared hidden in x0",
    "density as a loss weight",
    "shift factor forgotten",
)


@functools.cache
def data() -> dict[str, torch.Tensor]:
    """The 32 pictures' `latents` (32, 16, 8, 8), their captions' T5 tokens `text` (32, 16, 192) and `pooled`."""
    pipe, _ = tools()
    sheet = Image.open(TEMPLATES).convert("RGBA")
    side, rows = sheet.width // 3, {subject.name: row for row, subject in enumerate(scenes.SUBJECTS)}
    pixels, captions = [], []
    for name in NAMES:
        box = (side, rows[name] * side, 2 * side, (rows[name] + 1) * side)
        icon = sheet.crop(box).resize((52, 52), Image.Resampling.BICUBIC)
        for colour in COLOURS:
            image = Image.new("RGBA", (64, 64), scenes.COLOURS[colour])
            image.alpha_composite(icon, (6, 6))
            pixels.append(np.asarray(image.convert("RGB"), np.float32))
            captions.append(f"{'an' if name[0] in 'aeiou' else 'a'} {name} on a {colour} background, flat")
    with torch.no_grad():
        x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
        latents = pipe.vae.encode(x.to(pipe.device)).latent_dist.mode() * pipe.vae.config.scaling_factor
        text, _, pooled, _ = pipe.encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=16
        )
    return {"latents": latents, "text": text[:, 77:], "pooled": pooled}


def model(qk_norm: str | None = "rms_norm") -> SD3Transformer2DModel:
    given = data()
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=given["text"].shape[-1], caption_projection_dim=128,
        pooled_projection_dim=given["pooled"].shape[-1], pos_embed_max_size=8, qk_norm=qk_norm,
    ).to(given["latents"].device)  # fmt: skip


def train(
    network: SD3Transformer2DModel,
    *,
    sampler: Sampler = SAMPLERS["lognorm(0, 1)"],
    fault: str = "none",
    rate: float = RATE,
    steps: int = STEPS,
) -> list[float]:
    """The training loop of lesson 03, with one of the faults of `FAULTS` where asked; returns the losses."""
    given = data()
    if fault == "density as a loss weight":
        sampler = SAMPLERS["uniform"]  # with the weight, the mean over many draws is cosmap's
    latents = given["latents"] + (FORGOTTEN if fault == "shift factor forgotten" else 0.0)
    optimizer, losses = torch.optim.AdamW(network.parameters(), rate, betas=(0.9, 0.95)), []
    for _ in range(steps):
        i = torch.randint(len(latents), (BATCH,))
        words = i[torch.randperm(BATCH)] if fault == "captions shuffled apart" else i
        x0 = latents[i]
        noise, sigma = torch.randn(x0.shape).to(x0), sampler(BATCH)[:, None, None, None].to(x0)
        x = (1 - sigma) * x0 + sigma * noise
        v = network(x, given["text"][words], given["pooled"][words], 1000 * sigma.flatten()).sample
        error = (v - (noise - x0)).square()
        if fault == "sigma squared hidden in x0":
            error = error * sigma.square()
        elif fault == "density as a loss weight":
            error = error * compute_loss_weighting_for_sd3("cosmap", sigma)
        loss = error.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def fixed_noise() -> torch.Tensor:
    """The same noise for each of the 32 latents, whatever the seed of a row."""
    latents = data()["latents"]
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents)


@torch.no_grad()
def distance(network: SD3Transformer2DModel, steps: int) -> float:
    """How far 32 drawn latents, one a caption, are from the 32 true ones: the root of the mean square; 0 is perfect."""
    given = data()
    x = fixed_noise()
    grid = torch.linspace(1, 0, steps + 1).to(x)
    for sigma, following in itertools.pairwise(grid):
        v = network(x, given["text"], given["pooled"], 1000 * sigma.expand(len(x))).sample
        x = x + (following - sigma) * v
    return mse_loss(x, given["latents"]).sqrt().item()


def seeded(row: dict, qk_norm: str | None = "rms_norm") -> SD3Transformer2DModel:
    """A new network from the row's seed; what it learns from is loaded before, since that may draw random numbers."""
    data()
    torch.manual_seed(row["seed"])
    return model(qk_norm)


def samplers(row: dict, steps: int = STEPS) -> dict:
    network = seeded(row)
    losses = train(network, sampler=SAMPLERS[row["sampler"]], steps=steps)
    return {"distance, 5 steps": distance(network, 5), "distance, 25 steps": distance(network, 25), "loss": losses[-1]}


def faults(row: dict, steps: int = STEPS) -> dict:
    network = seeded(row)
    losses = train(network, fault=row["fault"], steps=steps)
    return {"distance, 25 steps": distance(network, 25), "loss": float(np.mean(losses[-20:]))}


def qk_norm(row: dict, steps: int = 200) -> dict:
    """The largest attention logit, before the softmax, after training at a rate; and the last loss."""
    network = seeded(row, row["qk_norm"])
    losses = train(network, rate=row["rate"], steps=steps)
    given, noise = data(), fixed_noise()
    with torch.no_grad(), attention.opened(network, lambda logits, *_: logits.abs().max().item()) as processors:
        network((given["latents"] + noise) / 2, given["text"], given["pooled"], torch.full((32,), 500.0).to(noise))
        logits = [processor.kept for processor in processors]
    return {"largest logit": max(logits), "loss": float(np.mean(losses[-20:]))}


SEEDS = range(3)
STUDIES = {
    "samplers": Study(
        "the paper's timestep samplers on a small MMDiT, 3 seeds",
        [{"sampler": name, "seed": seed} for seed in SEEDS for name in SAMPLERS],
        samplers,
        PARTS,
    ),
    "faults": Study(
        "faults that training scripts had, beside the control",
        [{"fault": name, "seed": seed} for seed in SEEDS for name in FAULTS],
        faults,
        PARTS,
    ),
    "qk_norm": Study(
        "attention logits with and without QK-RMSNorm, by learning rate",
        [
            {"qk_norm": norm, "rate": rate, "seed": seed}
            for seed in SEEDS[:3]
            for norm in ("rms_norm", None)
            for rate in (1e-3, 4e-3, 1.6e-2)
        ],
        qk_norm,
        PARTS,
    ),
}
