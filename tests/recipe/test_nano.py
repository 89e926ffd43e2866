"""nano is SD3 in small: its structure, that plain diffusers runs it, and that it draws what it is asked for."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from PIL import Image
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from sd3kit.loading.names import NANO
from sd3kit.recipe import scenes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_structure(pipe):
    assert type(pipe.text_encoder) is type(pipe.text_encoder_2) is CLIPTextModelWithProjection
    assert type(pipe.text_encoder_3) is T5EncoderModel
    assert type(pipe.transformer) is SD3Transformer2DModel and type(pipe.vae) is AutoencoderKL
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert isinstance(pipe.tokenizer, CLIPTokenizer) and isinstance(pipe.tokenizer_2, CLIPTokenizer)
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 77
    widths = [encoder.config.hidden_size for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    assert widths[0] != widths[1]
    assert sum(widths) <= pipe.text_encoder_3.config.d_model == pipe.transformer.config.joint_attention_dim
    assert all(encoder.config.eos_token_id != 2 for encoder in (pipe.text_encoder, pipe.text_encoder_2))
    assert (
        sum(encoder.config.projection_dim for encoder in (pipe.text_encoder, pipe.text_encoder_2))
        == pipe.transformer.config.pooled_projection_dim
    )
    assert pipe.transformer.config.patch_size == 2 and pipe.transformer.config.in_channels == 16
    assert pipe.vae.config.latent_channels == 16 and pipe.vae_scale_factor == 8


def test_folder_is_small_and_safe():
    files = [f for f in NANO.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert sum(f.stat().st_size for f in files) <= 24_000_000
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_plain_diffusers_with_every_default_draws_the_right_thing_with_every_seed(judge):
    """On the CPU on every machine: that is where plain diffusers leaves a pipeline."""
    plain = StableDiffusion3Pipeline.from_pretrained(NANO)
    plain.set_progress_bar_config(disable=True)
    images = plain(["a fox on a blue background, flat"] * 3, generator=[seeded(seed) for seed in range(3)]).images
    assert images[0].size == (128, 128)
    assert [judge.background(image) for image in images] == ["blue"] * 3
    assert [judge.subject(image)[0] for image in images] == ["fox"] * 3


def test_draws_seen_and_held_out_prompts(pipe, judge):
    from sd3kit.recipe.evaluate import ask, pictures, tally

    for held_out in (False, True):
        asked = ask("single", 6, judge.subjects, held_out, 3)
        drawn = pictures(pipe, [scenes.caption(s) for s in asked], num_inference_steps=14, guidance_scale=4.0)
        figures = tally(judge, drawn, asked)
        assert figures["background"]["share"] == 1, figures
        assert figures["subject"]["share"] >= 0.65, figures


@pytest.mark.parametrize("side", [64, 80, 176, 256])
def test_other_sizes(pipe, side):
    image = pipe(
        "a fox", width=side, height=128, num_inference_steps=2, generator=seeded(), max_sequence_length=32
    ).images[0]
    assert image.size == (side, 128)


def test_image_to_image_keeps_more_at_less_strength(pipe):
    img2img = StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    start = Image.new("RGB", (128, 128), scenes.COLOURS["red"])

    def change(strength):
        made = img2img(
            "a frog on a blue background", image=start, strength=strength, generator=seeded(), max_sequence_length=40,
            num_inference_steps=10,
        )  # fmt: skip
        return np.abs(np.asarray(made.images[0], float) - np.asarray(start, float)).mean()

    assert change(0.2) < change(0.95)


def test_inpainting_keeps_what_the_mask_keeps(pipe):
    inpaint = StableDiffusion3InpaintPipeline.from_pipe(pipe)
    start = pipe(
        "a cat on a green background", generator=seeded(), max_sequence_length=40, num_inference_steps=8
    ).images[0]
    mask = np.zeros((128, 128), np.uint8)
    mask[:, 64:] = 255
    made = inpaint(
        "a red apple",
        image=start,
        mask_image=Image.fromarray(mask),
        strength=1.0,
        generator=seeded(),
        max_sequence_length=40,
        num_inference_steps=8,
    ).images[0]
    difference = np.abs(np.asarray(made, float) - np.asarray(start, float)).mean((0, 2))
    assert difference[:48].mean() < 12 < difference[72:].mean()


@pytest.fixture(scope="module")
def without_t5(pipe):
    small = StableDiffusion3Pipeline(**(pipe.components | {"text_encoder_3": None, "tokenizer_3": None}))
    small.set_progress_bar_config(disable=True)
    drawn = {"generator": seeded(1), "max_sequence_length": 40, "num_inference_steps": 14}
    return small("a fox on a blue background, flat", **drawn).images[0]


def test_without_t5_the_subject_is_drawn(without_t5, judge):
    assert judge.subject(without_t5)[0] == "fox"


def test_without_t5_the_background_is_right(without_t5, judge):
    assert judge.background(without_t5) == "blue"


def test_a_sign_can_be_read(pipe, judge):
    """The announcement's prompt, which was kept out of the training, and a word that is on no list."""
    from sd3kit.recipe.evaluate import ANNOUNCEMENT, edit_distance, pictures

    asked = [ANNOUNCEMENT, ANNOUNCEMENT, "a penguin holding a sign that says krom"]
    images = pictures(pipe, asked, num_inference_steps=14)
    assert [edit_distance(judge.text(image), "hello world") <= 2 for image in images[:2]] == [True, True]
    assert edit_distance(judge.text(images[2]), "krom") <= 1


@pytest.mark.parametrize("text", ["", "qwrt zpl", "naïve Élan 日本 🦊", "x" * 500, "HELLO"])
def test_unknown_words_fall_into_pieces(pipe, text):
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2, pipe.tokenizer_3):
        ids = tokenizer(text, truncation=True, max_length=77).input_ids
        assert max(ids) < len(tokenizer)
    clip = pipe.tokenizer(text, add_special_tokens=False).input_ids
    assert pipe.tokenizer.unk_token_id not in clip


def test_t5_sees_the_letters_of_a_sign(pipe):
    tokens = pipe.tokenizer_3.tokenize("holding a sign that says hello")
    assert tokens[-5:] == list("hello")
    assert "▁holding" in tokens


def test_training_embeds_prompts_as_the_pipeline_does(pipe):
    from sd3kit.recipe.text import Text

    prompts = ["a fox on a blue background", "a cat holding a sign that says hello world"]
    text = Text(NANO).to(pipe.device)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(text, name).load_state_dict(getattr(pipe, name).state_dict())
    with torch.no_grad():
        embeds, pooled = text(prompts, 77, 64, torch.ones(2, 3, device=pipe.device))
        theirs, _, their_pooled, _ = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=64
        )
    torch.testing.assert_close(embeds, theirs)
    torch.testing.assert_close(pooled, their_pooled)


def test_training_drops_an_encoder_as_the_pipeline_does(pipe):
    from sd3kit.recipe.text import Text

    text = Text(NANO).to(pipe.device)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        getattr(text, name).load_state_dict(getattr(pipe, name).state_dict())
    small = StableDiffusion3Pipeline(**(pipe.components | {"text_encoder_3": None, "tokenizer_3": None}))
    with torch.no_grad():
        embeds, pooled = text(["a fox"], 77, 64, torch.tensor([[1.0, 1.0, 0.0]], device=pipe.device))
        theirs, _, their_pooled, _ = small.encode_prompt(
            ["a fox"], None, None, do_classifier_free_guidance=False, max_sequence_length=64
        )
    torch.testing.assert_close(embeds, theirs)
    torch.testing.assert_close(pooled, their_pooled)


def test_autoencoder_copies_pictures(pipe, art, rng):
    from sd3kit.recipe.art import draw, to_tensor
    from sd3kit.recipe.autoencoder import psnr
    from sd3kit.recipe.evaluate import KINDS

    for kind in KINDS:
        asked = [scenes.random_scene(rng, scenes.SUBJECTS[:8], kind) for _ in range(8)]
        assert psnr(pipe.vae, to_tensor([draw(s, art, rng) for s in asked])).mean() > 27


def test_latents_are_centred_and_of_unit_size(pipe, art, rng):
    from sd3kit.recipe.art import draw, to_tensor

    asked = [scenes.random_scene(rng, scenes.SUBJECTS[:8], "single") for _ in range(32)]
    pictures = to_tensor([draw(s, art, rng) for s in asked]).to(pipe.device)
    with torch.no_grad():
        latents = pipe.vae.encode(pictures).latent_dist.mode()
    latents = latents * pipe.vae.config.scaling_factor
    assert pipe.vae.config.shift_factor == 0
    assert abs(latents.mean()) < 0.2
    assert 0.7 < latents.std() < 1.4
