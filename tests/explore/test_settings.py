"""Odd settings, schedulers, LoRA files and masks: what is given, and what must come out. A case a row."""

import copy
import io

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd3kit import explore
from sd3kit.explore.drawing import checked
from sd3kit.pictures import PictureError

PROMPT = "a fox on a blue background, flat"
QUICK = {"steps": 2, "size": 64}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# what is given: what must be stored
TAKEN = {
    "numpy whole": ({"seed": np.int64(3)}, {"seed": 3}),
    "numpy unsigned": ({"seed": np.uint64(2**63 - 1)}, {"seed": 2**63 - 1}),
    "numpy single": ({"guidance": np.float32(2.5)}, {"guidance": 2.5}),
    "numpy half": ({"shift": np.float16(1.5)}, {"shift": 1.5}),
    "whole for float": ({"guidance": 3}, {"guidance": 3.0}),
    "float that is whole": ({"steps": 4.0}, {"steps": 4}),
    "numpy text": ({"prompt": np.str_("a fox")}, {"prompt": "a fox"}),
    "ends": ({"steps": 1000, "guidance": 20, "seed": 0, "shift": 0.1}, {"steps": 1000, "guidance": 20.0, "shift": 0.1}),
    "emoji": ({"prompt": "a 🦊"}, {"prompt": "a 🦊"}),
}
# what is given: what must be said
REFUSED = {
    "no prompt": ({"prompt": "  "}, "prompt is empty"),
    "prompts": ({"prompt": ["a fox", "a cat"]}, "prompt must be one text, not a list: draw several in a loop"),
    "negative prompts": ({"negative_prompt": ["a cat"]}, "negative prompt must be one text, not a list"),
    "bytes": ({"prompt": b"a fox"}, "one text, not a bytes"),
    "none": ({"prompt": None}, "one text, not a NoneType"),
    "half a character": ({"prompt": "a \ud800 fox"}, "A letter of the prompt is no text"),
    "seed below": ({"seed": -5}, "Seed must be a whole number from 0 to .*, not -5"),
    "seed above": ({"seed": 2**63}, "Seed must be"),
    "seed of numpy below": ({"seed": np.int64(-1)}, "Seed must be"),
    "seed as text": ({"seed": "3"}, "Seed must be .*, not '3'"),
    "seed in a tensor": ({"seed": torch.tensor(3)}, "Seed must be"),
    "seed that is true": ({"seed": True}, "Seed must be"),
    "half a seed": ({"seed": 2.5}, "whole number"),
    "no steps": ({"steps": 0}, "Steps must be a whole number from 1 to 1000"),
    "steps not a number": ({"steps": float("nan")}, "Steps must be"),
    "endless steps": ({"steps": float("inf")}, "Steps must be"),
    "steps of 10^9": ({"steps": 10**9}, "Steps must be"),
    "guidance not a number": ({"guidance": float("nan")}, "Guidance must be a number from 1 to 20, not nan"),
    "guidance of numpy, not a number": ({"guidance": np.float32("nan")}, "Guidance must be"),
    "endless guidance": ({"guidance": float("inf")}, "Guidance must be"),
    "guidance below": ({"guidance": -7}, "Guidance must be"),
    "complex guidance": ({"guidance": 3j}, "Guidance must be"),
    "shift of zero": ({"shift": 0}, "Shift must be a number from 0.1"),
    "shift not a number": ({"shift": float("nan")}, "Shift must be"),
    "odd size": ({"size": 100}, "multiple of 16 from 64 to 256"),
    "size above": ({"size": 512}, "Size must be a whole number from 64 to 256"),
    "no size": ({"size": 0}, "Size must be"),
    "size below": ({"size": -64}, "Size must be"),
}
STRENGTHS = {
    "not a number": (float("nan"), "Strength must be a number from 0 to 1"),
    "below": (-0.5, "Strength must be"),
    "above": (1.5, "Strength must be"),
    "too little": (0.1, "below one step"),
}
SCHEDULERS = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}, 3.0),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}, None),
    "DPM-Solver": ("DPMSolverMultistepScheduler", FLOW | {"flow_shift": 2.0}, None),
    "UniPC": ("UniPCMultistepScheduler", FLOW | {"flow_shift": 3.0}, None),
    "DEIS": ("DEISMultistepScheduler", FLOW, None),
    "DPM-Solver, single": ("DPMSolverSinglestepScheduler", FLOW, None),
    "LCM": ("FlowMatchLCMScheduler", {}, 3.0),
    "dynamic": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, None),
}
NO_FLOW = ("EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler")


@pytest.mark.parametrize(("given", "stored"), TAKEN.values(), ids=TAKEN)
def test_numbers_of_any_kind_are_stored_as_pythons_own(pipe, given, stored):
    own = dict.fromkeys(("steps", "guidance", "shift", "size"))
    settings = checked(pipe, {"prompt": PROMPT, "negative_prompt": "", "seed": 0} | own | given)
    for name, value in stored.items():
        assert settings[name] == value and type(settings[name]) is type(value)
    drawn = explore.Drawn(Image.new("RGB", (8, 8)), settings, 1.0, 1, 1)
    assert explore.from_png(drawn.png()) == settings


@pytest.mark.parametrize(("wrong", "words"), REFUSED.values(), ids=REFUSED)
def test_wrong_settings_are_named_before_anything_is_computed(pipe, wrong, words):
    def computed(*_):
        raise AssertionError("the transformer was called")

    hook = pipe.transformer.register_forward_pre_hook(computed)
    try:
        with pytest.raises(ValueError, match=words):
            explore.text_to_image(pipe, **{"prompt": PROMPT, **QUICK, **wrong})
    finally:
        hook.remove()


def test_a_setting_that_does_not_exist_is_named(pipe):
    with pytest.raises(TypeError, match="unexpected keyword argument 'cfg'"):
        explore.schedule(pipe, PROMPT, cfg=3)


@pytest.mark.parametrize(("strength", "words"), STRENGTHS.values(), ids=STRENGTHS)
def test_strengths_that_cannot_be_used(pipe, strength, words):
    with pytest.raises(ValueError, match=words):
        explore.image_to_image(pipe, Image.new("RGB", (64, 64)), PROMPT, strength=strength, steps=8, size=64)


@pytest.fixture
def scheduled(pipe):
    """A pipeline of the same parts, whose scheduler may be changed."""
    return copy.copy(pipe)


@pytest.mark.parametrize(("name", "more", "shift"), SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_of_diffusers_draw_what_the_pipeline_draws(scheduled, name, more, shift):
    scheduled.scheduler = getattr(diffusers, name).from_config(scheduled.scheduler.config, **more)
    seen = []
    torch.manual_seed(0)
    drawn = explore.text_to_image(scheduled, PROMPT, seed=5, watch=seen.append, **QUICK)
    torch.manual_seed(0)  # some add noise of the global generator
    plain = scheduled(
        PROMPT, generator=torch.Generator().manual_seed(5), num_inference_steps=2, width=64, height=64,
        guidance_scale=drawn.settings["guidance"], max_sequence_length=40,
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(drawn.image), np.asarray(plain))
    assert drawn.settings.get("shift") == shift
    assert all(torch.isfinite(step.latents).all() for step in seen) and len(seen) == drawn.total
    if shift is None:
        with pytest.raises(ValueError, match="takes a shift only when it is made"):
            explore.text_to_image(scheduled, PROMPT, shift=2.0)
        with pytest.raises(ValueError, match="has no shift to look at"):
            explore.schedule(scheduled, PROMPT, **QUICK)
    else:
        other = explore.text_to_image(scheduled, PROMPT, seed=5, shift=8.0, **QUICK)
        assert not np.array_equal(np.asarray(drawn.image), np.asarray(other.image)), "the shift has an effect"
        levels = explore.schedule(scheduled, PROMPT, **QUICK).data["sigmas"]
        assert levels[1:].tolist() == pytest.approx([step.sigma for step in seen])


@pytest.mark.parametrize("name", NO_FLOW)
def test_schedulers_of_other_models_are_one_sentence(scheduled, name):
    scheduled.scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=f"{name} is not set for a rectified flow"):
        explore.text_to_image(scheduled, PROMPT, **QUICK)


def test_a_scheduler_that_cannot_start_from_a_picture_is_one_sentence(scheduled):
    scheduled.scheduler = diffusers.UniPCMultistepScheduler.from_config(scheduled.scheduler.config, **FLOW)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler cannot start from a picture"):
        explore.image_to_image(scheduled, Image.new("RGB", (64, 64)), PROMPT, **QUICK)


# ---- pictures and masks


def half_clear(mode="RGBA"):
    """White; opaque on the left, transparent on the right."""
    image = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 32, 64))
    return image.convert(mode)


def turned(image):
    """The picture as a file that has to be turned back by a quarter."""
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(data, "PNG", exif=exif)
    return Image.open(data)


left = Image.new("L", (64, 64))
left.paste(255, (0, 0, 32, 64))
MASKS = {
    "gray": left,
    "RGB": left.convert("RGB"),
    "one bit": left.convert("1"),
    "16 bits": Image.fromarray(np.asarray(left).astype(np.uint16) * 257),
    "float": Image.fromarray(np.asarray(left).astype(np.float32) / 255),
    "transparent is kept": half_clear(),
    "gray with alpha": half_clear("LA"),
    "turned by EXIF": turned(left),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_of_any_kind_mean_the_same(pipe, mask):
    red = Image.new("RGB", (64, 64), "red")
    drawn = explore.image_to_image(pipe, red, PROMPT, mask=mask, strength=1, steps=1, size=64)
    assert np.array_equal(np.asarray(drawn.data["mask"]), np.asarray(left))


@pytest.mark.parametrize(
    ("picture", "mask", "words"),
    [
        (Image.new("RGB", (200, 100)), left, "200 x 100 pixels and the mask 64 x 64"),
        (turned(Image.new("RGB", (200, 100))), Image.new("L", (100, 200), 255), "200 x 100 pixels and the mask"),
        (Image.new("RGB", (64, 64)), Image.new("L", (64, 64)), "mask is empty"),
        (Image.new("RGB", (64, 64)), Image.new("RGBA", (64, 64), (255, 255, 255, 0)), "mask is empty"),
        (Image.new("RGB", (0, 0)), left, "picture is empty"),
        (Image.new("RGB", (1, 60000)), left, "1 x 60000"),
        (Image.new("RGB", (64, 64)), Image.new("L", (60000, 1), 255), "60000 x 1"),
    ],
)
def test_pictures_and_masks_that_do_not_fit_are_refused(pipe, picture, mask, words):
    with pytest.raises(ValueError, match=words):
        explore.image_to_image(pipe, picture, PROMPT, mask=mask, **QUICK)


def test_a_picture_and_a_mask_of_other_sizes_but_one_shape_fit(pipe):
    wide, mask = Image.new("RGB", (300, 199)), Image.new("L", (60, 40), 255)
    drawn = explore.image_to_image(pipe, wide, PROMPT, mask=mask, **QUICK)
    assert drawn.data["mask"].size == drawn.data["image"].size == (64, 64)


def test_a_picture_of_16_bits_is_scaled_and_one_that_is_clear_lies_on_white(pipe):
    ramp = Image.fromarray(np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1)))
    given = np.asarray(explore.image_to_image(pipe, ramp, PROMPT, **QUICK).data["image"])[..., 0]
    assert given.min() == 0 and given.max() == 255 and 120 < given.mean() < 135
    clear = explore.image_to_image(pipe, Image.new("RGBA", (64, 64)), PROMPT, **QUICK).data["image"]
    assert clear.getpixel((5, 5)) == (255, 255, 255)
    with pytest.raises(PictureError, match="is empty"):
        explore.image_to_image(pipe, Image.new("RGB", (0, 5)), PROMPT, **QUICK)


# ---- LoRA


LAYOUTS = {
    "diffusers": ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "diffusers: load it"),
    "kohya": ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", "kohya's sd-scripts"),
    "kohya, text": ("lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "kohya's sd-scripts"),
    "ComfyUI": ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_down.weight", "or ComfyUI"),
    "ComfyUI over diffusers": ("diffusion_model.transformer_blocks.0.attn.to_q.lora_A.weight", 'with "transformer."'),
    "peft": ("base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight", "peft's own"),
    "bare": ("transformer_blocks.0.attn.to_q.lora_A.weight", "load_lora_adapter"),
    "unknown": ("unet.down.lora_A.weight", "unknown layout, with keys such as 'unet"),
    "a model": ("transformer_blocks.0.attn.to_q.weight", "no keys of a LoRA"),
}


@pytest.mark.parametrize(("key", "words"), LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_of_a_lora_file_is_named(tmp_path, key, words):
    assert words in explore.lora_layout([key])
    save_file({key: torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    assert explore.lora_layout(tmp_path / "lora.safetensors") == explore.lora_layout([key])


def test_a_file_that_is_no_lora_is_one_sentence(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"lora\.safetensors is no safetensors file"):
        explore.lora_layout(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 5, "1", None])
def test_scales_that_cannot_be_used(with_lora, scale):
    with pytest.raises(ValueError, match="The scale of dog must be a number from -2 to 2"):
        explore.lora(with_lora, PROMPT, {"dog": scale}, **QUICK)


def test_a_fused_lora_has_no_scale(with_lora):
    with_lora.fuse_lora()
    with pytest.raises(ValueError, match=r"call pipe\.unfuse_lora\(\) first"):
        explore.lora(with_lora, PROMPT, {"dog": 0}, **QUICK)
    with_lora.unfuse_lora()
    drawn = explore.lora(with_lora, PROMPT, {"dog": np.float32(0.5)}, **QUICK)
    assert drawn.settings["scales"] == {"dog": 0.5} and explore.from_png(drawn.png()) == drawn.settings
