"""The transformer of nano and its text encoders, trained together as a rectified flow.

The loss is the paper's conditional flow matching: on the straight line x_sigma = (1 - sigma) x0 + sigma noise the
network predicts the velocity noise - x0. What makes it learn on two cores:

1. *Latents that are easy to learn*: see `autoencoder`.
2. *Muon* on the matrices of the blocks, AdamW elsewhere, also for the AdaLN modulation.
3. *Noise levels shifted towards 1*. A flat background is averaged over 256 places of the latent, so that its colour
   shows through the noise until sigma is close to 1: only the highest levels teach the word for it.
4. *Short text most of the time.* A caption has about twelve tokens and the pipeline pads it to 77 + 256; training at
   full length all the time would cost three times as much, and a little of it at the end is enough.
"""

import copy
import dataclasses
import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import scenes
from .art import Art, draw, to_tensor
from .autoencoder import NOISE
from .text import CLIP_LENGTH, CLIP_WIDTHS, JOINT, Text
from .training import Average, Budget, cosine, fast_dtype, muon_in_float32, save_whole

SHIFT = 3.0  # of the noise levels in training
DROP = torch.tensor([0.15, 0.15, 0.25])  # how often each text encoder is left out (the paper: 46.3%)
EMPTY = 0.1  # how often the caption is empty, for guidance


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
class Half:
    """A part of each batch: scenes of these kinds (repeated by weight), and the T5 length that their captions need."""

    kinds: tuple[str, ...]
    size: int
    t5_length: int


HALVES = (Half(("single",) * 6 + ("pair", "pair", "count"), 26, 16), Half(("sign",), 6, 32))


class Pool:
    """Scenes with their latents, drawn and encoded as training goes: it grows to `capacity`, then the old ones go."""

    def __init__(
        self, art: Art, vae: AutoencoderKL, subjects: list[scenes.Subject], kinds: tuple[str, ...], capacity: int
    ):
        self.art, self.vae, self.subjects, self.kinds, self.capacity = art, vae, subjects, kinds, capacity
        self.scenes: list[scenes.Scene] = []
        self.latents: list[torch.Tensor] = []

    @torch.no_grad()
    def renew(self, count: int, rng: random.Random) -> None:
        new = [scenes.random_scene(rng, self.subjects, rng.choice(self.kinds)) for _ in range(count)]
        pictures = to_tensor([draw(scene, self.art, rng) for scene in new])
        encoded = self.vae.encode(pictures.to(self.vae.device)).latent_dist.mean * self.vae.config.scaling_factor
        for scene, latent in zip(new, encoded, strict=True):
            if len(self.scenes) < self.capacity:
                self.scenes.append(scene)
                self.latents.append(latent)
            else:
                i = rng.randrange(self.capacity)
                self.scenes[i], self.latents[i] = scene, latent

    def sample(self, count: int, rng: random.Random) -> tuple[list[scenes.Scene], torch.Tensor]:
        chosen = [rng.randrange(len(self.scenes)) for _ in range(count)]
        latents = torch.stack([self.latents[i] for i in chosen])
        noise = NOISE * self.vae.config.scaling_factor * torch.randn_like(latents)  # a sample of the posterior
        return [self.scenes[i] for i in chosen], latents + noise


def random_caption(scene: scenes.Scene, rng: random.Random) -> str:
    if rng.random() < EMPTY:
        return ""
    return scenes.caption(scene, rng, with_style=rng.random() < 0.75, with_colour=rng.random() < 0.85)


def optimizers(
    model: torch.nn.ModuleDict, rate: float, muon_rate: float, text_rate: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of the blocks: the transformer's (not the modulation's) and the encoders'.

    The encoders have no QK-norm that would hold their attention logits back, and get a lower rate.
    """
    matrices: dict[str, list[torch.nn.Parameter]] = {"transformer": [], "text": []}
    for name, module in model.named_modules():
        in_block = any(part in name for part in ("transformer_blocks.", "encoder.layers.", "encoder.block."))
        if isinstance(module, torch.nn.Linear) and in_block and ".norm1" not in name:
            matrices[name.partition(".")[0]].append(module.weight)
    chosen = {id(p) for part in matrices.values() for p in part}
    adamw = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in chosen], lr=rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    groups = [{"params": matrices["transformer"], "lr": muon_rate}, {"params": matrices["text"], "lr": text_rate}]
    muon = torch.optim.Muon(groups, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    for group in adamw.param_groups + muon.param_groups:
        group["initial_lr"] = group["lr"]
    return adamw, muon


def train(
    art: Art,
    vae: AutoencoderKL,
    work: Path,
    out: Path,
    minutes: float,
    subjects: int,
    *,
    device: str = "cpu",
    rate: float = 1.5e-3,
    muon_rate: float = 0.02,
    text_rate: float = 0.007,
    decay_from: float = 0.6,
    full_from: float = 0.9,
    seed: int = 0,
) -> None:
    """Train for `minutes` on the first so many subjects and save the pipeline to `out`.

    Continues from `work`/flow.pt where there is one: an interrupted run goes on, and with more minutes or subjects a
    finished one is widened.
    """
    rng, dtype = random.Random(seed), fast_dtype(device)
    torch.manual_seed(seed)
    vae = vae.to(device).eval().requires_grad_(False)
    model = torch.nn.ModuleDict({"text": Text(work), "transformer": transformer()}).to(device)
    average, budget = Average(list(model.parameters()), 0.998), Budget(minutes, "flow")
    adamw, muon = optimizers(model, rate, muon_rate, text_rate)
    kept = {"model": model, "average": average, "budget": budget, "adamw": adamw, "muon": muon}
    checkpoint = work / "flow.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        groups = adamw.param_groups + muon.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        for name, part in kept.items():
            part.load_state_dict(state[name])
        for group, given in zip(adamw.param_groups + muon.param_groups, settings, strict=True):
            group.update(given)  # this run's, not the stored ones
        rng.seed(budget.steps)
        torch.manual_seed(budget.steps)
    known = scenes.SUBJECTS[:subjects]
    pools = {half: Pool(art, vae, known, half.kinds, 12_000 if len(half.kinds) > 1 else 6_000) for half in HALVES}
    for half, pool in pools.items():
        for _ in range(half.size * 2):
            pool.renew(32, rng)

    def loss_of(half: Half, pool: Pool, clip_length: int, t5_length: int, share: float) -> float:
        chosen, x0 = pool.sample(half.size, rng)
        prompts = [random_caption(scene, rng) for scene in chosen]
        noise = torch.randn_like(x0)
        u = torch.sigmoid(torch.randn(half.size, device=device))
        sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
        s = sigma[:, None, None, None]
        keep = (torch.rand(half.size, 3) >= DROP).float().to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32), sdpa_kernel(SDPBackend.MATH):
            embeds, pooled = model["text"](prompts, clip_length, t5_length, keep)
            velocity = model["transformer"](
                hidden_states=(1 - s) * x0 + s * noise,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                timestep=sigma * 1000,
                return_dict=False,
            )[0]
        loss = (velocity.float() - (noise - x0)).square().mean()
        (loss * share).backward()
        return loss.item()

    smooth: dict[str, float] = {}
    for done in budget:
        full = done > full_from
        factor = min(1.0, (budget.steps + 1) / 100) * cosine(done, decay_from, 0.02)
        total = sum(half.size for half in HALVES)
        for half, pool in pools.items():
            clip_length = CLIP_LENGTH if full or rng.random() < 0.04 else 16
            t5_length = rng.choice((half.t5_length, 77, 256)) if full else half.t5_length + rng.choice((0, 0, 4))
            loss = loss_of(half, pool, clip_length, t5_length, half.size / total)
            smooth[half.kinds[0]] = 0.98 * smooth.get(half.kinds[0], loss) + 0.02 * loss
            if budget.steps % 2 == 0:
                pool.renew(half.size // 4, rng)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (adamw, muon):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            with muon_in_float32(dtype == torch.float32):
                optimizer.step()
            optimizer.zero_grad()
        average.update()
        budget.notes = {name: f"{value:.4f}" for name, value in smooth.items()}
        if budget.steps % 250 == 249:
            save_whole({name: part.state_dict() for name, part in kept.items()}, checkpoint)
    save_whole({name: part.state_dict() for name, part in kept.items()}, checkpoint)
    average.swap()
    export(model, vae, out)


def export(model: torch.nn.ModuleDict, vae: AutoencoderKL, folder: Path) -> None:
    """Save everything as a diffusers pipeline in fp16 safetensors; what is given stays as it is."""
    model, vae = (copy.deepcopy(module).to("cpu", torch.float16) for module in (model, vae))
    text = model["text"]
    pipeline = StableDiffusion3Pipeline(
        transformer=model["transformer"],
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


def load_as_float32(folder: Path) -> None:
    """Let the text encoders load in float32, as the other parts do when nobody names a precision.

    transformers loads in the precision that a configuration names, which is that of the saved file. The plain call of
    the pipeline would then join float16 text with a float32 transformer, and raise.
    """
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        path = folder / part / "config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
