"""Bytes of the real models by part, accounted on the meta device without a download.

What is accounted: the weights as a recipe stores them, and the tensors alive in the forward pass of each part with the
work space of the decoder's convolutions. `studies/accounting.py` makes peaks by recipe of it, from which `fit` advises.
"""

import functools

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from ..loading.pipeline import build
from .plan import ENCODERS

GIB = 2**30
PARTS = (*ENCODERS, "transformer", "vae")
# What decoding really takes, over its tensors: 2.48 GiB for 1.50 (SD3 Medium on an H200, every stored row alike). The
# kernels of convolutions work on copies in another order.
WORK_SPACE = 1.65


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
    with torch.device("meta"):
        module = build(model, part)
        return (_Decode(module) if part == "vae" else module).to(torch.float16).eval()


def weights(model: str, part: str, bits: float = 16, every_linear: bool = False, skips: tuple[str, ...] = ()) -> int:
    """Bytes of a part's weights and buffers in float16, its linear layers at so many stored bits.

    The T5's `wo` layers stay in float32 and are not quantised: transformers says so (`_keep_in_fp32_modules`), since
    they overflow in float16; torchao quantises them all the same (`every_linear`). `skips` names layers that keep 16
    bits, by a part of their name. NF4 takes 4.5 bits with its scales; those of 8 bits, below 1%, are left out.
    """
    total = 0
    for name, layer, own, wide in layers(model, part):
        count = sum(tensor.numel() for tensor in own)
        if wide and not (every_linear and bits < 16):
            total += 4 * count
        elif bits < 16 and isinstance(layer, torch.nn.Linear) and own and not any(skip in name for skip in skips):
            total += int(layer.weight.numel() * bits) // 8 + (count - layer.weight.numel()) * 2
        else:
            total += 2 * count
    return total


def layers(model: str, part: str):
    """Each layer of a part: its name, itself, its own tensors, and whether these stay in float32."""
    module = _part(model, part)
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    seen: set[int] = set()  # the T5's embedding is there twice and stored once
    for name, layer in module.named_modules():
        own = [t for t in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)) if id(t) not in seen]
        seen.update(map(id, own))
        yield name, layer, own, name.rpartition(".")[2] in kept


def activations(model: str, part: str, size: int = 1024, tokens: int = 256) -> int:
    """The most bytes that a part's forward pass in float16 takes beside its weights, for one guided picture.

    By torch's own memory tracker, on meta tensors; `WORK_SPACE` comes on top of the decoder's. `size` is in pixels,
    `tokens` the length of the T5's text.
    """
    alive = _alive(model if part == "transformer" else "medium", part, size, tokens)
    return int(WORK_SPACE * alive) if part == "vae" else alive


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
