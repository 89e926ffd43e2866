"""Ways to make SD3 faster, each the few lines that one would write in a notebook.

A speed-up takes a loaded pipeline, changes it, and returns what its call needs besides the prompt. Some change the
picture; how much is measured with them.
"""

from collections.abc import Callable

import torch
from diffusers.hooks import HookRegistry, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

INDUCTOR_FLAGS = (
    "conv_1x1_as_mm",
    "coordinate_descent_tuning",
    "epilogue_fusion",
    "coordinate_descent_check_all_directions",
)
SPEEDUPS: dict[str, Callable] = {}
COMPILED = ("compiled", "compiled_plainly", "compiled_blocks", "cuda_graphs")  # the same work in other code


def speedup(change: Callable) -> Callable:
    SPEEDUPS[change.__name__] = change
    return change


@speedup
def eager(pipe):
    return {}


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
    return {}


@speedup
def compiled_plainly(pipe):
    pipe.transformer.compile(fullgraph=True)
    return {}


@speedup
def compiled_blocks(pipe):
    """compile_repeated_blocks for SD3: diffusers 0.42.1 does not name SD3's block, so we do."""
    pipe.transformer._repeated_blocks = ["JointTransformerBlock"]
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return {}


@speedup
def cuda_graphs(pipe):
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a CUDA device; on a processor mode='reduce-overhead' records none.")
    pipe.transformer.compile(mode="reduce-overhead", fullgraph=True)
    return {}


@speedup
def channels_last(pipe):
    pipe.vae.to(memory_format=torch.channels_last)
    return {}


@speedup
def fused_qkv(pipe):
    """Exact on SD3 Medium. On a model with QK-norm (SD3.5, nano) it drops the norm, and the picture with it."""
    pipe.transformer.fuse_qkv_projections()
    return {}


@speedup
def bfloat16(pipe):
    pipe.to(torch.bfloat16)
    return {}


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


class BlockCache(torch.nn.Module):
    """All blocks of a transformer as one: the first always runs; what the others add is used again while the first
    one's own contribution has changed by less than `threshold`.

    The idea of ParaAttention's first-block cache, which diffusers has too; its version stops on SD3, whose last block
    returns no text (0.42.1).
    """

    def __init__(self, blocks: torch.nn.ModuleList, threshold: float = 0.1):
        super().__init__()
        self.first, self.rest, self.threshold = blocks[0], blocks[1:], threshold
        self.forget()

    def forget(self) -> None:
        self.before = self.added = None
        self.skipped = self.called = 0

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        text, image = self.first(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        change = image - hidden_states
        self.called += 1
        if self.before is not None and self.before.shape == change.shape:
            if (change - self.before).abs().mean() < self.threshold * self.before.abs().mean():
                self.skipped += 1
                return None, image + self.added
        after = image
        for block in self.rest:
            text, after = block(after, text, temb, joint_attention_kwargs)
        self.before, self.added = change, after - image
        return None, after


@speedup
def block_cache(pipe):
    cache = BlockCache(pipe.transformer.transformer_blocks)
    pipe.transformer.transformer_blocks = torch.nn.ModuleList([cache])

    def forget(pipe, step, timestep, inputs):
        if step + 1 == pipe.num_timesteps:
            cache.before = None
        return {}

    return {"callback_on_step_end": forget}
