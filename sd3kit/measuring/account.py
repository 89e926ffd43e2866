"""Bytes of the real models by recipe, accounted on the meta device without a download; and `fit`, which picks one.

What is accounted: the weights as a recipe stores them, and the tensors alive in the forward pass of each part. What is
not: workspaces of convolutions, the memory of the CUDA context (some 0.5 GB), and fragmentation. Sizes are in GiB.
"""

import dataclasses
import functools
import math

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .. import records as stored
from ..loading import configs
from .recipes import ENCODERS, RECIPES, Recipe

GIB = 2**30
PARTS = (*ENCODERS, "transformer", "vae")


class _Fused(TorchFunctionMode):
    """Attention by a fused kernel, as on a GPU: the matrix of weights between all tokens is never stored."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


class _Decode(torch.nn.Module):
    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, latent):
        return self.vae.decode(latent).sample


def _part(model: str, part: str) -> torch.nn.Module:
    """A part of a model on the meta device in float16; all but the transformer are the same in all models."""
    return _built(model if part == "transformer" else "medium", part)


@functools.cache
def _built(model: str, part: str) -> torch.nn.Module:
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    build = {
        "text_encoder": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**configs.CLIP_L)),
        "text_encoder_2": lambda: CLIPTextModelWithProjection(CLIPTextConfig(**configs.CLIP_G)),
        "text_encoder_3": lambda: T5EncoderModel(T5Config(**configs.T5_XXL)),
        "transformer": lambda: SD3Transformer2DModel(**configs.TRANSFORMER[model]),
        "vae": lambda: _Decode(AutoencoderKL(**configs.VAE)),
    }[part]
    with torch.device("meta"):
        return build().to(torch.float16).eval()


def weights(model: str, part: str, bits: int = 16, every_linear: bool = False, skips: tuple[str, ...] = ()) -> int:
    """Bytes of a part's weights and buffers in float16, its linear layers at so many stored bits.

    The T5's `wo` layers stay in float32 and are not quantised: transformers says so (`_keep_in_fp32_modules`), since
    they overflow in float16; torchao quantises them all the same (`every_linear`). `skips` names layers that keep 16
    bits, by a part of their name. Scales of quantised layers, below 2%, are left out.
    """
    module, total = _part(model, part), 0
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    seen: set[int] = set()  # the T5's embedding is there twice and stored once
    for name, layer in module.named_modules():
        own = [t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if id(t) not in seen]
        seen.update(map(id, own))
        count = sum(tensor.numel() for tensor in own)
        if name.rpartition(".")[2] in kept and not (every_linear and bits < 16):
            total += 4 * count
        elif bits < 16 and isinstance(layer, torch.nn.Linear) and own and not any(skip in name for skip in skips):
            total += layer.weight.numel() * bits // 8 + (count - layer.weight.numel()) * 2
        else:
            total += 2 * count
    return total


def _largest_layer(model: str, part: str) -> int:
    kept = getattr(_part(model, part), "_keep_in_fp32_modules", None) or ()
    sizes = (
        (4 if name.rpartition(".")[2] in kept else 2) * sum(p.numel() for p in layer.parameters(recurse=False))
        for name, layer in _part(model, part).named_modules()
    )
    return max(sizes)


def activations(model: str, part: str, size: int = 1024, tokens: int = 256) -> int:
    """The most bytes alive in a part's forward pass in float16 beside its weights, for one guided picture.

    By torch's own memory tracker, on meta tensors. `size` is in pixels, `tokens` the length of the T5's text.
    """
    return _alive(model if part == "transformer" else "medium", part, size, tokens)


@functools.cache
def _alive(model: str, part: str, size: int, tokens: int) -> int:
    from torch.distributed._tools.mem_tracker import MemTracker

    module = _part(model, part)
    side = size // 8
    with torch.device("meta"):
        half = functools.partial(torch.empty, dtype=torch.float16)
        inputs = {
            "text_encoder": lambda: {"input_ids": torch.zeros(1, 77, dtype=torch.long), "output_hidden_states": True},
            "text_encoder_2": lambda: {"input_ids": torch.zeros(1, 77, dtype=torch.long), "output_hidden_states": True},
            "text_encoder_3": lambda: {"input_ids": torch.zeros(1, tokens, dtype=torch.long)},
            "transformer": lambda: {
                "hidden_states": half(2, 16, side, side),
                "encoder_hidden_states": half(2, 77 + tokens, 4096),
                "pooled_projections": half(2, 2048),
                "timestep": half(2),
            },
            "vae": lambda: {"latent": half(1, 16, side, side)},
        }[part]()
    tracker = MemTracker()
    with torch.no_grad(), tracker, _Fused():
        module(**inputs)
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    held = {getattr(kind, "value", kind): size for kind, size in snapshot.items()}
    return held["Total"] - held["Parameter"] - held["Buffer"]


def peaks(model: str = "medium", recipe: str = "default", size: int = 1024) -> dict:
    """Accounted peaks of a recipe for one guided picture in float16, in bytes.

    Returns:
        `device` (the GPU), `host` (the processor's memory, without libraries: what is loaded there first, or waits
        there), and `stage`, the part that sets the device's peak.

    Raises:
        ValueError: a model or recipe that is not known.
    """
    if recipe not in RECIPES:
        raise ValueError(f"There is no recipe {recipe!r}: use one of {', '.join(RECIPES)}.")
    if model not in configs.TRANSFORMER:
        raise ValueError(f"There is no model {model!r} to account: use one of {', '.join(configs.TRANSFORMER)}.")
    plan = RECIPES[recipe]
    parts = [part for part in PARTS if part not in plan.without]
    held = {part: weights(model, part, plan.bits.get(part, 16), plan.every_linear, plan.skips) for part in parts}
    alive = {part: activations(model, part, size // (plan.tiles if part == "vae" else 1)) for part in parts}
    on_device = {part: _resident(plan, model, part, held) + alive[part] for part in parts}
    stage = max(on_device, key=on_device.get)
    return {"device": on_device[stage], "host": _host(plan, model, parts), "stage": stage}


def _resident(plan: Recipe, model: str, part: str, held: dict[str, int]) -> int:
    """Bytes of weights on the device while a part runs."""
    if plan.keeps == "all":
        return sum(held.values())
    if plan.keeps == "stage":
        encoding = part in ENCODERS
        return sum(size for name, size in held.items() if (name in ENCODERS) == encoding)
    if plan.keeps == "rest":
        rest = sum(size for name, size in held.items() if name not in ENCODERS)
        return rest + (_largest_layer(model, part) if part in ENCODERS else 0)
    if plan.keeps == "part":
        # the negative prompt is encoded after the prompt: the T5 is still there when the CLIPs run again
        return held[part] + (held.get("text_encoder_3", 0) if part in ("text_encoder", "text_encoder_2") else 0)
    if plan.keeps == "block" and part == "transformer":
        return held[part] // len(_part(model, part).transformer_blocks) * 2  # one block, and what is in no block
    return _largest_layer(model, part)


def _host(plan: Recipe, model: str, parts: list[str]) -> int:
    """Bytes in the processor's memory: a pipeline is loaded there in full, then moved or made smaller."""
    full = {part: weights(model, part) for part in parts if part not in plan.straight}
    if plan.keeps == "stage":
        encoders = sum(size for part, size in full.items() if part in ENCODERS)
        return max(encoders, sum(full.values()) - encoders)
    return sum(full.values())


# ---- which recipe fits ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fit:
    """The recipe that `fit` names. Sizes in GiB; `seconds` a picture is None where no time was measured."""

    recipe: str
    seconds: float | None
    gpu_gb: float
    ram_gb: float
    source: str
    untimed: tuple[str, ...]

    def __str__(self) -> str:
        time = "not timed yet" if self.seconds is None else f"{self.seconds:.3g} s a picture"
        text = f"{self.recipe}: {time}, {self.gpu_gb:.1f} GiB on the GPU, {self.ram_gb:.1f} of RAM ({self.source})."
        if self.untimed:
            text += f" These fit too and have no measured time yet: {', '.join(self.untimed)}."
        return text


def fit(gpu_gb: float, ram_gb: float, model: str = "medium", records: list[dict] | None = None) -> Fit:
    """The fastest recipe that fits, by stored measurements; a picture of 1024 x 1024 with guidance.

    Args:
        gpu_gb: GiB of free GPU memory, as torch.cuda.mem_get_info says; a "16 GB" T4 has 15 at most.
        ram_gb: GiB of the processor's memory that is free for the model.
        model: "medium", or another of `sd3kit.configs.TRANSFORMER`.
        records: those of `sd3kit measure memory` on your machine; None is what the package stores, where the
            announcement's seconds (A100) stand in until there are own ones. Peaks that were not measured are
            accounted, plus the share by which the accounting falls short of the announcement's figures at most.

    Raises:
        ValueError: sizes that are no positive numbers, or nothing fits; one sentence.
    """
    for name, value in (("gpu_gb", gpu_gb), ("ram_gb", ram_gb)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be a positive number of GiB, not {value!r}.")
    accounted = {r["row"]: r for r in stored.read(stored.RESULTS / "bytes.jsonl") if r["model"] == model}
    if not accounted:
        raise ValueError(f"No bytes are stored for {model!r}: use one of {', '.join(configs.TRANSFORMER)}.")
    timed, missing = _times(model, records), _missing()
    fits = {}
    for name, row in accounted.items():
        known = timed.get(name, {})
        gpu, ram = row["device"] * missing / GIB, row["host"] / GIB
        if known.get("source", "").startswith("measured"):
            gpu = known["device_peak"] / GIB
        if gpu <= gpu_gb and ram <= ram_gb and not known.get("failed"):
            fits[name] = Fit(name, known.get("seconds"), gpu, ram, known.get("source", "accounted, not run"), ())
    if not fits:
        least = min(row["device"] for row in accounted.values()) / GIB
        ram = min(row["host"] for row in accounted.values()) / GIB
        raise ValueError(
            f"No recipe fits SD3 {model} into {gpu_gb:g} GiB of GPU memory and {ram_gb:g} of RAM (the least are "
            f"{least:.1f} and {ram:.1f}, not together): use nano, or a larger machine such as a free Colab T4."
        )
    measured = [f for f in fits.values() if f.seconds is not None]
    # without a time, what keeps most on the GPU has least to move; where that is equal, what moves in larger pieces
    pieces = ("leaf", "block", "part", "rest", "stage", "all")
    best = (
        min(measured, key=lambda f: f.seconds)
        if measured
        else max(fits.values(), key=lambda f: (round(f.gpu_gb, 2), pieces.index(RECIPES[f.recipe].keeps)))
    )
    untimed = tuple(n for n, f in fits.items() if f.seconds is None and f is not best)
    return dataclasses.replace(best, untimed=untimed)


def _missing() -> float:
    """By how much the accounting falls short of a published peak at most, as a factor: work space, mostly."""
    accounted = {r["row"]: r["device"] for r in stored.read(stored.RESULTS / "bytes.jsonl") if r["model"] == "medium"}
    rows = [r for r in stored.read(stored.RESULTS / "published.jsonl") if "device_peak" in r]
    return max(1.0, *(r["device_peak"] / accounted[r["row"]] for r in rows))


def _times(model: str, records: list[dict] | None) -> dict[str, dict]:
    """What was measured by recipe; one machine only, since times of two machines do not compare."""
    own = stored.read(stored.RESULTS / "memory.jsonl") if records is None else records
    own = [r for r in own if r.get("model") == model and r.get("size") == 1024 and r.get("device") == "cuda"]
    own = [r for r in own if not r.get("cap_gb")]
    if own:
        machine = own[-1]["machine"]
        return {
            r["row"]: {
                "seconds": r.get("median"),
                "device_peak": r.get("device_peak", math.inf),
                "source": f"measured on {machine}",
                "failed": "raises" in r or "out_of_memory" in r,
            }
            for r in own
            if r["machine"] == machine
        }
    rows = [r for r in stored.read(stored.RESULTS / "published.jsonl") if r["model"] == model and "device_peak" in r]
    return {r["row"]: r | {"seconds": r["mean"], "source": r["source"]} for r in rows}
