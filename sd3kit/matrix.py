"""What works on SD3: each optimisation of diffusers tried on a small random SD3 transformer, with and without QK-norm.

A feature "works" only when its mechanism is seen at work (a hook that fired, a type, a count) and the output is that of
the unmodified model.
"""

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator

import torch
from diffusers import CacheMixin, SD3Transformer2DModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

from .speedups import BlockCache

FEATURES: dict[str, tuple[Callable, float]] = {}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One row: what a feature did on a model with that `qk_norm`.

    `verdict` is "works", "raises", "no effect" or "changes the result"; `detail` says with what or by how much.
    """

    feature: str
    qk_norm: str | None
    verdict: str
    detail: str


def feature(tolerance: float = 1e-4) -> Callable:
    """Register a feature: a function that changes a model and returns a proof, called after the forward pass, that its
    mechanism was active. `tolerance` is the relative change of the output that still counts as the same."""

    def register(change: Callable) -> Callable:
        FEATURES[change.__name__] = change, tolerance
        return change

    return register


def small(qk_norm: str | None) -> SD3Transformer2DModel:
    """A random SD3 transformer with three blocks; its QK-norm's weights are not all one, as in a trained model."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, num_layers=3, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=32, pos_embed_max_size=8, qk_norm=qk_norm,
    ).eval()  # fmt: skip
    for name, weight in model.named_parameters():
        if ".norm_q." in name or ".norm_k." in name or "norm_added" in name:
            weight.data.uniform_(0.5, 4.0)
    return model.requires_grad_(False)


def run(model: torch.nn.Module) -> torch.Tensor:
    """One forward pass on fixed inputs: latents (2, 16, 8, 8) and seven text tokens."""
    make = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*shape, generator=make) for shape in ((2, 16, 8, 8), (2, 7, 32), (2, 32))]
    return model(*inputs, timestep=torch.full((2,), 500.0)).sample


def outcome(name: str, qk_norm: str | None) -> Outcome:
    """Try one feature."""
    change, tolerance = FEATURES[name]
    model = small(qk_norm)
    plain = run(model)
    try:
        proof = change(model)
        out = run(model)
    except Exception as error:
        words = (str(error).strip().splitlines() or [""])[0]
        return Outcome(name, qk_norm, "raises", f"{type(error).__name__}: {words}"[:120])
    far = ((out - plain).norm() / plain.norm()).item()
    if far > tolerance:
        return Outcome(name, qk_norm, "changes the result", f"by {far:.1%}")
    seen = proof()
    return Outcome(name, qk_norm, "works" if seen else "no effect", f"{seen}; change {far:.0e}" if seen else "")


def outcomes() -> Iterator[Outcome]:
    """Every feature on both kinds of model."""
    for name, qk_norm in itertools.product(FEATURES, (None, "rms_norm")):
        yield outcome(name, qk_norm)


@feature()
def fuse_qkv_projections(model):
    model.fuse_qkv_projections()
    return lambda: hasattr(model.transformer_blocks[0].attn, "to_qkv") and "one product for q, k and v"


@feature()
def forward_chunking(model):
    sizes = []
    model.enable_forward_chunking(chunk_size=1, dim=0)
    model.transformer_blocks[0].ff.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    return lambda: sizes == [1, 1] and "the feed-forward sees one of the batch at a time"


@feature()
def forward_chunking_of_tokens(model):
    """The size must divide the picture's tokens and the text's: 4096 and 333 by default, so it can only be one."""
    model.enable_forward_chunking(chunk_size=4, dim=1)
    return lambda: "four tokens at a time"


@feature(tolerance=0.1)
def layerwise_casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return lambda: (
        model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn and "stored in 8 bits after the call"
    )


@feature(tolerance=0.1)
def torchao_int8(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return lambda: type(model.transformer_blocks[0].attn.to_q.weight).__name__ != "Parameter" and "quantised weights"


@feature(tolerance=0.2)
def torchao_float8(model):
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(model, Float8WeightOnlyConfig())
    return lambda: type(model.transformer_blocks[0].attn.to_q.weight).__name__ != "Parameter" and "quantised weights"


@feature()
def group_offload_leaf(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    return lambda: hasattr(model.proj_out, "_diffusers_hook") and "hooks on each layer"


@feature()
def group_offload_block(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    return lambda: hasattr(model.transformer_blocks[0], "_diffusers_hook") and "hooks on each block"


@feature()
def group_offload_disk(model):
    model.folder = tempfile.TemporaryDirectory(prefix="sd3kit-")
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=model.folder.name)
    return lambda: f"{len(os.listdir(model.folder.name))} files"


@feature()
def group_offload_stream(model):
    place = "cuda" if torch.cuda.is_available() else "cpu"
    model.enable_group_offload(torch.device(place), offload_type="leaf_level", use_stream=True)
    return lambda: "streams"


@feature()
def set_attention_backend(model):
    model.set_attention_backend("native")
    processor = model.transformer_blocks[0].attn.processor
    return lambda: getattr(processor, "_attention_backend", None) is not None and "the processor has a backend"


@feature()
def compile_whole(model):
    graphs = []
    torch._dynamo.reset()
    model.compile(backend=lambda graph, _: graphs.append(1) or graph.forward, fullgraph=True)
    return lambda: graphs and f"{len(graphs)} graph"


@feature()
def compile_repeated_blocks(model):
    model.compile_repeated_blocks(backend="eager")
    return lambda: "compiled"


@feature()
def compile_repeated_blocks_named(model):
    graphs = []
    model._repeated_blocks = ["JointTransformerBlock"]
    torch._dynamo.reset()
    model.compile_repeated_blocks(backend=lambda graph, _: graphs.append(1) or graph.forward, fullgraph=True)
    return lambda: graphs and f"{len(graphs)} graphs for three blocks"


@feature()
def enable_cache(model):
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    return lambda: "a cache"


@feature()
def first_block_cache(model):
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.0))
    return lambda: "a cache"


@feature()
def first_block_cache_in_a_context(model):
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.0))
    model.context = CacheMixin.cache_context(model, "both")  # kept, or it would close at once
    model.context.__enter__()
    return lambda: "a cache"


@feature()
def sd3kit_block_cache(model):
    cache = BlockCache(model.transformer_blocks, threshold=0.1)
    model.transformer_blocks = torch.nn.ModuleList([cache])
    run(model)  # the second call, with the same input, comes from the cache
    return lambda: cache.skipped == 1 and "the second call from the cache"


@feature()
def context_parallel(model):
    return lambda: getattr(model, "_cp_plan", None) is not None and "a plan"
