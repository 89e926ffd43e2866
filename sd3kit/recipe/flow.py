"""The transformer of nano, trained as a rectified flow on what the text encoders say.

The loss is the paper's conditional flow matching: on the straight line x_sigma = (1 - sigma) x0 + sigma noise the
network predicts the velocity noise - x0. What makes it learn on two cores:

1. *Latents that are easy to learn*: see `autoencoder`; and *few patterns*: see `art.LARGE`.
2. *Muon* on the matrices of the blocks, AdamW elsewhere, also for the AdaLN modulation.
3. *Noise levels shifted towards 1*. A flat background is averaged over 256 places of the latent, so that its colour
   shows through the noise until sigma is close to 1: only the highest levels teach the word for it. A third of
   the levels are uniform, or the lowest, which draw the edges, would hardly be seen.
4. *Short text most of the time.* A caption has about fifteen tokens and the pipeline pads it to 77 + 256; training at
   full length all the time would cost three times as much, and a little of it at the end is enough.
5. *Letters that count*: see `LETTERS`. Without that weight, and with long words from the start, they were not heard.
6. *An average over the last thousands of steps*, which draws what a falling learning rate would give.
"""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import scenes
from .art import Art
from .checkpoints import mark, restore_parts, save_parts, whole_files
from .pool import Batch, Pool
from .text import CLIP_LENGTH, CLIP_WIDTHS, JOINT, Text
from .training import Average, Budget, Guard, Muon, Replayed, average_gradients, cosine, fast_dtype, process, same

SHIFT = 3.0  # of the noise levels in training
DROP = 0.15  # how often each text encoder is left out (the paper: 46.3%)
LETTERS = 5.0  # the loss's weight under letters: they are a few places of a picture, and all that a sign means
EMPTY = 0.1  # how often the caption is empty, for guidance
SPREAD = 16  # times as many pictures in a batch on a GPU, which would idle with so few
RATES = {"cpu": (1.5e-3, 0.02), "cuda": (8e-4, 0.004)}  # AdamW's and Muon's; larger batches diverged at a CPU's rates
FULL_FROM = {"cpu": 0.98, "cuda": 0.85}  # of the time; from then on the text is padded as the pipeline pads it


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


# Counts and splits come often because they are learnt last: after 6,549 steps on a GPU with 2 of either to 10 singles,
# a subject's latents at noise level 0.97 were 0.55 and 0.44 off where a pair's were 0.37.
PARTS = (Part(("single",) * 6 + ("pair",) * 3 + ("count",) * 4 + ("split",) * 4, 24), Part(("sign",), 8))


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
    adamw = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    muon = Muon(matrices, muon_rate, fast_dtype(matrices[0].device.type))
    for group in adamw.param_groups + muon.param_groups:
        group["initial_lr"] = group["lr"]
    return adamw, muon


def noise_levels(count: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """Sigmas (count,) in 0..1: two in three logit-normal (0, 1) and shifted, the third uniform."""
    u = torch.sigmoid(torch.randn(count, device=device))
    shifted = SHIFT * u / (1 + (SHIFT - 1) * u)
    return torch.where(torch.rand(count, device=device) < 2 / 3, shifted, torch.rand(count, device=device))


def losses(
    model: SD3Transformer2DModel, text: Text, batch: Batch, nothing: Sequence[torch.Tensor], lengths: tuple[int, int]
) -> torch.Tensor:
    """The flow-matching loss of each picture (N,), its caption padded to so many tokens for the CLIPs and the T5.

    `nothing` is the empty caption's ids for both, as `Text.tokens` gives them, on the model's device.
    """
    x0, device = batch.latents, batch.latents.device
    count = len(x0)
    noise, sigma = torch.randn_like(x0), noise_levels(count, device)
    s = sigma[:, None, None, None]
    empty = torch.rand(count, 1, device=device) < EMPTY
    keep = (torch.rand(count, 3, device=device) >= DROP) | empty  # an empty caption is whole, as in use
    with torch.no_grad():
        ids = []
        for given, none, length in zip((batch.clip, batch.t5), nothing, lengths, strict=True):
            given = torch.where(empty, pad(none, given.shape[1]), given)
            ids.append(pad(given, max(length, given.shape[1])))
        said = text.encode(*ids, keep.float())
    predicted = model((1 - s) * x0 + s * noise, *said, sigma * 1000, return_dict=False)[0].float()
    weights = 1 + (LETTERS - 1) * batch.letters.float()
    weights = weights.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]  # a token is 2 x 2 places of the latent
    return (weights * (predicted - (noise - x0)).square()).mean((1, 2, 3))


def passes(
    model: SD3Transformer2DModel, text: Text, nothing: Sequence[torch.Tensor], pools: Sequence[Pool],
    counts: tuple[int, ...], lengths: tuple[int, int],
) -> tuple[torch.Tensor, list[torch.Tensor]]:  # fmt: skip
    """Both passes over so many pictures of each pool: the loss of each picture, and the gradient of each parameter."""
    device, parameters = next(model.parameters()).device.type, list(model.parameters())
    on_gpu, dtype = device != "cpu", fast_dtype(device)
    drawn = [pool.sample(count) for pool, count in zip(pools, counts, strict=True)]
    if on_gpu:  # one length for all, and one pass
        drawn = [Batch(*map(torch.cat, zip(*drawn, strict=True)))]
    found, gradients = [], None
    for batch in drawn:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=not on_gpu):
            with attention(on_gpu):
                each = losses(model, text, batch, nothing, lengths)
        new = torch.autograd.grad(each.sum() / sum(counts), parameters)
        gradients = torch._foreach_add(gradients, new) if gradients else new
        found.append(each.detach())
    return torch.cat(found), gradients


def pad(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Ids (N, tokens) padded or cut to a length, with the -1 that `Text.encode` takes for padding."""
    return torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=-1)


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
    decay_from: float = 0.6,
    seed: int = 0,
) -> SD3Transformer2DModel:
    """Train for `minutes` on the first so many subjects; the average of the parameters comes back.

    Continues from `work`/flow.pt where there is one: an interrupted run goes on, and with more minutes or subjects a
    finished one is widened. Where there is none it begins from `start`, a trained transformer, or from nothing. The
    autoencoder and the text encoders stay as they are. UserError: the checkpoint began from others.
    """
    rng = random.Random(seed)
    on_gpu = device != "cpu"
    kind = "cuda" if on_gpu else "cpu"  # other accelerators are fed as CUDA's are
    vae, text = vae.to(device).eval().requires_grad_(False), text.to(device).eval().requires_grad_(False)
    torch.manual_seed(seed)
    model = transformer().to(device)
    if start is not None:
        model.load_state_dict(start.state_dict())
    average, budget = Average(list(model.parameters()), 0.9995), Budget(minutes, "flow")
    adamw, muon = optimizers(model, *RATES[kind])
    guard = Guard(average, adamw, muon)
    kept = {"model": model, "average": average, "budget": budget, "adamw": adamw, "muon": muon, "guard": guard}
    began = {  # the decoder may be another: the flow knows latents alone
        "transformer": mark(start.parameters()) if start else "new",
        "autoencoder": mark(vae.encoder.parameters()),
        "text encoders": mark(text.parameters()),
    }
    groups = adamw.param_groups + muon.param_groups
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    checkpoint = work / "flow.pt"
    if stored := restore_parts(kept, checkpoint, began):
        if stored.get("subjects") != subjects:
            guard.best = math.inf  # it was that of other pictures
        for group, given in zip(adamw.param_groups + muon.param_groups, settings, strict=True):
            group.update(given)  # this run's rates, not the stored ones
        for state in adamw.state.values():
            state["step"] = state["step"].to(device)  # where a fused AdamW counts
        rng.seed(budget.steps)
    rank, processes = process()
    own = budget.steps * processes + rank  # each process sees scenes and noise of its own
    torch.manual_seed(own + seed)
    known, workers = scenes.SUBJECTS[:subjects], max(1, (os.cpu_count() or 1) // 2 - 1) if on_gpu else 0
    sizes = {part: part.size * (SPREAD if on_gpu else 1) for part in PARTS}
    pools = {
        part: Pool(art, vae, text, known, part.kinds, 60_000 if on_gpu else 8_000, workers=workers, seed=own)
        for part in PARTS
    }
    for part, pool in pools.items():
        pool.renew(max(1, sizes[part] * 16 // pool.at_once))
    nothing = [ids.to(device) for ids in text.tokens([""], 3, 3)]
    both = functools.partial(passes, model, text, nothing, list(pools.values()))
    if device == "cuda":
        for block in model.transformer_blocks:
            block.compile(dynamic=False)
        both = Replayed(both)
    smooth, first, norm = {}, budget.steps, None
    for done in budget:
        factor = guard.slower * min(1.0, (budget.steps - first + 1) / 100) * cosine(done, decay_from, 0.02)
        full = done > FULL_FROM[kind] or rng.random() < 0.03
        lengths = (CLIP_LENGTH, rng.choice((40, 256) if on_gpu else (40, 77, 256))) if full else (0, 0)
        counts = tuple(size // 2 if full and on_gpu else size for size in sizes.values())
        found, gradients = both(counts, lengths)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        if budget.steps % (50 if on_gpu else 10) == 0:  # reading it makes a GPU wait
            for part, each in zip(PARTS, found.split(counts), strict=True):
                name, now = part.kinds[0], each.mean().item()
                smooth[name] = 0.9 * smooth.get(name, now) + 0.1 * now
        for part, pool in pools.items():
            if budget.steps % 16 < part.size / 4:
                pool.renew()
        average_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (adamw, muon):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
        if guard.follow(norm, look=not on_gpu or budget.steps % 50 == 49):  # and so before each checkpoint
            smooth = {}
        budget.notes = {name: f"{value:.4f}" for name, value in smooth.items()}
        if budget.steps % (500 if on_gpu else 100) == 99:
            # a run that has just gone on may have read no loss yet
            if smooth and guard.watch(same(sum(smooth.values()))):
                smooth = {}
            if rank == 0:
                save_parts(kept, checkpoint, began=began, subjects=subjects)
    if norm is not None:
        guard.look(norm)
    if rank == 0:
        save_parts(kept, checkpoint, began=began, subjects=subjects)
    average.swap()
    return model


def attention(on_gpu: bool):
    """Plain matrix products for attention on a CPU, whose fused kernel is slower backwards at these sizes."""
    return contextlib.nullcontext() if on_gpu else sdpa_kernel(SDPBackend.MATH)


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
    with whole_files(folder) as part:
        pipeline.save_pretrained(part, safe_serialization=True)
        tidy_configurations(part)
        for path in part.glob("tokenizer*/tokenizer.json"):  # a third less without its spaces
            rows = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(rows, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def tidy_configurations(folder: Path) -> None:
    """Leave out where a part was once loaded from, and let the text encoders load in float32, as the other parts do.

    transformers loads in the precision that a configuration names, which is that of the saved file. The plain call of
    the pipeline would then join float16 text with a float32 transformer, and raise.
    """
    for path in folder.glob("*/config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)
        if path.parent.name.startswith("text_encoder"):
            settings["dtype"] = "float32"
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
