"""Ways to make SD3 faster, each the few lines that one would write in a notebook.

A speed-up takes a loaded pipeline, changes it, and returns what its call needs besides the prompt, if anything. Some
change the picture; how much is measured with them. What a device lacks is one sentence.
"""

import functools
from collections.abc import Callable

import torch
import torch._inductor.config
from diffusers.hooks import (
    HookRegistry,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError

SPEEDUPS: dict[str, Callable] = {}


def need_cuda(what: str, capability: tuple[int, int] = (0, 0)) -> None:
    """Raises UserError where there is no CUDA device, or one that is too old."""
    if not torch.cuda.is_available():
        raise UserError(f"{what} need a CUDA device, and there is none here.")
    there = torch.cuda.get_device_capability()
    if there < capability:
        raise UserError(f"{what} need a CUDA device of capability {capability}, and this one has {there}.")


def speedup(change: Callable) -> Callable:
    SPEEDUPS[change.__name__] = change
    return change


@speedup
def eager(pipe):
    pass


@speedup
def compiled(pipe):
    """The announcement's recipe."""
    torch.set_float32_matmul_precision("high")
    inductor = torch._inductor.config
    inductor.conv_1x1_as_mm = True
    inductor.coordinate_descent_tuning = True
    inductor.epilogue_fusion = False
    inductor.coordinate_descent_check_all_directions = True
    pipe.transformer.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.transformer = torch.compile(pipe.transformer, mode="max-autotune", fullgraph=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True)


@speedup
def compiled_plainly(pipe):
    pipe.transformer.compile(fullgraph=True)


@speedup
def compiled_blocks(pipe):
    """compile_repeated_blocks for SD3: diffusers 0.42.1 does not name SD3's block, so we do."""
    pipe.transformer._repeated_blocks = ["JointTransformerBlock"]
    pipe.transformer.compile_repeated_blocks(fullgraph=True)


@speedup
def cuda_graphs(pipe):
    need_cuda("CUDA graphs")  # on a processor this mode is accepted, and records none
    pipe.transformer.compile(mode="reduce-overhead", fullgraph=True)


@speedup
def channels_last(pipe):
    pipe.vae.to(memory_format=torch.channels_last)


def attend_by(pipe, kernel):
    """The transformer's attention by one of torch's kernels; torch raises where that cannot do it."""
    forward = pipe.transformer.forward

    @functools.wraps(forward)
    def inside(*arguments, **named):
        with sdpa_kernel(kernel):
            return forward(*arguments, **named)

    pipe.transformer.forward = inside


@speedup
def cudnn_attention(pipe):
    need_cuda("cuDNN's attention kernels", (8, 0))
    attend_by(pipe, SDPBackend.CUDNN_ATTENTION)


@speedup
def flash_attention(pipe):
    need_cuda("flash attention's kernels", (8, 0))
    attend_by(pipe, SDPBackend.FLASH_ATTENTION)


@speedup
def attention_backend(pipe):
    """diffusers' own switch between kernels, if it moves anything on SD3: 0.42.1 gives SD3's processor no backend."""
    pipe.transformer.set_attention_backend("_native_cudnn" if torch.cuda.is_available() else "_native_math")
    processor = pipe.transformer.transformer_blocks[0].attn.processor
    if getattr(processor, "_attention_backend", None) is None:
        raise UserError("set_attention_backend does nothing on SD3: its processor calls torch's attention itself.")


def quantise_dynamically(pipe, config):
    """The linear layers of the blocks, their inputs too; without the modulation, whose input is a row a picture."""
    from torchao.quantization import quantize_

    blocks = pipe.transformer.transformer_blocks
    quantize_(blocks, config, lambda layer, name: isinstance(layer, torch.nn.Linear) and "norm" not in name)
    pipe.transformer.compile(fullgraph=True)  # fuses what eager does in steps of its own: the rounding of inputs


@speedup
def fp8_compiled(pipe):
    need_cuda("8-bit float products", (8, 9))
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    pipe.to(torch.bfloat16)  # scales a row are for bfloat16 alone
    quantise_dynamically(pipe, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))


@speedup
def int8_compiled(pipe):
    need_cuda("8-bit integer products", (8, 0))
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    quantise_dynamically(pipe, Int8DynamicActivationInt8WeightConfig())


@speedup
def best(pipe):
    """The announcement's recipe with cuDNN's attention: the same picture, but for rounding."""
    cudnn_attention(pipe)
    compiled(pipe)


@speedup
def best_fp8(pipe):
    cudnn_attention(pipe)
    fp8_compiled(pipe)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.vae.decode = torch.compile(pipe.vae.decode, fullgraph=True)


@speedup
def fused_qkv(pipe):
    """Exact on SD3 Medium. On a model with QK-norm (SD3.5, nano) it drops the norm, and the picture with it."""
    pipe.transformer.fuse_qkv_projections()


@speedup
def bfloat16(pipe):
    pipe.to(torch.bfloat16)


@speedup
def short_text(pipe):
    """The T5's text padded to 40 tokens, not 256: fewer tokens in every block."""
    return {"max_sequence_length": 40}


@speedup
def half_guidance(pipe):
    """Guidance in the first half of the steps only: the second half computes one velocity, not two."""

    def stop(pipe, step, timestep, inputs):
        if step + 1 == pipe.num_timesteps // 2:
            pipe._guidance_scale = 1.0
            return {name: both.chunk(2)[1] for name, both in inputs.items()}
        return {}

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    return {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": names}


@speedup
def attention_broadcast(pipe):
    """Between the timesteps 800 and 100, attention in every second step only; the others use its output again.

    Hooks of diffusers (arXiv 2408.12588). SD3's pipeline does not tell them its timestep, and its transformer does not
    reset them after a picture: the callback does both.
    """
    timesteps = [1000.0]
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: timesteps[-1]
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)

    def tell(pipe, step, timestep, inputs):
        timesteps.append(float(timestep))
        if step + 1 == pipe.num_timesteps:
            timesteps[:] = [1000.0]
            HookRegistry.check_if_exists_or_initialize(pipe.transformer).reset_stateful_hooks()
        return {}

    return {"callback_on_step_end": tell}


@speedup
def mag_cache(pipe, threshold=0.1):
    """Steps that leave out all blocks and add again what these added last, while that hardly changes in size.

    Hooks of diffusers (arXiv 2506.09045). The first picture runs in full; its ratios of sizes decide in the next ones.
    """
    blocks, learnt = pipe.transformer.transformer_blocks, []
    apply_mag_cache(pipe.transformer, MagCacheConfig(calibrate=True, num_inference_steps=1_000_000))
    states = blocks[0]._diffusers_hook.get_hook("mag_cache_leader_block_hook").state_manager

    def learn(pipe, step, timestep, inputs):
        if not learnt and step + 1 == pipe.num_timesteps:
            learnt.extend(states.get_state().calibration_ratios)
            config = MagCacheConfig(threshold=threshold, num_inference_steps=len(learnt), mag_ratios=learnt)
            apply_mag_cache(pipe.transformer, config)
        return {}

    return {"callback_on_step_end": learn}
