"""It learns what the paper says, and what it writes loads in diffusers."""

import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import DistributedType
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import is_bitsandbytes_version
from runs import PICTURES, SMALL, losses, one_sentence, run

import sd3kit
from sd3kit.dreambooth import Settings, data
from sd3kit.dreambooth import model as what_learns
from sd3kit.dreambooth import train as training
from sd3kit.loading import configs


def fixed_loss(transformer, pipe) -> float:
    """The loss on the eight pictures with noise that no training of seed 0 has seen."""
    options = Settings(**(SMALL | {"seed": 9}))
    samples = data.Samples([data.instance_rows(options)], options, 9, (16, 8, 8))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # the pipeline's own was set to its steps
    batch = data.collate([samples[n] for n in range(16)])
    model = what_learns.Denoiser(transformer)
    with torch.no_grad():
        prompts = {caption: what_learns.encode(pipe, [caption], 12) for caption in batch["caption"]}
        return training.sample_losses(options, batch, model, pipe.vae, scheduler, prompts).mean().item()


def test_it_learns_and_the_lora_loads_in_diffusers(tmp_path, pipe):
    layers = "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,ff.net.0.proj,ff.net.2"
    more = dict(max_train_steps=12, train_batch_size=4, learning_rate=1e-2, lr_warmup_steps=0, rank=8)
    assert run(tmp_path, lora_layers=layers, cache_latents=True, **more) == 0

    def draw():
        made = pipe(
            "a sks robot", num_inference_steps=2, width=64, height=64, generator=torch.Generator().manual_seed(0)
        )
        return np.asarray(made.images[0], np.float32)

    before, loss = draw(), fixed_loss(pipe.transformer, pipe)
    try:
        pipe.load_lora_weights(tmp_path, weight_name=LORA_WEIGHT_NAME_SAFE)
        after, learnt = draw(), fixed_loss(pipe.transformer, pipe)
    finally:
        pipe.unload_lora_weights()
    assert learnt < 0.9 * loss, (learnt, loss)
    assert np.abs(after - before).mean() > 2
    assert np.array_equal(draw(), before)


def test_the_loss_is_the_papers():
    velocity, x0, noise = torch.randn(3, 4, 16, 8, 8)
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.9])[:, None, None, None]
    plain = training.flow_matching_loss(velocity, x0, noise, sigma)
    assert torch.allclose(plain, (velocity - (noise - x0)).square().mean((1, 2, 3)))
    x = (1 - sigma) * x0 + sigma * noise
    pictures = (x - sigma * velocity - x0).square().mean((1, 2, 3))
    assert torch.allclose(training.flow_matching_loss(velocity, x0, noise, sigma, precondition=True), pictures)
    weighted = training.flow_matching_loss(velocity, x0, noise, sigma, "sigma_sqrt")
    assert torch.allclose(weighted, plain / sigma.flatten() ** 2)


def test_latents_are_shifted_and_scaled():
    vae = types.SimpleNamespace(config=types.SimpleNamespace(shift_factor=0.5, scaling_factor=2.0))
    batch = {"mean": torch.full((1, 16, 2, 2), 3.0), "std": torch.ones(1, 16, 2, 2), "draw": torch.ones(1, 16, 2, 2)}
    assert training.latents(batch, vae).unique().tolist() == [7.0]


def test_noise_levels_follow_the_schedule_with_its_shift(pipe):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigma, timesteps = training.noise_levels(torch.tensor([0.0, 0.5, 1.0]), scheduler)
    assert sigma.flatten().tolist() == pytest.approx([1.0, 0.75, 0.003], abs=1e-3)
    assert torch.allclose(timesteps, 1000 * sigma.flatten())


def test_layers_and_blocks_can_be_named(tmp_path):
    assert run(tmp_path, lora_layers="attn.to_q,ff.net.2", lora_blocks="1,3", rank=2) == 0
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    names = {name.removeprefix("transformer.").rpartition(".lora_")[0] for name in stored}
    assert names == {f"transformer_blocks.{b}.{layer}" for b in (1, 3) for layer in ("attn.to_q", "ff.net.2")}
    assert min(stored["transformer.transformer_blocks.1.attn.to_q.lora_A.weight"].shape) == 2


@pytest.mark.parametrize("name", ["medium"])
def test_the_lora_fits_the_real_models(name):
    """On the meta device: every block's eight projections (the last block's text has no output), at true shapes."""
    from diffusers import SD3Transformer2DModel
    from peft import get_peft_model_state_dict

    with torch.device("meta"):
        model = what_learns.Denoiser(SD3Transformer2DModel(**configs.TRANSFORMER[name]))
        what_learns.make_trainable(Settings(**SMALL), model)
    found = get_peft_model_state_dict(model.transformer)
    layers, width = (configs.TRANSFORMER[name][k] for k in ("num_layers", "caption_projection_dim"))
    assert len(found) == 2 * (8 * layers - 1)
    assert found[f"transformer_blocks.{layers - 1}.attn.to_out.0.lora_B.weight"].shape == (width, 4)


def test_text_encoders_learn_too(tmp_path, capsys):
    more = dict(text_encoder_lr=1e-2, gradient_checkpointing=True, validation_prompt="a sks robot")
    assert run(tmp_path, train_text_encoder=True, num_validation_images=1, **more) == 0
    assert "peft" not in capsys.readouterr().out
    pipe = sd3kit.load("nano", quiet=True)
    with torch.no_grad():
        before = what_learns.encode(pipe, ["a sks robot"], 12)[0]
        pipe.load_lora_weights(tmp_path, weight_name=LORA_WEIGHT_NAME_SAFE)
        after = what_learns.encode(pipe, ["a sks robot"], 12)[0]
    change = (after - before).abs().amax((0, 2))
    assert change[:77].max() > 1e-3 and change[77:].max() == 0  # the CLIPs, not the T5


def test_the_clips_learn_at_their_own_rate_and_the_t5s_part_is_kept(pipe):
    prompts = ["a sks robot", "a fox on a red background"]
    with torch.no_grad():
        whole, pooled = what_learns.encode(pipe, prompts, 12)
        again, pooled_again = what_learns.encode_clips(pipe, prompts, whole)
    assert torch.equal(whole, again) and torch.equal(pooled, pooled_again)
    options = Settings(**(SMALL | {"train_text_encoder": True, "text_encoder_lr": 0.0}))
    own = sd3kit.load("nano", quiet=True, text_encoder_3=None, tokenizer_3=None)
    model = what_learns.Denoiser(own.transformer, own)
    what_learns.make_trainable(options, model)
    rates = [group["lr"] for group in what_learns.make_optimizer(options, model, 1).param_groups]
    assert rates == [1e-4, 0, 0]


def test_encoders_whose_layers_come_one_by_one_say_the_same(pipe):
    """On a GPU; the hooks are the same where the device is the CPU."""
    streamed = sd3kit.load("nano", device="cpu", quiet=True, transformer=None, vae=None)
    what_learns.stream(streamed, torch.device("cpu"))
    assert all(
        hasattr(layer, "_diffusers_hook")
        for layer in (streamed.text_encoder_3.encoder.block[0].layer[0].SelfAttention.q,)
    )
    with torch.no_grad():
        for ours, theirs in zip(*(what_learns.encode(p, ["a sks robot"], 12) for p in (streamed, pipe)), strict=True):
            assert torch.allclose(ours.cpu(), theirs.cpu(), atol=1e-5)


def test_a_lora_under_autocast_keeps_no_copies_of_its_inputs(pipe):
    """Bytes that are kept for the backward pass, with peft's own cast of what comes in and without."""

    own = sd3kit.load("nano", device="cpu", dtype=torch.bfloat16, quiet=True, vae=None)
    model = what_learns.Denoiser(own.transformer)
    what_learns.make_trainable(Settings(**SMALL), model)
    layers = [m for m in model.modules() if hasattr(m, "cast_input_dtype_enabled")]
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
    with torch.no_grad():
        embeds, pooled = what_learns.encode(own, ["a sks robot"], 12)

    def kept(cast: bool) -> int:
        for layer in layers:
            layer.cast_input_dtype_enabled = cast
        seen = {}

        def note(tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
            return tensor

        x = torch.randn(1, 16, 16, 16, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(x, torch.tensor([500.0]), embeds, pooled, None)
        return sum(t.untyped_storage().nbytes() for t in seen.values())

    assert kept(cast=False) < 0.97 * kept(cast=True)


def test_accelerates_own_accumulation_must_be_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert run(tmp_path / "out") == 2
    assert "configured for 2 gradient accumulation steps" in one_sentence(capsys)


def test_full_dreambooth_saves_a_whole_pipeline_and_resumes(tmp_path, monkeypatch, capsys):
    from diffusers import StableDiffusion3Pipeline

    more = dict(full_finetuning=True, learning_rate=1e-3, checkpointing_steps=1)
    assert run(tmp_path / "whole", **more) == 0
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "parts" / "checkpoint-1")  # as if stopped there
    first = (tmp_path / "whole" / "losses.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "parts" / "losses.jsonl").write_text(first)
    assert run(tmp_path / "parts", **more, resume_from_checkpoint="latest") == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "whole")) == 2
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "other" / "checkpoint-1")
    assert run(tmp_path / "other", **more, adam_weight_decay=0.5, resume_from_checkpoint="latest") == 0
    state = torch.load(tmp_path / "other" / "checkpoint-2" / "optimizer.bin", weights_only=True)
    assert state["param_groups"][0]["weight_decay"] == 0.5, "what is asked now counts, as settings.json says"
    pipe, nano = (
        StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole"),
        sd3kit.load("nano", device="cpu", quiet=True),
    )
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "parts")
    moved = 0
    for (name, ours), old, new in zip(
        pipe.transformer.named_parameters(), nano.transformer.parameters(), again.transformer.parameters(), strict=True
    ):
        assert torch.equal(ours, new), name
        moved += not torch.equal(ours, old)
    assert moved > 100
    assert torch.equal(pipe.vae.decoder.conv_in.weight, nano.vae.decoder.conv_in.weight)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a sks robot", num_inference_steps=1, width=64, height=64).images[0].size == (64, 64)

    right = os.replace

    def stops_at_the_vae(old, new):
        if Path(new).name == "vae":
            raise OSError("stopped")
        right(old, new)

    with monkeypatch.context() as patch:  # a result that is written over another and stops halfway
        patch.setattr(os, "replace", stops_at_the_vae)
        capsys.readouterr()
        assert run(tmp_path / "whole", **more, resume_from_checkpoint="latest") == 2
    assert "The result could not be written" in one_sentence(capsys)
    assert not (tmp_path / "whole" / "model_index.json").exists()
    assert run(tmp_path / "whole", **more, resume_from_checkpoint="latest") == 0
    assert StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole").vae is not None


def test_prior_preservation_draws_what_is_missing(tmp_path, plain):
    folder = tmp_path / "class"
    folder.mkdir()
    shutil.copy(f"{PICTURES}/small.png", folder / "mine.png")
    prior = dict(with_prior_preservation=True, class_data_dir=folder, class_prompt="a robot", num_class_images=2)
    assert run(tmp_path / "prior", **prior, max_train_steps=1) == 0
    drawn = sorted(p.name for p in folder.glob("*.png"))
    assert drawn == ["class-00000.png", "mine.png"]
    first = (folder / "class-00000.png").stat().st_mtime_ns
    assert run(tmp_path / "none", **prior, max_train_steps=1, prior_loss_weight=0) == 0
    assert (folder / "class-00000.png").stat().st_mtime_ns == first
    with_prior, weightless, without = (losses(out)[0] for out in (tmp_path / "prior", tmp_path / "none", plain))
    assert weightless == pytest.approx(without, rel=1e-4) and with_prior > without + 0.01


def test_a_folder_of_class_pictures_that_cannot_be_made_is_answered(tmp_path, capsys):
    (tmp_path / "file").touch()
    prior = dict(with_prior_preservation=True, class_data_dir=tmp_path / "file", class_prompt="a robot")
    assert run(tmp_path / "out", **prior) == 2
    assert "cannot be written: a file is where its folder should be" in one_sentence(capsys)


def test_a_sharded_training_says_that_it_draws_no_validation(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "SHARDED", (DistributedType.NO,))
    assert run(tmp_path, max_train_steps=1, validation_prompt="a sks robot") == 0
    assert "No validation pictures are drawn" in capsys.readouterr().out
    assert not (tmp_path / "validation").exists()


def test_eight_bit_adam(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bitsandbytes")
    if is_bitsandbytes_version(">=", "0.50.0"):
        assert run(tmp_path, use_8bit_adam=True, max_train_steps=1) == 0
        assert len(losses(tmp_path)) == 1
        monkeypatch.setattr(training, "is_bitsandbytes_version", lambda operation, version: True)
    capsys.readouterr()
    monkeypatch.setenv("SD3KIT_DEVICE", "cpu")  # on a GPU the older one trains
    assert run(tmp_path / "older", use_8bit_adam=True, max_train_steps=1) != 0
    assert "pip install -U bitsandbytes" in one_sentence(capsys)


@pytest.mark.gpu
def test_a_base_in_four_bits(tmp_path, plain):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    assert run(tmp_path, base_quantization="nf4", max_train_steps=2, learning_rate=1e-3, checkpointing_steps=1) == 0
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for name, value in stored.items() if "lora_B" in name)
    assert losses(tmp_path)[0] == pytest.approx(losses(plain)[0], rel=0.2)  # a base that is damaged says something else


def test_the_hub_gets_the_result_and_the_token_stays_hidden(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the rest of the training stays offline
    calls = []
    monkeypatch.setattr(
        huggingface_hub,
        "create_repo",
        lambda name, **k: calls.append(("create", k)) or types.SimpleNamespace(repo_id=f"me/{name}"),
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **k: calls.append(("upload", k)))
    token = "hf_" + "a" * 30
    assert run(tmp_path / "robot", push_to_hub=True, hub_token=token, max_train_steps=1) == 0
    assert [name for name, _ in calls] == ["create", "upload"] and all(k["token"] == token for _, k in calls)
    assert "checkpoint-*" in calls[-1][1]["ignore_patterns"] and calls[-1][1]["repo_id"] == "me/robot"
    said = capsys.readouterr()
    written = [p.read_bytes() for p in (tmp_path / "robot").rglob("*") if p.is_file()]
    assert token not in said.out + said.err + repr(Settings(hub_token=token))
    assert len(written) >= 4 and not any(token.encode() in content for content in written)
    assert 'load_lora_weights("me/robot")' in (tmp_path / "robot" / "README.md").read_text()

    def refused(*args, **kwargs):
        raise OSError(f"401 for {token}")

    monkeypatch.setattr(huggingface_hub, "create_repo", refused)
    assert run(tmp_path / "other", push_to_hub=True, hub_token=token) == 2
    sentence = one_sentence(capsys)
    assert "hf auth login" in sentence and token not in sentence
    assert not (tmp_path / "other" / "losses.jsonl").exists()  # refused before the training
