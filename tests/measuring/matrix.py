"""What works on SD3: each optimisation of diffusers tried on a small random SD3, with and without QK-norm.

`python tests/measuring/matrix.py` writes the outcomes that lesson 05 draws (sd3kit/results/features.jsonl); a test
recomputes them.

A feature "works" only when its mechanism is seen at work (a hook that fired, a type, a count) and the output is that of
the unmodified model; where it is near to that, the feature "approximates". The inputs change from call to call as a
sampler's do, so a cache that gives an old answer is seen. Most features change the transformer, some the autoencoder or
the pipeline. The docstring of a feature is the reason for its verdict, and goes into the record.
"""

import dataclasses
import itertools
import os
import tempfile
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    BitsAndBytesConfig,
    CacheMixin,
    ContextParallelConfig,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

from sd3kit import pictures, records
from sd3kit.loading.names import NANO

PICTURES = sorted((records.RESULTS.parent / "dreambooth" / "pictures").glob("*.png"))[:2]
STORED = records.RESULTS / "features.jsonl"
SAME = 1e-4  # a relative change that is rounding
STEPS = (900.0, 700.0, 500.0, 300.0)
FEATURES: dict[str, "Feature"] = {}


@dataclasses.dataclass(frozen=True)
class Feature:
    """`build(qk_norm)` makes what `change` then changes; `run` gives its output before and after.

    `change` returns a proof: called after the second run, it says how its mechanism was active, or something false.
    `tolerance` is the relative change of the output that is still an approximation of it.
    """

    change: Callable
    tolerance: float
    build: Callable
    run: Callable


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
    """The velocities of a short sampling: latents (2, 16, 8, 8) that each step changes, falling timesteps, and seven
    text tokens. (4, 2, 16, 8, 8)."""
    make = torch.Generator().manual_seed(1)
    latents, text, pooled = (torch.randn(*shape, generator=make) for shape in ((2, 16, 8, 8), (2, 7, 32), (2, 32)))
    velocities = []
    for timestep in STEPS:
        velocities.append(model(latents, text, pooled, timestep=torch.full((2,), timestep)).sample)
        latents = latents - 0.2 * velocities[-1]
    return torch.stack(velocities)


def small_vae(_qk_norm: str | None) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        latent_channels=16, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0,
    ).eval().requires_grad_(False)  # fmt: skip


def decode(vae: AutoencoderKL) -> torch.Tensor:
    """Two latents of 16 places a side, decoded."""
    return vae.decode(torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))).sample


def nano_vae(_qk_norm: str | None) -> AutoencoderKL:
    """A trained autoencoder: what tiles do to noise from random weights says nothing."""
    return AutoencoderKL.from_pretrained(NANO, subfolder="vae").eval().requires_grad_(False)


def there_and_back(vae: AutoencoderKL) -> torch.Tensor:
    """Two pictures of half as many pixels again as the autoencoder's own, encoded in one piece and decoded."""
    side = vae.config.sample_size * 3 // 2
    flat = [np.array(pictures.square(pictures.open_picture(path), side)) for path in PICTURES]
    batch = torch.from_numpy(np.stack(flat)).permute(0, 3, 1, 2).float() / 127.5 - 1
    tiling, vae.use_tiling = vae.use_tiling, False
    latents = vae.encode(batch).latent_dist.mean
    vae.use_tiling = tiling
    return vae.decode(latents).sample


def small_pipeline(qk_norm: str | None) -> StableDiffusion3Pipeline:
    """The small transformer in a pipeline that takes embeddings of prompts."""
    pipe = StableDiffusion3Pipeline(
        transformer=small(qk_norm), scheduler=FlowMatchEulerDiscreteScheduler(), vae=small_vae(None),
        **{name: None for encoder in ("", "_2", "_3") for name in (f"text_encoder{encoder}", f"tokenizer{encoder}")},
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    """Two steps to a latent."""
    make = torch.Generator().manual_seed(1)
    embeds, pooled = torch.randn(1, 7, 32, generator=make), torch.randn(1, 32, generator=make)
    return pipe(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, guidance_scale=1.0, num_inference_steps=2,
        height=16, width=16, generator=make, output_type="latent",
    ).images  # fmt: skip


def feature(tolerance: float = SAME, build: Callable = small, run: Callable = run) -> Callable:
    """Register a change of a model as a `Feature`."""

    def register(change: Callable) -> Callable:
        FEATURES[change.__name__] = Feature(change, tolerance, build, run)
        return change

    return register


def outcome(name: str, qk_norm: str | None) -> dict:
    """Try one feature on a model with that `qk_norm`.

    The `verdict` is "works", "approximates", "raises", "no effect" or "changes the result"; `detail` says with what or
    by how much.
    """
    tried = FEATURES[name]
    model = tried.build(qk_norm)
    plain = tried.run(model)
    try:
        proof = tried.change(model)
        out = tried.run(model)
    except Exception as error:
        words = (str(error).strip().splitlines() or [""])[0]
        return {"verdict": "raises", "detail": f"{type(error).__name__}: {words}"[:120]}
    far = ((out - plain).norm() / plain.norm()).item()
    if far > tried.tolerance:
        return {"verdict": "changes the result", "detail": f"by {far:.1%}"}
    if not (seen := proof()):
        return {"verdict": "no effect", "detail": ""}
    return {"verdict": "works" if far < SAME else "approximates", "detail": f"{seen}; change {far:.0e}"}


@feature()
def fuse_qkv_projections(model):
    """The fused code has no line for the QK-norm: a model that has one loses it without an error."""
    model.fuse_qkv_projections()
    return lambda: hasattr(model.transformer_blocks[0].attn, "to_qkv") and "one product for q, k and v"


@feature()
def forward_chunking(model):
    sizes = []
    model.enable_forward_chunking(chunk_size=1, dim=0)
    model.transformer_blocks[0].ff.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    return lambda: set(sizes) == {1} and "the feed-forward sees one of the batch at a time"


@feature()
def forward_chunking_of_tokens(model):
    """The size must divide the picture's tokens and the text's: 4096 and 333 by default, so it can only be one."""
    model.enable_forward_chunking(chunk_size=4, dim=1)
    return lambda: "four tokens at a time"


@feature(tolerance=0.1)
def layerwise_casting(model):
    """Weights wait in 8-bit floats; each layer is turned back just before it computes."""
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return lambda: (
        model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn and "stored in 8 bits after the call"
    )


@feature(tolerance=0.1)
def torchao_int8(model):
    """Weights are stored as 8-bit integers with a scale a row, on a CPU too."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return lambda: type(model.transformer_blocks[0].attn.to_q.weight).__name__ != "Parameter" and "quantised weights"


@feature(tolerance=0.2)
def torchao_float8(model):
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(model, Float8WeightOnlyConfig())
    return lambda: type(model.transformer_blocks[0].attn.to_q.weight).__name__ != "Parameter" and "quantised weights"


def quantised(model, config):
    """Let the model run a copy of itself that was loaded in fewer bits."""
    with tempfile.TemporaryDirectory(prefix="sd3kit-") as folder:
        model.save_pretrained(folder)
        loaded = SD3Transformer2DModel.from_pretrained(folder, quantization_config=config)
    model.forward = loaded.forward
    return lambda: f"{type(loaded.transformer_blocks[0].attn.to_q.weight).__name__} weights"


@feature(tolerance=0.1)
def bitsandbytes_int8(model):
    return quantised(model, BitsAndBytesConfig(load_in_8bit=True))


@feature(tolerance=0.3)
def bitsandbytes_nf4(model):
    return quantised(model, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"))


def count_loads(module):
    """How often the group of a module's hook is brought to its device from now on."""
    group, loads = module._diffusers_hook.get_hook("group_offloading").group, []
    bring = group.onload_
    group.onload_ = lambda: (loads.append(1), bring())
    return loads


@feature()
def group_offload_leaf(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    loads = count_loads(model.proj_out)
    return lambda: loads and f"the last layer was brought {len(loads)} times"


@feature()
def group_offload_block(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    loads = count_loads(model.transformer_blocks[1])
    return lambda: loads and f"the second block was brought {len(loads)} times"


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


@feature(build=small_pipeline, run=draw)
def model_cpu_offload(pipe):
    pipe.enable_model_cpu_offload()
    return lambda: hasattr(pipe.transformer, "_hf_hook") and "a hook on the transformer"


@feature(build=small_pipeline, run=draw)
def sequential_cpu_offload(pipe):
    pipe.enable_sequential_cpu_offload()
    return lambda: hasattr(pipe.transformer.proj_out, "_hf_hook") and "hooks on each layer"


@feature(build=small_vae, run=decode)
def vae_slicing(vae):
    sizes = []
    vae.enable_slicing()
    vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[0]))
    return lambda: sizes == [1, 1] and "the decoder sees one of the batch at a time"


@feature(tolerance=0.3, build=nano_vae, run=there_and_back)
def vae_tiling(vae):
    """Each tile is normalised by itself, so tones shift a little. Nothing happens up to the model's own size."""
    tiles = []
    vae.enable_tiling()
    vae.decoder.register_forward_pre_hook(lambda *_: tiles.append(1))
    return lambda: len(tiles) > 1 and f"{len(tiles)} tiles"


@feature()
def set_attention_backend(model):
    """SD3's attention calls torch's function itself, and never asks which backend was set."""
    backends = ("native", "_native_math", "flex")
    processor = model.transformer_blocks[0].attn.processor
    for backend in backends:
        model.set_attention_backend(backend)
    return lambda: getattr(processor, "_attention_backend", None) in backends and "the processor has a backend"


@feature()
def compile_whole(model):
    """The forward pass is one graph, without a break."""
    graphs = []
    torch._dynamo.reset()
    model.compile(backend=lambda graph, _: graphs.append(1) or graph.forward, fullgraph=True)
    return lambda: graphs and f"{len(graphs)} graph for all steps"


@feature()
def compile_repeated_blocks(model):
    """diffusers does not know the name of SD3's block. `_repeated_blocks = ["JointTransformerBlock"]` mends it."""
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
    """SD3's pipeline opens no cache context, and in one the hook stumbles over the last block, which has no text."""
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.0))
    return lambda: "a cache"


def open_cache_context(model):
    """What a pipeline of diffusers' other models does around a call; SD3's does not."""
    model.context = CacheMixin.cache_context(model, "both")  # kept, or it would close at once
    model.context.__enter__()


@feature()
def first_block_cache_in_a_context(model):
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.0))
    open_cache_context(model)
    return lambda: "a cache"


def saved(model):
    """Count from now on how often an attention runs; the proof that some calls leave it out."""
    calls, runs = [], []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model.transformer_blocks[1].attn.to_q.register_forward_pre_hook(lambda *_: runs.append(1))
    return lambda: len(runs) < len(calls) and f"attention runs in {len(runs)} of {len(calls)} steps"


def timesteps_of(model):
    """The timesteps that the model is called with, as they come."""
    seen = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(float(given["timestep"][0])), with_kwargs=True)
    return seen


CACHE = 0.5  # an old answer is an approximation at best, above all of a random model in four steps


@feature(tolerance=CACHE)
def pyramid_attention_broadcast(model):
    """Every second step uses the attention's last output again; the pipeline must tell the hook its timestep."""
    # imported here, as the other caches are: older versions lack some
    from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    seen = timesteps_of(model)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: seen[-1]
    )
    apply_pyramid_attention_broadcast(model, config)
    return saved(model)


@feature(tolerance=CACHE)
def faster_cache(model):
    from diffusers.hooks import FasterCacheConfig, apply_faster_cache

    seen = timesteps_of(model)
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 800),
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        is_guidance_distilled=True,
        current_timestep_callback=lambda: seen[-1],
    )
    apply_faster_cache(model, config)
    return saved(model)


@feature(tolerance=CACHE)
def mag_cache(model):
    """It leaves out all blocks in some steps, by ratios that a first picture must measure."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    ratios = [1.0] * len(STEPS)
    config = MagCacheConfig(mag_ratios=ratios, num_inference_steps=len(STEPS), retention_ratio=0.3, max_skip_steps=1)
    apply_mag_cache(model, config)
    return saved(model)


def add_taylorseer(model):
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    config = TaylorSeerCacheConfig(disable_cache_before_step=1, cache_interval=2, taylor_factors_dtype=torch.float32)
    apply_taylorseer_cache(model, config)


@feature(tolerance=CACHE)
def taylorseer_cache(model):
    add_taylorseer(model)
    return saved(model)


@feature(tolerance=CACHE)
def taylorseer_cache_in_a_context(model):
    add_taylorseer(model)
    open_cache_context(model)
    return saved(model)


@feature()
def text_kv_cache(model):
    from diffusers.hooks import TextKVCacheConfig, apply_text_kv_cache

    apply_text_kv_cache(model, TextKVCacheConfig())
    return lambda: (
        any(hasattr(block, "_diffusers_hook") for block in model.transformer_blocks) and "hooks on the blocks"
    )


@feature()
def sea_cache(model):
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache

    apply_sea_cache(model, SeaCacheConfig())
    return saved(model)


@feature(build=small_pipeline, run=draw)
def attention_slicing(pipe):
    """SD3's attention has no sliced form, and torch's fused kernels never store what slicing would save."""
    pipe.enable_attention_slicing(1)
    return lambda: "Sliced" in type(pipe.transformer.transformer_blocks[0].attn.processor).__name__ and "slices"


def enable_parallelism(model, config):
    """As on the first of two processes with a GPU each; the group is torch's stand-in that moves nothing."""
    torch.distributed.init_process_group("fake", store=torch.distributed.HashStore(), rank=0, world_size=2)
    try:
        with mock.patch("torch.accelerator.device_count", return_value=2):
            model.enable_parallelism(config=config)
    finally:
        torch.distributed.destroy_process_group()


@feature()
def context_parallel(model):
    enable_parallelism(model, ContextParallelConfig(ulysses_degree=2))
    return lambda: "the tokens are shared out"


@feature()
def tensor_parallel(model):
    from diffusers import TensorParallelConfig

    enable_parallelism(model, TensorParallelConfig(tp_degree=2))
    return lambda: "the weights are shared out"


def reason(name: str) -> dict:
    """Why a feature does what it does, where its docstring says it."""
    words = FEATURES[name].change.__doc__
    return {"reason": " ".join(words.split())} if words else {}


def main() -> None:
    records.study(
        [{"feature": name, "qk_norm": qk_norm} for name, qk_norm in itertools.product(FEATURES, (None, "rms_norm"))],
        lambda row: outcome(row["feature"], row["qk_norm"]) | reason(row["feature"]),
        STORED,
        {
            "versions": records.versions("torch", "diffusers", "bitsandbytes", "torchao"),
            "cuda": torch.cuda.is_available(),
        },
        "python tests/measuring/matrix.py",
        tries=False,
        others=False,
    )


if __name__ == "__main__":
    main()
