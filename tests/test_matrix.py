"""What works on SD3 in the diffusers that this project is tested with. A row that changes is news for lesson 05."""

import diffusers.hooks
import matrix
import pytest

# (feature, verdict without QK-norm, verdict with it); diffusers 0.42.1, a machine without a GPU
ROWS = [
    ("fuse_qkv_projections", "works", "changes the result"),
    ("forward_chunking", "works", "works"),
    ("forward_chunking_of_tokens", "raises", "raises"),
    ("layerwise_casting", "works", "works"),
    ("torchao_int8", "works", "works"),
    ("torchao_float8", "works", "works"),
    ("bitsandbytes_int8", "raises", "raises"),
    ("bitsandbytes_nf4", "raises", "raises"),
    ("group_offload_leaf", "works", "works"),
    ("group_offload_block", "works", "works"),
    ("group_offload_disk", "works", "works"),
    ("group_offload_stream", "raises", "raises"),
    ("model_cpu_offload", "raises", "raises"),
    ("sequential_cpu_offload", "raises", "raises"),
    ("vae_slicing", "works", "works"),
    ("vae_tiling", "changes the result", "changes the result"),
    ("set_attention_backend", "no effect", "no effect"),
    ("compile_whole", "works", "works"),
    ("compile_repeated_blocks", "raises", "raises"),
    ("compile_repeated_blocks_named", "works", "works"),
    ("enable_cache", "raises", "raises"),
    ("first_block_cache", "raises", "raises"),
    ("first_block_cache_in_a_context", "raises", "raises"),
    ("pyramid_attention_broadcast", "works", "works"),
    ("faster_cache", "works", "works"),
    ("mag_cache", "works", "works"),
    ("taylorseer_cache", "raises", "raises"),
    ("taylorseer_cache_in_a_context", "works", "works"),
    ("text_kv_cache", "no effect", "no effect"),
    ("sea_cache", "no effect", "no effect"),
    ("sd3kit_block_cache", "works", "works"),
    ("attention_slicing", "no effect", "no effect"),
    ("context_parallel", "raises", "raises"),
    ("tensor_parallel", "raises", "raises"),
]


def test_every_feature_has_a_row():
    assert {name for name, *_ in ROWS} == set(matrix.FEATURES)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
@pytest.mark.parametrize("row", ROWS, ids=[name for name, *_ in ROWS])
def test_a_feature_does_what_the_lesson_says(row, qk_norm):
    name, plain, normed = row
    if name.startswith("torchao"):
        pytest.importorskip("torchao")
    if name == "sea_cache" and not hasattr(diffusers.hooks, "SeaCacheConfig"):
        pytest.skip(f"diffusers {diffusers.__version__} has no SeaCache")
    found = matrix.outcome(name, qk_norm)
    assert found.verdict == (plain if qk_norm is None else normed), found


def test_first_block_cache_stops_at_the_last_block_even_in_a_context():
    assert "NoneType" in matrix.outcome("first_block_cache_in_a_context", None).detail


def test_context_parallelism_wants_a_plan_that_sd3_does_not_have():
    assert "cp_plan" in matrix.outcome("context_parallel", None).detail
