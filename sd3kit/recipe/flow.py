"""The transformer of nano, trained as a rectified flow on what the text encoders say.

The loss is the paper's conditional flow matching: on the straight line x_sigma = (1 - sigma) x0 + sigma noise the
network predicts the velocity noise - x0. What makes it learn on two cores:

1. *Latents that are easy to learn*: see `autoencoder`; and *few patterns*: see `art.LARGE`.
2. *Muon* on the matrices of the blocks, AdamW elsewhere, also for the AdaLN modulation.
3. *Noise levels shifted towards 1*. A flat background is averaged over 256 places of the latent, so that its colour
   shows through the noise until sigma is close to 1: only the highest levels teach the word for it. A quarter of
   the levels are uniform, or the lowest, which draw the edges, would hardly be seen.
4. *Short text most of the time.* A caption has about fifteen tokens and the pipeline pads it to 77 + 256; training at
   full length all the time would cost three times as much, and a little of it at the end is enough.
5. *Letters that count*: see `LETTERS`. Without that weight, and with long words from the start, they were not heard.
6. *A guidance scale of 7 that fits*: see `damp`. On clean captions a guidance scale of 3 draws best, and at 7, the
   pipeline's default, flat art grows highlights and counts go wrong.
7. *Style that counts*: see `STYLE`. At a guidance scale of 3 the push takes held-out styles from 91% to 93%.
"""

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import scenes
from .art import Art, cells
from .pool import Pool, random_caption
from .text import CLIP_LENGTH, CLIP_WIDTHS, JOINT, Text
from .training import Average, Budget, cosine, fast_dtype, muon_in_float32, restore_parts, save_parts

SHIFT = 3.0  # of the noise levels in training
DROP = torch.tensor([0.15, 0.15, 0.15])  # how often each text encoder is left out (the paper: 46.3%)
LETTERS = 5.0  # the loss's weight under letters: they are a few places of a picture, and all that a sign means
EMPTY = 0.1  # how often the caption is empty, for guidance
SCALE = 7.0  # the pipeline's default guidance scale
BEST = 3.0  # the guidance scale that suits the trained model
STYLE = 2.0  # how far the damped copy goes away from the caption without its style


def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        attention_head_dim=64,
        num_attention_heads=3,
        joint_attention_dim=JOINT,
        caption_projection_dim=192,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of each batch: so many scenes of these kinds; a kind named twice comes twice as often."""

    kinds: tuple[str, ...]
    size: int


PARTS = (Part(("single",) * 4 + ("pair",) * 3 + ("count",), 24), Part(("sign",), 8))


def optimizers(
    model: SD3Transformer2DModel, rate: float, muon_rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of the blocks, but not of the modulation."""
    matrices = [
        module.weight
        for name, module in model.transformer_blocks.named_modules()
        if isinstance(module, torch.nn.Linear) and ".norm1" not in name
    ]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    for group in adamw.param_groups + muon.param_groups:
        group["initial_lr"] = group["lr"]
    return adamw, muon


def noise_levels(count: int) -> torch.Tensor:
    """Sigmas (count,) in 0..1: three in four logit-normal (0, 1) and shifted, the fourth uniform."""
    u = torch.sigmoid(torch.randn(count))
    return torch.where(torch.rand(count) < 0.75, SHIFT * u / (1 + (SHIFT - 1) * u), torch.rand(count))


def letter_weights(chosen: list[scenes.Scene]) -> torch.Tensor:
    """The weight of each place of the latents in the loss (N, 1, 16, 16): 1, and more under the letters of signs."""
    weights = torch.ones(len(chosen), 1, 8, 8)
    for i, scene in enumerate(chosen):
        for row, column in cells(scene.text):
            weights[i, 0, row, column] = LETTERS
    return weights.repeat_interleave(2, 2).repeat_interleave(2, 3)


def train(
    art: Art,
    vae: AutoencoderKL,
    text: Text,
    work: Path,
    minutes: float,
    subjects: int,
    *,
    start: SD3Transformer2DModel | None = None,
    device: str = "cpu",
) -> SD3Transformer2DModel:
    """Train for `minutes` on the first so many subjects.

    Continues from `work`/flow.pt where there is one: an interrupted run goes on, and with more minutes or subjects a
    finished one is widened. Where there is none it begins from `start`, a trained transformer, or from nothing. The
    autoencoder and the text encoders stay as they are.
    """
    model = transformer()
    if start is not None:
        model.load_state_dict(start.state_dict())

    def loss(x, sigma, say, velocity):
        return (predicted(model, x, sigma, say("caption")) - velocity).square()

    return learn(model, loss, art, vae, text, work / "flow.pt", minutes, subjects, device=device)


def damp(
    model: SD3Transformer2DModel,
    art: Art,
    vae: AutoencoderKL,
    text: Text,
    work: Path,
    minutes: float,
    subjects: int,
    *,
    device: str = "cpu",
) -> SD3Transformer2DModel:
    """Teach a copy of a trained model to draw at a guidance scale of 7 as the model does at 3, and truer in style.

    Guidance goes from the unconditional velocity u towards the captioned one c: u + s (c - u). The model is sampled at
    s = 3, and pushed away from what it says to the caption without its style, n, by STYLE (c - n): that is the copy's
    goal at s = 7. It learns, from the model and not from pictures, to say u as the model does, and for a caption to
    go a seventh of the way from u to the goal. The sampler takes 7 times the one and -6 times the other, and so it does
    with the copy's errors: what comes out at that scale is learnt as well. An interrupted run goes on, as `train`'s
    does. Guidance distillation (Meng et al., arXiv:2210.03142) goes the other way: it puts guidance into the captioned
    velocity. The push is compositional guidance (Liu et al., arXiv:2206.01714).
    """
    student = copy.deepcopy(model)
    teacher = model.to(device).requires_grad_(False)

    def loss(x, sigma, say, velocity):
        nothing, captions = say("empty"), say("caption")
        u, c, n = together(teacher, x, sigma, nothing, captions, say("caption without style"))
        goal = torch.lerp(u, c, BEST) + STYLE * (c - n)
        own_u, own_c = together(student, x, sigma, nothing, captions)
        guided = torch.lerp(own_u, own_c, SCALE) - goal
        return guided.square() + (own_c - torch.lerp(u, goal, 1 / SCALE)).square() + (own_u - u).square()

    mark = f"{sum(p.double().abs().sum().item() for p in teacher.parameters()):.6f}"  # another teacher, another copy
    return learn(
        student, loss, art, vae, text, work / f"damp.{mark}.pt", minutes, subjects, device=device,
        rate=5e-4, muon_rate=0.007, decay_from=0.0, full_from=0.9,
    )  # fmt: skip


def predicted(model: SD3Transformer2DModel, x: torch.Tensor, sigma: torch.Tensor, text: tuple) -> torch.Tensor:
    """The velocity (N, 16, h, w) that a model predicts at noise levels (N,) for text that `Text` encoded."""
    return model(x, *text, sigma * 1000, return_dict=False)[0].float()


def together(model: SD3Transformer2DModel, x: torch.Tensor, sigma: torch.Tensor, *texts: tuple) -> list[torch.Tensor]:
    """What `predicted` gives for each of several texts of one length, in one pass."""
    count = len(texts)
    joint = [torch.cat(parts) for parts in zip(*texts, strict=True)]
    return list(predicted(model, x.repeat(count, 1, 1, 1), sigma.repeat(count), joint).chunk(count))


def learn(
    model: SD3Transformer2DModel,
    loss: Callable,
    art: Art,
    vae: AutoencoderKL,
    text: Text,
    checkpoint: Path,
    minutes: float,
    subjects: int,
    *,
    device: str = "cpu",
    rate: float = 1.5e-3,
    muon_rate: float = 0.02,
    decay_from: float = 0.6,
    full_from: float = 0.98,
    seed: int = 0,
) -> SD3Transformer2DModel:
    """Let a model learn for `minutes` on noised pictures; its parameters' average comes back.

    `loss(x, sigma, say, velocity)` has noised latents (N, 16, h, w), their noise levels (N,), a function that encodes
    what is asked for ("caption", "caption without style" or "empty": a sequence and a pooled vector), and noise - x0;
    it returns the loss of each number of the latents (N, 16, h, w).
    """
    rng, dtype = random.Random(seed), fast_dtype(device)
    torch.manual_seed(seed)
    vae = vae.to(device).eval().requires_grad_(False)
    text, model = text.to(device), model.to(device)
    average, budget = Average(list(model.parameters()), 0.998), Budget(minutes, checkpoint.name.partition(".")[0])
    adamw, muon = optimizers(model, rate, muon_rate)
    kept = {"model": model, "average": average, "budget": budget, "adamw": adamw, "muon": muon}
    settings = [{k: v for k, v in group.items() if k != "params"} for group in adamw.param_groups + muon.param_groups]
    if restore_parts(kept, checkpoint):
        for group, given in zip(adamw.param_groups + muon.param_groups, settings, strict=True):
            group.update(given)  # this run's rates, not the stored ones
        rng.seed(budget.steps)
        torch.manual_seed(budget.steps)
    known = scenes.SUBJECTS[:subjects]
    pools = {part: Pool(art, vae, known, part.kinds, 8_000) for part in PARTS}
    for part, pool in pools.items():
        for _ in range(part.size):
            pool.renew(32, rng)

    def loss_of(part: Part, pool: Pool, full: bool) -> torch.Tensor:
        chosen, x0 = pool.sample(part.size, rng)
        prompts, unstyled = [], []
        for scene in chosen:
            empty, seed = rng.random() < EMPTY, rng.random()  # one seed: the same words
            prompts.append("" if empty else random_caption(scene, random.Random(seed)))
            unstyled.append("" if empty else random_caption(scene, random.Random(seed), styled=False))
        clip_length, t5_length = text.longest(prompts + unstyled)
        t5_length += rng.choice((0, 0, 4))
        if full:
            clip_length, t5_length = CLIP_LENGTH, rng.choice((t5_length, 77, 256))
        keep = (torch.rand(part.size, 3) >= DROP).float().to(device)
        noise, sigma = torch.randn_like(x0), noise_levels(part.size).to(device)
        s = sigma[:, None, None, None]
        x = (1 - s) * x0 + s * noise

        texts = {"caption": prompts, "caption without style": unstyled, "empty": [""] * part.size}

        @torch.no_grad()
        def say(what):
            kept = torch.ones_like(keep) if what == "empty" else keep
            return text(texts[what], clip_length, t5_length, kept)

        with torch.autocast(device, dtype, enabled=dtype != torch.float32), sdpa_kernel(SDPBackend.MATH):
            each = loss(x, sigma, say, noise - x0)
        return (letter_weights(chosen).to(device) * each).mean()

    smooth: dict[str, float] = {}
    total = sum(part.size for part in PARTS)
    for done in budget:
        factor = min(1.0, (budget.steps + 1) / 100) * cosine(done, decay_from, 0.02)
        for part, pool in pools.items():
            mean = loss_of(part, pool, done > full_from or rng.random() < 0.03)
            (mean * part.size / total).backward()
            name = part.kinds[0]
            smooth[name] = 0.98 * smooth.get(name, mean.item()) + 0.02 * mean.item()
            if budget.steps % 2 == 0:
                pool.renew(part.size // 4, rng)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (adamw, muon):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            with muon_in_float32(dtype == torch.float32):
                optimizer.step()
            optimizer.zero_grad()
        average.update()
        budget.notes = {name: f"{value:.4f}" for name, value in smooth.items()}
        if budget.steps % 100 == 99:
            save_parts(kept, checkpoint)
    save_parts(kept, checkpoint)
    average.swap()
    return model


def export(model: SD3Transformer2DModel, text: Text, vae: AutoencoderKL, folder: Path) -> None:
    """Save everything as a diffusers pipeline in fp16 safetensors; what is given stays as it is."""
    model, text, vae = (copy.deepcopy(module).to("cpu", torch.float16) for module in (model, text, vae))
    pipeline = StableDiffusion3Pipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=text.text_encoder,
        tokenizer=text.tokenizers[0],
        text_encoder_2=text.text_encoder_2,
        tokenizer_2=text.tokenizers[1],
        text_encoder_3=text.text_encoder_3,
        tokenizer_3=text.tokenizers[2],
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    load_as_float32(folder)
    for path in folder.glob("tokenizer*/tokenizer.json"):  # a third less without its spaces
        rows = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(rows, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def load_as_float32(folder: Path) -> None:
    """Let the text encoders load in float32, as the other parts do when nobody names a precision.

    transformers loads in the precision that a configuration names, which is that of the saved file. The plain call of
    the pipeline would then join float16 text with a float32 transformer, and raise.
    """
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        path = folder / part / "config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
