"""`load`: names, errors in one sentence, random weights, and that what it gives is plain diffusers."""

import concurrent.futures
import errno
import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from huggingface_hub import errors as hub

import sd3kit
from sd3kit.loading import configs, device, names, pipeline
from sd3kit.loading.device import pick_device, pick_dtype
from sd3kit.loading.hub import explain
from sd3kit.loading.names import NANO, TURBO, own_settings, resolve
from sd3kit.recipe.evaluate import ask, judge_scene, pictures
from sd3kit.recipe.scenes import caption


def hub_error(kind, message="no"):
    import httpx

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))
    return kind(message, response=response)


def test_nano_is_the_default_and_a_plain_pipeline(pipe, capsys):
    assert type(pipe) is StableDiffusion3Pipeline
    assert resolve() == str(NANO)


def test_says_in_one_line_what_it_picked_and_why(capsys):
    sd3kit.load("nano", device="cpu")
    assert capsys.readouterr().out == "nano on cpu in float32: it is small enough for full precision.\n"


def test_the_environment_sets_the_default(monkeypatch):
    monkeypatch.setenv("SD3KIT_MODEL", "medium")
    assert resolve() == configs.HUB["medium"]
    assert resolve("nano") == str(NANO)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("medum", "did you mean medium"),
        ("nono", "did you mean nano"),
        ("zzz", "use one of nano"),
        ("3.5-lage", "3.5-large"),
    ],
)
def test_an_unknown_name_offers_the_nearest(name, words):
    with pytest.raises(sd3kit.LoadError, match=words):
        sd3kit.load(name)


def test_two_threads_load_at_once():
    """The libraries patch themselves while a model loads: two at once would leave those patches behind."""
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        pipes = list(threads.map(lambda name: sd3kit.load(name, quiet=True), ["nano"] * 3))
    again = sd3kit.load("nano", quiet=True)
    for one in pipes:
        pairs = zip(one.text_encoder_3.parameters(), again.text_encoder_3.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert "TORCHDYNAMO_DISABLE" not in os.environ


def test_a_model_that_nothing_is_known_of_has_the_usual_settings():
    assert own_settings("somebody/fine-tuned") == own_settings("medium") == {"steps": 28, "guidance": 7.0}


def test_a_full_memory_is_no_damaged_file(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", full)
    with pytest.raises(sd3kit.LoadError, match="does not fit on cpu"):
        sd3kit.load("nano", device="cpu", quiet=True)


def test_an_empty_folder(tmp_path):
    with pytest.raises(sd3kit.LoadError, match=r"no model_index\.json"):
        sd3kit.load(tmp_path)


def test_nano_turbo_is_nano_with_its_lora_fused(turbo, pipe, judge):
    assert type(turbo) is StableDiffusion3Pipeline and not turbo.get_list_adapters()
    assert turbo.own_settings == {"steps": 4, "guidance": 1.0} and pipe.own_settings == {"steps": 28, "guidance": 4.0}
    plain = StableDiffusion3Pipeline.from_pretrained(NANO)
    plain.load_lora_weights(TURBO, weight_name="pytorch_lora_weights.safetensors")
    plain.scheduler = type(plain.scheduler).from_pretrained(TURBO, subfolder="scheduler")
    for one in (plain, turbo):
        one.set_progress_bar_config(disable=True)
    asked = ask("single", 4, judge.subjects, True, 0)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0}
    drawn = pictures(turbo, [caption(scene) for scene in asked], **settings)
    as_loaded = pictures(plain, [caption(asked[0])], **settings)[0]
    change = np.abs(np.asarray(as_loaded, np.float32) - np.asarray(drawn[0], np.float32))
    assert change.mean() < 1, "diffusers' own loading gives the same picture"
    right = [judge_scene(judge, *pair)["subject"] for pair in zip(drawn, asked, strict=True)]
    assert sum(right) >= 3, "the adapter belongs to these weights"


def test_a_missing_or_damaged_adapter_is_told_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "TURBO", tmp_path)
    monkeypatch.setattr(pipeline, "TURBO", tmp_path)
    with pytest.raises(sd3kit.LoadError, match=r"scheduler is missing: install sd3kit again"):
        sd3kit.load("nano-turbo")
    shutil.copytree(TURBO, tmp_path, dirs_exist_ok=True)
    (tmp_path / pipeline.LORA).write_bytes(b"no weights")
    with pytest.raises(sd3kit.LoadError, match=rf"{pipeline.LORA} is damaged .*: install sd3kit again"):
        sd3kit.load("nano-turbo")


def test_a_pickle_is_never_opened(tmp_path):
    vae = shutil.copytree(NANO, tmp_path / "mine") / "vae"
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, vae / "diffusion_pytorch_model.bin")
    with pytest.raises(sd3kit.LoadError, match=r"no file named diffusion_pytorch_model\.safetensors"):
        sd3kit.load(tmp_path / "mine")


def test_a_real_model_without_a_network_says_so():
    with pytest.raises(sd3kit.LoadError, match="cannot be reached"):
        sd3kit.load("medium")


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (hub_error(hub.GatedRepoError), "accept its licence.*hf auth login"),
        (hub_error(hub.RepositoryNotFoundError), "no model"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (ConnectionError("refused"), "cannot be reached"),
    ],
)
def test_causes_are_found_behind_what_diffusers_raises(cause, words):
    import re

    outer = OSError("couldn't connect")
    outer.__cause__ = cause
    sentence = explain(outer, "medium", configs.HUB["medium"])
    assert re.search(words, sentence) and "\n" not in sentence


def test_an_error_of_another_kind_is_not_disguised():
    assert explain(KeyError("x"), "medium", configs.HUB["medium"]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "gpu", "meta", ""])
def test_a_device_that_is_not_there(device, monkeypatch):
    with pytest.raises(sd3kit.LoadError, match=r"device asks for .* use .*cpu"):
        sd3kit.load(device=device)
    if device:
        monkeypatch.setenv("SD3KIT_DEVICE", device)
        with pytest.raises(sd3kit.LoadError, match="SD3KIT_DEVICE asks for"):
            sd3kit.load()


def test_one_variable_decides_the_device(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("SD3KIT_DEVICE", "cpu")
    assert pick_device() == "cpu" and sd3kit.load().device.type == "cpu"
    assert "nano on cpu" in capsys.readouterr().out


def test_more_processes_than_gpus_get_one_sentence(monkeypatch):
    monkeypatch.setattr(device, "pick_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(sd3kit.LoadError, match=r"2 processes .* has 1 GPU: .*--num_processes 1"):
        device.processes()


def test_weights_must_be_named_right():
    with pytest.raises(ValueError, match=r"trained.*random"):
        sd3kit.load(weights="rnadom")


def test_precision_by_model_and_device():
    assert pick_dtype("nano", "cuda")[0] is torch.float32
    assert pick_dtype("medium", "cuda")[0] is torch.float16
    assert pick_dtype("medium", "cpu")[0] is torch.bfloat16


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_precision_on_a_gpu_without_bfloat16(has, dtype, monkeypatch):
    """A T4 has none, and torch would emulate it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has or including_emulation)
    assert pick_dtype("3.5-medium", "cuda")[0] is dtype


def test_random_weights_draw_noise_and_say_so(capsys):
    pipe = sd3kit.load("nano", weights="random", device="cpu")
    assert "noise" in capsys.readouterr().out
    image = pipe("a fox", num_inference_steps=1, output_type="pt", max_sequence_length=16).images
    assert image.shape == (1, 3, 128, 128)


def test_random_knows_only_the_named_models():
    with pytest.raises(sd3kit.LoadError, match="configurations"):
        sd3kit.load("someone/else", weights="random")


@pytest.mark.parametrize(
    ("name", "part", "billions"),
    [
        ("medium", "transformer", 2.03), ("3.5-medium", "transformer", 2.24), ("3.5-large", "transformer", 8.06),
        ("medium", "text_encoder", 0.124), ("medium", "text_encoder_2", 0.695), ("medium", "text_encoder_3", 4.76),
        ("medium", "vae", 0.0838),
    ],
)  # fmt: skip
def test_configurations_give_the_published_sizes(name, part, billions):
    """Rounded by their cards: Medium 2B (the announcement), 3.5 Medium 2.5B, 3.5 Large 8.1B, T5-XXL's encoder 4.7B."""
    with torch.device("meta"):
        count = sum(weight.numel() for weight in pipeline.build(name, part).parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.hub
def test_the_hub_asks_for_the_licence():
    with pytest.raises(sd3kit.LoadError, match="licence"):
        sd3kit.load("medium", token=False)
