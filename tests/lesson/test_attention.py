"""Attention in the open: the same pictures as diffusers' own processor, and maps that mean what they say.

The two tests of small random models compare almost to the last digit: they run on the CPU on every machine.
"""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from sd3kit.lesson import attention


@pytest.mark.parametrize(
    "switches", [{}, {"qk_norm": "rms_norm"}, {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}]
)
def test_the_open_processor_agrees_with_diffusers(switches):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=24, pos_embed_max_size=16, **switches,
    ).eval()  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    given = torch.randn(2, 16, 16, 16), torch.randn(2, 9, 32), torch.randn(2, 24), torch.tensor([100.0, 900.0])
    before = [block.attn.processor for block in model.transformer_blocks]
    with torch.no_grad():
        reference = model(*given).sample
        with attention.opened(model, lambda *all_three: all_three) as processors:
            ours = model(*given).sample
    torch.testing.assert_close(ours, reference, atol=1e-5 * reference.abs().max().item(), rtol=1e-4)
    assert [block.attn.processor for block in model.transformer_blocks] == before
    for processor in processors:
        logits, weights, outputs = processor.kept
        assert logits.shape == weights.shape == (2, 4, 64 + 9, 64 + 9) and outputs.shape == (2, 64 + 9, 64)
        torch.testing.assert_close(weights, logits.softmax(-1))


def test_concept_tokens_read_the_picture_and_leave_no_trace():
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16, num_layers=2, attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=64, pooled_projection_dim=24, pos_embed_max_size=16, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.15)
    picture, text, pooled, timestep = (
        torch.randn(1, 16, 16, 16),
        torch.randn(1, 9, 32),
        torch.randn(1, 24),
        torch.ones(1),
    )
    along = torch.cat([text, torch.randn(1, 3, 32)], 1)
    with torch.no_grad():
        alone = model(picture, text, pooled, timestep).sample
        noticed = model(picture, along, pooled, timestep).sample
        with attention.opened(model, lambda logits, weights, outputs: weights, concepts=3) as processors:
            unnoticed = model(picture, along, pooled, timestep).sample
    torch.testing.assert_close(unnoticed, alone, atol=1e-5 * alone.abs().max().item(), rtol=1e-4)
    assert (noticed - alone).abs().max() > 100 * (unnoticed - alone).abs().max()
    for processor in processors:
        read = processor.kept[0, :, -3:]  # what the three read: the 64 picture tokens and each other
        assert (read[..., :64] > 0).all() and (read[..., 64:-3] == 0).all() and (read[..., -3:] > 0).all()


@pytest.mark.parametrize("more", [{}, {"clip_skip": 1, "prompt_2": "an owl", "negative_prompt": "a red cat"}])
def test_maps_leave_the_picture_as_it_is_and_have_a_place_for_each_token(pipe, more):
    prompt = "a fox on a blue background, flat"
    settings = {"num_inference_steps": 2, "max_sequence_length": 40} | more
    found = attention.maps(pipe, prompt, ["fox", "blue"], seed=3, steps=2, **more)
    plain = pipe(prompt, generator=torch.Generator().manual_seed(3), **settings).images[0]
    difference = torch.tensor(list(found["image"].tobytes())).float() - torch.tensor(list(plain.tobytes())).float()
    assert difference.abs().max() <= 2
    layers = len(pipe.transformer.transformer_blocks)
    assert found["raw"].shape == found["concept"].shape == (2, 2, layers, 8, 8)
    assert (found["raw"] >= 0).all() and found["raw"].sum(0).max() <= 1 + 1e-5
    torch.testing.assert_close(found["concept"].sum(0), torch.ones(2, layers, 8, 8))


def test_a_words_tokens_are_those_that_spell_it(pipe):
    prompt = "a fox holding a sign that says hello"
    t5 = pipe.tokenizer_3
    found = [place - 77 for place in attention.word_tokens(pipe, prompt, "hello") if place >= 77]
    ids = t5(prompt).input_ids
    assert "".join(t5.convert_ids_to_tokens([ids[i] for i in found])).strip("▁") == "hello"


def test_a_word_is_looked_for_as_a_whole(pipe):
    prompt = "three apples, and A fox"
    alone, inside = (attention.word_tokens(pipe, prompt, word) for word in ("a", "apples"))
    assert alone and not set(alone) & set(inside)
    with pytest.raises(ValueError, match="not in the prompt"):
        attention.word_tokens(pipe, prompt, "apple")
    with pytest.raises(ValueError, match="no word to look at"):
        attention.maps(pipe, prompt, [])
