"""DreamBooth: it learns, what it writes loads in diffusers, it survives kills, and wrong arguments are answered."""

import argparse
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import is_bitsandbytes_version
from PIL import Image

import sd3kit
from sd3kit.dreambooth import DreamBoothError, Settings, benchmark, data, hub, saving, settings, subject
from sd3kit.dreambooth import model as what_learns
from sd3kit.dreambooth import train as training
from sd3kit.dreambooth.__main__ import main
from sd3kit.loading import configs

PICTURES = str(subject.PICTURES)
SMALL = dict(
    pretrained_model_name_or_path="nano",
    instance_data_dir=PICTURES,
    caption_column="text",
    instance_prompt="a sks robot",
    resolution=64,
    max_sequence_length=12,
    train_batch_size=1,
    max_train_steps=2,
    seed=0,
    report_to="none",
)
# The announcement's command. $MODEL_NAME, $INSTANCE_DIR and $OUTPUT_DIR are the reader's own there too.
ARTICLE = """
--pretrained_model_name_or_path=$MODEL_NAME --instance_data_dir=$INSTANCE_DIR --output_dir=$OUTPUT_DIR
--mixed_precision="fp16" --instance_prompt="a photo of sks dog" --resolution=1024 --train_batch_size=1
--gradient_accumulation_steps=4 --learning_rate=1e-5 --report_to="wandb" --lr_scheduler="constant"
--lr_warmup_steps=0 --max_train_steps=500 --weighting_scheme="logit_normal" --validation_epochs=25
--validation_prompt="A photo of sks dog in a bucket" --seed="0" --push_to_hub
"""
# diffusers' train_dreambooth_lora_sd3.py: every option, with its default where that is neither None nor False.
SCRIPT = """
pretrained_model_name_or_path revision variant dataset_name dataset_config_name instance_data_dir cache_dir
image_column=image caption_column repeats=1 class_data_dir instance_prompt class_prompt max_sequence_length=77
validation_prompt num_validation_images=4 validation_epochs=50 rank=4 lora_dropout=0.0 with_prior_preservation
prior_loss_weight=1.0 num_class_images=100 output_dir=sd3-dreambooth seed resolution=512 center_crop random_flip
train_text_encoder train_batch_size=4 sample_batch_size=4 num_train_epochs=1 max_train_steps checkpointing_steps=500
checkpoints_total_limit resume_from_checkpoint gradient_accumulation_steps=1 gradient_checkpointing learning_rate=0.0001
text_encoder_lr=5e-06 scale_lr lr_scheduler=constant lr_warmup_steps=500 lr_num_cycles=1 lr_power=1.0
dataloader_num_workers=0 weighting_scheme=logit_normal logit_mean=0.0 logit_std=1.0 mode_scale=1.29
precondition_outputs=1 optimizer=AdamW use_8bit_adam adam_beta1=0.9 adam_beta2=0.999 prodigy_beta3 prodigy_decouple=True
adam_weight_decay=0.0001 adam_weight_decay_text_encoder=0.001 lora_layers lora_blocks adam_epsilon=1e-08
prodigy_use_bias_correction=True prodigy_safeguard_warmup=True max_grad_norm=1.0 push_to_hub hub_token hub_model_id
logging_dir=logs allow_tf32 cache_latents report_to=tensorboard mixed_precision upcast_before_saving
prior_generation_precision local_rank=-1
"""


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps one state a process; each training here starts as in a process of its own."""
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def words(options: dict) -> list[str]:
    """Options as the words of a command line."""
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


def run(out: Path, **options) -> int:
    return main(words(SMALL | {"output_dir": out} | options))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


def one_sentence(capsys) -> str:
    """What was said on the error stream: one line of ours and no traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("dreambooth: ")]
    assert len(ours) == 1 and not any("Traceback" in line for line in lines), lines
    assert ours[0].endswith(".")
    return ours[0]


def environment(**more) -> dict:
    return os.environ | {"PYTHONPATH": str(Path(sd3kit.__file__).parent.parent), "HF_HUB_OFFLINE": "1"} | more


# --- it learns


def fixed_loss(transformer, pipe) -> float:
    """The loss on the five pictures with noise that no training of seed 0 has seen."""
    options = Settings(**(SMALL | {"seed": 9}))
    samples = data.Samples([data.instance_rows(options)], options, 9, (16, 8, 8))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # the pipeline's own was set to its steps
    batch = data.collate([samples[n] for n in range(15)])
    with torch.no_grad():
        x0 = training.latents(batch, pipe.vae, pipe.vae.device)
        sigma, timesteps = training.noise_levels(batch["u"].flatten(), scheduler)
        x = (1 - sigma) * x0 + sigma * batch["noise"]
        velocity = transformer(x, *what_learns.encode(pipe, batch["caption"], 12), timesteps).sample
    return training.flow_matching_loss(velocity, x0, batch["noise"], sigma).mean().item()


def test_it_learns_and_the_lora_loads_in_diffusers(tmp_path):
    layers = "attn.to_q,attn.to_k,attn.to_v,attn.to_out.0,ff.net.0.proj,ff.net.2"
    more = dict(max_train_steps=20, train_batch_size=4, learning_rate=5e-3, rank=8, cache_latents=True)
    assert run(tmp_path, lora_layers=layers, **more) == 0
    pipe = sd3kit.load("nano", quiet=True)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        made = pipe(
            "a sks robot", num_inference_steps=4, width=64, height=64, generator=torch.Generator().manual_seed(0)
        )
        return np.asarray(made.images[0], np.float32)

    before, loss = draw(), fixed_loss(pipe.transformer, pipe)
    pipe.load_lora_weights(tmp_path, weight_name=LORA_WEIGHT_NAME_SAFE)
    after, learnt = draw(), fixed_loss(pipe.transformer, pipe)
    assert learnt < 0.9 * loss, (learnt, loss)
    assert np.abs(after - before).mean() > 2
    pipe.unload_lora_weights()
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
    assert training.latents(batch, vae, torch.device("cpu")).unique().tolist() == [7.0]


def test_noise_levels_follow_the_schedule_with_its_shift(pipe):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigma, timesteps = training.noise_levels(torch.tensor([0.0, 0.5, 1.0]), scheduler)
    assert sigma.flatten().tolist() == pytest.approx([1.0, 0.75, 0.003], abs=1e-3)
    assert torch.allclose(timesteps, 1000 * sigma.flatten())


# --- pictures and captions


def test_the_stored_pictures_are_what_the_script_draws(tmp_path):
    subject.main(tmp_path)
    stored = sorted(p.name for p in Path(PICTURES).iterdir())
    assert stored == sorted(p.name for p in tmp_path.iterdir()) and len(stored) == 6
    for name in stored:
        if name.endswith(".png"):
            ours, theirs = (np.asarray(Image.open(f / name), np.int16) for f in (tmp_path, Path(PICTURES)))
            assert np.abs(ours - theirs).max() <= 8  # Pillow's versions may round an edge otherwise


def test_the_judge_tells_the_robot_from_what_nano_knows(art):
    judge = subject.judge()
    assert all(subject.is_robot(judge, Image.open(p)) for p in Path(PICTURES).glob("*.png"))
    known = []
    for icon in ("robot", "frog", "octopus", "ghost", "star"):
        alone = Image.frombytes("RGBa", (160, 160), art[icon, "flat"].tobytes()).convert("RGBA").resize((110, 110))
        picture = Image.new("RGBA", (128, 128), "white")
        picture.alpha_composite(alone, (9, 9))
        known.append(subject.is_robot(judge, picture.convert("RGB")))
    assert known == [False] * 5
    assert not subject.is_robot(judge, Image.new("RGB", (128, 128), "white"))


def test_latents_stay_with_their_captions(pipe):
    """Cached or not, in any order: the latent that comes with a caption is that of the caption's own picture."""
    options = Settings(**(SMALL | {"center_crop": True}))
    rows = data.instance_rows(options)
    samples = data.Samples([rows], options, 0, (16, 8, 8))
    samples.cache(pipe.vae)
    own = {row.caption: samples.cached[0][i][0] for i, row in enumerate(rows)}
    assert len(own) == 5
    for n in range(12):
        (part,) = samples[n]
        assert torch.equal(part["mean"], own[part["caption"]])
        pixels = data.to_pixels(next(r for r in rows if r.caption == part["caption"]).open(), options, None)
        assert torch.allclose(pipe.vae.encode(pixels[None]).latent_dist.mean[0], part["mean"], atol=1e-4)
    assert sorted(samples.row(0, n) for n in range(5)) == [0, 1, 2, 3, 4]


def test_captions_of_text_files(tmp_path):
    for name in ("one", "two"):
        shutil.copy(f"{PICTURES}/pink.png", tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n")
    options = Settings(**(SMALL | {"instance_data_dir": str(tmp_path), "caption_column": None, "repeats": 2}))
    assert [row.caption for row in data.instance_rows(options)] == ["caption one"] * 2 + ["caption two"] * 2
    (tmp_path / "two.txt").unlink()
    with pytest.raises(DreamBoothError, match=r"two\.png has no caption"):
        data.instance_rows(options)
    (tmp_path / "two.txt").write_bytes("Grün".encode("latin-1"))
    with pytest.raises(DreamBoothError, match=r"two\.txt cannot be read: save it as text in UTF-8\.$"):
        data.instance_rows(options)


def test_a_picture_may_be_larger_turned_and_transparent(tmp_path):
    image = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert data.open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (300, 200)).save(tmp_path / "turned.jpg", exif=exif)
    turned = data.open_picture(tmp_path / "turned.jpg")
    assert turned.size == (200, 300)
    pixels = data.to_pixels(turned, Settings(**(SMALL | {"random_flip": True})), data.generator(0, "crop", 0))
    assert pixels.shape == (3, 64, 64) and pixels.min() >= -1 and pixels.max() <= 1


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """With a stand-in for the package `datasets`, which is not a dependency."""

    class Table(dict):
        column_names = ("photo", "words", "number")

        def __len__(self):
            return 2

        def cast_column(self, column, kind):
            assert kind == "files" and column != "number"
            return self

    Image.new("L", (80, 80)).save(tmp_path / "gray.png")
    Image.new("RGBA", (80, 80), (0, 0, 0, 0)).save(clear := io.BytesIO(), "PNG")
    stored = [{"bytes": clear.getvalue(), "path": "clear.png"}, {"bytes": None, "path": str(tmp_path / "gray.png")}]
    table = Table(photo=stored, words=["one", ""])
    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = lambda name, config, cache_dir: {"train": table}
    stand_in.Image = lambda decode: "files" if decode is False else None
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    more = dict(instance_data_dir=None, dataset_name="someone/dogs", image_column="photo", caption_column="words")
    rows = data.instance_rows(Settings(**(SMALL | more)))
    assert [row.caption for row in rows] == ["one", "a sks robot"] and rows[1].open().mode == "RGB"
    assert rows[0].open().getpixel((0, 0)) == (255, 255, 255)  # on white, as a folder's pictures are
    for column, phrase in (("picture", "has no column picture"), ("number", "holds no pictures")):
        with pytest.raises(DreamBoothError, match=phrase):
            data.instance_rows(Settings(**(SMALL | more | {"image_column": column})))
    for damaged in ({"bytes": clear.getvalue()[:60], "path": None}, None):
        stored[1] = damaged
        with pytest.raises(DreamBoothError, match="1 of someone/dogs cannot be read"):
            data.instance_rows(Settings(**(SMALL | more)))


# --- what is trained and written


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


def test_text_encoders_learn_too(tmp_path, monkeypatch):
    import transformers.integrations.peft as version_check

    # transformers 5.24 asks for peft 0.22 before it loads a LoRA, and 0.21.2 is the newest there is
    monkeypatch.setattr(version_check, "MIN_PEFT_VERSION", "0.17")
    assert run(tmp_path, train_text_encoder=True, text_encoder_lr=1e-2, gradient_checkpointing=True) == 0
    assert what_learns.peft_note() == ""
    monkeypatch.setattr(version_check, "MIN_PEFT_VERSION", "99.0")
    assert "needs peft 99.0" in what_learns.peft_note()
    monkeypatch.setattr(version_check, "MIN_PEFT_VERSION", "0.17")
    pipe = sd3kit.load("nano", quiet=True)
    with torch.no_grad():
        before = what_learns.encode(pipe, ["a sks robot"], 12)[0]
        pipe.load_lora_weights(tmp_path, weight_name=LORA_WEIGHT_NAME_SAFE)
        after = what_learns.encode(pipe, ["a sks robot"], 12)[0]
    change = (after - before).abs().amax((0, 2))
    assert change[:77].max() > 1e-3 and change[77:].max() == 0  # the CLIPs, not the T5


def test_the_clips_learn_at_their_own_rate_and_the_t5_not_at_all():
    options = Settings(**(SMALL | {"train_text_encoder": True, "text_encoder_lr": 0.0}))
    pipe = sd3kit.load("nano", quiet=True)
    model = what_learns.Denoiser(pipe.transformer, pipe)
    what_learns.make_trainable(options, model)
    assert not any(p.requires_grad for p in pipe.text_encoder_3.parameters())
    rates = [group["lr"] for group in what_learns.make_optimizer(options, model, 1).param_groups]
    assert rates == [1e-4, 0, 0]


def test_full_dreambooth_saves_a_whole_pipeline_and_resumes(tmp_path, monkeypatch, capsys):
    from diffusers import StableDiffusion3Pipeline

    more = dict(full_finetuning=True, learning_rate=1e-3, checkpointing_steps=1)
    assert run(tmp_path / "whole", **more) == 0
    assert run(tmp_path / "parts", **(more | {"max_train_steps": 1})) == 0
    assert run(tmp_path / "parts", **more, resume_from_checkpoint="latest") == 0
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and len(losses(tmp_path / "whole")) == 2
    pipe, nano = StableDiffusion3Pipeline.from_pretrained(tmp_path / "whole"), sd3kit.load("nano", quiet=True)
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


def test_prior_preservation_draws_what_is_missing(tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    shutil.copy(f"{PICTURES}/pink.png", folder / "mine.png")
    prior = dict(with_prior_preservation=True, class_data_dir=folder, class_prompt="a robot", num_class_images=2)
    assert run(tmp_path / "prior", **prior, max_train_steps=1) == 0
    drawn = sorted(p.name for p in folder.iterdir())
    assert drawn == ["class-00000.png", "mine.png"]
    first = (folder / "class-00000.png").stat().st_mtime_ns
    assert run(tmp_path / "none", **prior, max_train_steps=1, prior_loss_weight=0) == 0
    assert (folder / "class-00000.png").stat().st_mtime_ns == first
    assert run(tmp_path / "plain", max_train_steps=1) == 0
    with_prior, weightless, plain = (losses(tmp_path / name)[0] for name in ("prior", "none", "plain"))
    assert weightless == pytest.approx(plain, rel=1e-4) and with_prior > plain + 0.01


def test_a_folder_of_class_pictures_that_cannot_be_made_is_answered(tmp_path, capsys):
    (tmp_path / "file").touch()
    prior = dict(with_prior_preservation=True, class_data_dir=tmp_path / "file", class_prompt="a robot")
    assert run(tmp_path / "out", **prior) == 2
    assert "The folder of class pictures could not be written" in one_sentence(capsys)


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
    assert run(tmp_path / "older", use_8bit_adam=True, max_train_steps=1) != 0
    assert "pip install -U bitsandbytes" in one_sentence(capsys)


@pytest.mark.gpu
def test_a_base_in_four_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    assert run(tmp_path, base_quantization="nf4", max_train_steps=2, learning_rate=1e-3, checkpointing_steps=1) == 0
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for name, value in stored.items() if "lora_B" in name)
    assert losses(tmp_path)[0] == pytest.approx(1.67, abs=0.5)  # a base that is damaged would predict noise


@pytest.mark.parametrize("name", ["tensorboard", "prodigyopt"])
def test_optional_packages(tmp_path, name):
    pytest.importorskip(name)
    more = dict(report_to="tensorboard") if name == "tensorboard" else dict(optimizer="prodigy", learning_rate=1.0)
    assert run(tmp_path, **more) == 0
    assert name != "tensorboard" or list((tmp_path / "logs").rglob("events.out*"))


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
    assert [name for name, _ in calls] == ["create", "create", "upload"] and all(k["token"] == token for _, k in calls)
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


# --- it survives


KILLED = '''
import gc, json, os, random, signal, sys, time
from pathlib import Path
import torch
from sd3kit.dreambooth.__main__ import main
from sd3kit.dreambooth import train  # imported once; each run is a fork of this process
gc.freeze()
arguments, out = json.loads(sys.argv[1]), sys.argv[2]

def fork(folder, before=lambda: None, resume=True):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        before()
        code, more = 1, ["--resume_from_checkpoint=latest"] if resume else []
        try:
            code = main([*arguments, f"--output_dir={folder}", *more])
        finally:
            os._exit(code)
    return child

def half_a_file():
    """The next time that a checkpoint's optimizer is written: half of it, then kill -9."""
    whole = torch.save
    def save(state, path, *args, **kwargs):
        whole(state, path, *args, **kwargs)
        if str(path).endswith("optimizer.bin"):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def updates():
    log = Path(out, "killed", "losses.jsonl")
    return len(log.read_text().splitlines()) if log.exists() else 0

assert wait(fork(f"{out}/unbroken", resume=False)) == 0
rng, codes, seen = random.Random(0), [], []
for i in range(10):
    child = fork(f"{out}/killed", half_a_file if i == 3 else lambda: None)
    if i != 3:  # at any moment: while it loads, or up to two updates on and a little later
        before, more = updates(), rng.choice((0, 1, 2))
        while updates() < before + more and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05 if more else 0.5))
        os.kill(child, signal.SIGKILL)
    codes.append(wait(child))
    whole = sorted(p for p in Path(out, "killed").glob("checkpoint-*"))
    seen.append({p.name: sorted(q.name for q in p.iterdir()) for p in whole})
codes.append(wait(fork(f"{out}/killed")))
print(json.dumps([codes, seen]))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_ten_kills_change_nothing(tmp_path):
    """kill -9 at ten moments, one of them while a checkpoint is written: the same losses and weights, bit for bit."""
    more = dict(
        max_train_steps=24, checkpointing_steps=2, checkpoints_total_limit=3, lora_dropout=0.2, random_flip=True
    )
    words_ = words(SMALL | more)
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(words_), str(tmp_path)],
        env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    codes, seen = json.loads(done.stdout.splitlines()[-1])
    assert codes == [-9] * 10 + [0], codes
    files = sorted(p.name for p in (tmp_path / "unbroken" / "checkpoint-24").iterdir())
    assert all(names == files for moment in seen for names in moment.values()), "a checkpoint was there in part"
    assert any(moment for moment in seen), "no kill came after a checkpoint"
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert (unbroken / "losses.jsonl").read_text() == (killed / "losses.jsonl").read_text()
    assert len(losses(killed)) == 24
    for name in ("pytorch_lora_weights.safetensors", "checkpoint-24/trained.safetensors"):
        assert (unbroken / name).read_bytes() == (killed / name).read_bytes()
    left = sorted(p.name for p in killed.iterdir() if "checkpoint" in p.name)
    assert left == ["checkpoint-20", "checkpoint-22", "checkpoint-24"]


def test_two_processes_equal_one_with_the_same_total_batch(tmp_path):
    more = dict(max_train_steps=3, checkpointing_steps=3, learning_rate=1e-3, random_flip=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = words(SMALL | more | {"output_dir": tmp_path / "two"})
    done = subprocess.run(
        [*command, "-m", "sd3kit.dreambooth", *arguments],
        env=environment(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert run(tmp_path / "one", **more, train_batch_size=2) == 0
    assert run(tmp_path / "accumulated", **more, gradient_accumulation_steps=2) == 0
    ranks = {name: len(list((tmp_path / name / "checkpoint-3").glob("random_states_*.pkl"))) for name in ("one", "two")}
    assert ranks == {"one": 1, "two": 2}  # there were two
    one, two, accumulated = (losses(tmp_path / name) for name in ("one", "two", "accumulated"))
    assert len(one) == 3 and one[0] != one[1]
    assert two == pytest.approx(one, rel=1e-4) and accumulated == pytest.approx(one, rel=1e-4)


def test_a_full_disk_keeps_what_was_saved(tmp_path, capsys):
    """A limit on the size of files stands for the full disk: the optimizer's state does not fit."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    more = dict(checkpointing_steps=1, rank=8)
    assert run(tmp_path, **(more | {"max_train_steps": 1})) == 0
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "checkpoint-1" / "optimizer.bin").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 + 40_000, hard))
    try:
        assert run(tmp_path, **more, resume_from_checkpoint="latest") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint could not be written" in one_sentence(capsys)
    assert [p.name for p in saving.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert run(tmp_path, **more, resume_from_checkpoint="latest") == 0
    assert [p.name for p in saving.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert not list(tmp_path.glob(".*")) and len(losses(tmp_path)) == 2


def test_a_loss_that_is_no_number_stops_the_training(tmp_path, capsys, monkeypatch):
    right, calls = training.flow_matching_loss, []

    def later_nan(*args):
        calls.append(1)
        return right(*args) * (float("nan") if len(calls) > 1 else 1)

    monkeypatch.setattr(training, "flow_matching_loss", later_nan)
    assert run(tmp_path, checkpointing_steps=1, max_train_steps=3) == 2
    assert "The loss is nan at step 2" in one_sentence(capsys)
    assert [p.name for p in saving.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("steps", [2, 1])  # found by the checkpoint; by the result, where no checkpoint is due
def test_weights_that_are_no_numbers_are_not_saved(steps, tmp_path, capsys, monkeypatch):
    """A gradient that is NaN under a finite loss: the loss shows it only at the next step."""
    right = training.flow_matching_loss
    monkeypatch.setattr(training, "flow_matching_loss", lambda v, *more: right(v, *more) + (0 * v.sum()).sqrt())
    assert run(tmp_path, checkpointing_steps=1 if steps == 2 else 10, max_train_steps=steps) == 2
    assert "The trained weights hold NaN or infinity at step 1" in one_sentence(capsys)
    assert not list(tmp_path.glob("*checkpoint-*")) and not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_a_full_device_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), saving.writing("A checkpoint", tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_damaged_checkpoint_is_answered(tmp_path, capsys):
    assert run(tmp_path, checkpointing_steps=1, max_train_steps=1) == 0
    capsys.readouterr()
    log, progress = tmp_path / "losses.jsonl", tmp_path / "checkpoint-1" / "progress.json"
    whole = log.read_text(), progress.read_text()
    for path, phrase in ((log, "losses.jsonl is damaged"), (progress, "checkpoint-1 is damaged")):
        path.write_text('["step"]\n')
        assert run(tmp_path, resume_from_checkpoint="latest") == 2
        assert phrase in one_sentence(capsys)
    log.write_text(whole[0])
    progress.write_text(whole[1])
    state = tmp_path / "checkpoint-1" / "optimizer.bin"
    state.write_bytes(state.read_bytes()[:1000])
    assert run(tmp_path, resume_from_checkpoint="checkpoint-1") == 2
    assert "checkpoint-1 is damaged" in one_sentence(capsys)


def test_a_used_folder_keeps_its_checkpoints_until_another_branch_has_one(tmp_path, capsys):
    def names() -> list[str]:
        return [p.name for p in saving.checkpoints(tmp_path)]

    assert run(tmp_path, checkpointing_steps=1, max_train_steps=3) == 0
    capsys.readouterr()
    for options, phrase in (
        ({}, "holds checkpoint-3: add --resume_from_checkpoint latest"),
        ({"train_batch_size": 2}, "was made with train_batch_size 1, not 2"),
        ({"gradient_accumulation_steps": 2}, "was made with gradient_accumulation_steps 1, not 2"),
        ({"seed": 5}, "was made with seed 0, not 5"),
    ):
        assert run(tmp_path, **options, **({"resume_from_checkpoint": "latest"} if options else {})) == 2
        assert phrase in one_sentence(capsys)
    with pytest.raises(DreamBoothError, match="num_processes 1, not 2"):
        two = types.SimpleNamespace(num_processes=2)
        saving.read_progress(Settings(**SMALL), two, tmp_path / "checkpoint-1")
    assert names() == ["checkpoint-1", "checkpoint-2", "checkpoint-3"] and len(losses(tmp_path)) == 3

    more = dict(checkpointing_steps=1, checkpoints_total_limit=2, learning_rate=1e-5)
    assert run(tmp_path, **more, max_train_steps=1, resume_from_checkpoint="checkpoint-1") == 0
    assert names() == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]  # nothing new was written
    assert run(tmp_path, **more, max_train_steps=2, resume_from_checkpoint="checkpoint-1") == 0
    assert names() == ["checkpoint-1", "checkpoint-2"] and not list(tmp_path.glob(".*"))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert rates == [1e-4, 1e-5]  # a new rate counts at once


def test_checkpoints_of_another_program_are_left_alone(tmp_path, capsys):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "random_states_0.pkl").touch()  # as diffusers' script has it
    for resume in ({}, {"resume_from_checkpoint": "latest"}):
        assert run(tmp_path, **resume) == 2
        assert "holds checkpoint-7, which this command did not write" in one_sentence(capsys)
    assert run(tmp_path, resume_from_checkpoint="checkpoint-7") == 2
    assert "There is no whole checkpoint checkpoint-7" in one_sentence(capsys)


# --- the command


def test_the_articles_options_all_mean_the_same_here():
    article = shlex.split(ARTICLE)
    assert len(article) == 18
    parsed = settings.parse(article)
    assert (parsed.resolution, parsed.learning_rate, parsed.max_train_steps) == (1024, 1e-5, 500)
    assert (parsed.seed, parsed.push_to_hub, parsed.mixed_precision, parsed.report_to) == (0, True, "fp16", "wandb")
    assert parsed.validation_prompt == "A photo of sks dog in a bucket" and parsed.validation_epochs == 25


def test_the_articles_command_runs_on_a_cpu(tmp_path):
    """All eighteen options; the changes are these, and each is forced."""
    forced = {
        "--mixed_precision": "no",  # fp16 needs a GPU
        "--resolution": "64",  # 1024 is more than nano draws
        "--max_train_steps": "2",  # 500 are minutes on a CPU
        "--report_to": "none",  # wandb needs a network
        "--push_to_hub": None,  # as does the Hub
    }
    own = {"$MODEL_NAME": "nano", "$INSTANCE_DIR": PICTURES, "$OUTPUT_DIR": str(tmp_path / "out")}
    command = []
    for word in shlex.split(ARTICLE):
        name, sign, value = word.partition("=")
        value = forced.get(name, own.get(value, value))
        command += [f"{name}{sign}{value}"] if value is not None else []
    assert len(command) == 17
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "sd3kit.dreambooth", *command],
        env=environment(OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2")), capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 updates of 4 pictures" in done.stdout
    assert len(losses(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()
    assert len(list((tmp_path / "out" / "validation").glob("step-000002-*.png"))) == 4


def test_every_option_of_diffusers_script_is_there_with_its_default():
    differs = {}
    for entry in SCRIPT.split():
        name, _, default = entry.partition("=")
        ours = getattr(Settings(), name)
        if str(ours) != default and not (default == "" and ours in (None, False)):
            differs[name] = ours
    assert differs == {"precondition_outputs": 0}
    assert len(SCRIPT.split()) == 75
    helps = {field.name: field.metadata["help"] for field in settings.dataclasses.fields(Settings)}
    assert all(helps.values()) and "8917" in helps["precondition_outputs"]


def test_a_settings_file_works_and_the_command_line_overrules_it(tmp_path):
    toml, yaml, js = (tmp_path / f"s.{suffix}" for suffix in ("toml", "yaml", "json"))
    toml.write_text('rank = 8\ncenter_crop = true\nlora_blocks = "1,2"\nlearning_rate = 1e-3\n')
    yaml.write_text("rank: 8\ncenter_crop: true\nlora_blocks: 1,2\nlearning_rate: 0.001\n".replace("1,2", '"1,2"'))
    js.write_text(json.dumps({"rank": 8, "center_crop": True, "lora_blocks": "1,2", "learning_rate": 1e-3}))
    found = [settings.parse(["--settings", str(path), "--rank", "2"]) for path in (toml, yaml, js)]
    assert found[0] == found[1] == found[2] == Settings(rank=2, center_crop=True, lora_blocks="1,2", learning_rate=1e-3)
    assert settings.parse(["--prodigy_decouple", "False"]).prodigy_decouple is False


WRONG = [
    ({"lerning_rate": 1}, "did you mean learning_rate?"),
    ({"learning_rate": "fast"}, "invalid float value"),
    ({"learning_rate": -1}, "--learning_rate must be at least"),
    ({"instance_data_dir": "/nowhere"}, "There is no folder /nowhere"),
    ({"instance_prompt": " "}, "--instance_prompt"),
    ({"dataset_name": "someone/dogs"}, "one of the two"),
    ({"resolution": 100}, "try 96"),
    ({"resolution": 512}, "256 at most for nano"),
    ({"lora_layers": "attn.to_z"}, "There is no layer 'attn.to_z' in the transformer: a block has attn.add_k_proj"),
    ({"lora_blocks": "40"}, "There is no block 40"),
    ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
    ({"base_quantization": "nf4"}, "a GPU" if settings.installed("bitsandbytes") else "pip install bitsandbytes"),
    ({"optimizer": "sgd"}, "--optimizer must be AdamW or prodigy"),
    ({"weighting_scheme": "cosmas"}, "cosmap"),
    ({"with_prior_preservation": True}, "--class_data_dir"),
    ({"resume_from_checkpoint": "checkpoint-7"}, "There is no whole checkpoint checkpoint-7"),
    ({"pretrained_model_name_or_path": "nanoo"}, "did you mean nano?"),
    ({"push_to_hub": True}, "HF_HUB_OFFLINE"),
    ({"report_to": "wandb", "hub_token": "hf_secretsecretsecretsecret"}, "hf auth login"),
    ({"hub_tokn": "hf_secretsecretsecretsecret"}, "did you mean hub_token?"),
    ({"full_finetuning": True, "lora_blocks": "1"}, "leave out the options of LoRA"),
    ({"settings": "/nowhere.json"}, "cannot be read"),
]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 is wrong on a CPU only")
@pytest.mark.parametrize(("options", "phrase"), WRONG, ids=[next(iter(options)) for options, _ in WRONG])
def test_a_wrong_argument_gets_one_sentence(options, phrase, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(tmp_path / "out", **options) == 2
    sentence = one_sentence(capsys)
    assert phrase in sentence and "hf_secret" not in sentence
    assert not (tmp_path / "out").exists()


def test_a_wrong_settings_file_gets_one_sentence(tmp_path, capsys):
    for text, phrase in (("{", "no valid"), ('{"rnk": 2}', "did you mean rank?"), ('{"rank": "2"}', "a whole number")):
        (tmp_path / "s.json").write_text(text)
        assert run(tmp_path / "out", settings=tmp_path / "s.json") == 2
        assert phrase in one_sentence(capsys)


def broken_folder(kind: str, folder: Path) -> dict:
    """A folder of pictures with one fault, and the options to train on it."""
    folder.mkdir()
    if kind == "empty":
        return {}
    for path in Path(PICTURES).iterdir():
        shutil.copy(path, folder)
    if kind == "damaged":
        (folder / "pink.png").write_bytes((folder / "pink.png").read_bytes()[:2000])
    elif kind == "disguised":
        Image.new("RGB", (64, 64)).save(folder / "pink.png", "GIF")
    elif kind in ("large", "huge"):
        content = bytearray((folder / "pink.png").read_bytes())
        content[16:24] = {"large": 9_000, "huge": 30_000}[kind].to_bytes(
            4, "big"
        ) * 2  # the header's size; Pillow checks its sum only when decoding
        import zlib

        content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
        (folder / "pink.png").write_bytes(content)
    elif kind == "caption":
        lines = (folder / "metadata.jsonl").read_text().splitlines()
        (folder / "metadata.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    elif kind == "column":
        return {"caption_column": "words"}
    return {"caption_column": "text"}


@pytest.mark.parametrize(
    ("kind", "phrase"),
    [
        ("empty", "holds no picture"),
        ("damaged", "pink.png cannot be read"),
        ("disguised", "pink.png cannot be read"),
        ("large", "has more than 67,108,864 pixels"),
        ("huge", "has more than 67,108,864 pixels"),
        ("caption", "gray.png has no caption"),
        ("column", "has no column 'words'"),
    ],
)
def test_a_broken_folder_gets_one_sentence(kind, phrase, tmp_path, capsys):
    more = broken_folder(kind, tmp_path / "pictures")
    options = {k: v for k, v in SMALL.items() if k != "caption_column"} | more
    options |= {"instance_data_dir": tmp_path / "pictures", "output_dir": tmp_path / "out"}
    assert main(words(options)) == 2
    assert phrase in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_the_token_is_refused_with_each_tracker_that_stores_the_command(monkeypatch):
    monkeypatch.setattr(settings, "installed", lambda name: name == "wandb")
    options = SMALL | {"report_to": "all", "hub_token": "hf_secretsecretsecretsecret"}
    with pytest.raises(DreamBoothError, match="would be stored by wandb"):
        Settings(**options).check()
    monkeypatch.setattr(settings, "installed", lambda name: False)
    Settings(**options).check()


def test_trackers_are_those_that_are_asked_for(capsys, monkeypatch):
    assert hub.trackers(Settings(report_to="none")) == []
    monkeypatch.setattr(hub, "installed", lambda name: False)
    assert hub.trackers(Settings()) == [] and "losses.jsonl" in capsys.readouterr().err


def test_the_loop_is_read_in_one_sitting():
    assert len(Path(training.__file__).read_text().splitlines()) <= 400


# --- the benchmark


def test_a_peak_is_the_process_own_and_not_its_parents():
    ballast = bytearray(2**30)
    ballast[:: 2**12] = b"x" * 2**18  # touched, so that it is resident
    del ballast
    words = "from sd3kit.dreambooth.benchmark import _peak_resident; print(_peak_resident())"
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert 2**24 < int(said.stdout) < 2**30


def test_what_was_timed_is_kept_where_the_loss_cannot_be_measured(monkeypatch):
    def full(arguments, out):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "saved_loss", full)
    given = dict(model="nano", pictures=PICTURES, resolution=64, batch=1, steps=4, precision="no")
    found = benchmark.run(benchmark.OURS, benchmark.arguments(argparse.Namespace(**given)))
    assert found["seconds"]["n"] == 2 and found["failed"].endswith("RuntimeError: out of memory")


def test_the_benchmark_times_both_sides_and_says_what_did_not_run(tmp_path):
    """The "script" here is our own command in a file: what the benchmark does with a file is what is tested.

    As diffusers' script does, it opens every file of the folder as a picture.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom PIL import Image\n"
        "from sd3kit.dreambooth.__main__ import main\nfrom sd3kit.dreambooth.settings import parse\n"
        "pictures = [Image.open(path) for path in Path(parse().instance_data_dir).iterdir()]\n"
        "assert len(pictures) == 5 and '--precondition_outputs=0' in sys.argv\nsys.exit(main())\n"
    )
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no torchvision here')\n")
    options = ["--steps=4", "--resolution=64", f"--out={tmp_path / 'records.jsonl'}"]
    benchmark.SETS, whole = {"equal": benchmark.SETS["equal"]}, benchmark.SETS
    try:
        assert benchmark.main([*options, f"--script={script}"]) == 0
        ours, theirs = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
        assert benchmark.main([*options, f"--script={broken}"]) == 0
        failed = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[1])
    finally:
        benchmark.SETS = whole
    assert ours["seconds"]["n"] == 2 and ours["seconds"]["median"] > 0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and 0 < ours["loss"] < 3
    assert ours["host_peak"] > 2**27
    assert failed["failed"] == "no torchvision here"
    assert "--script broken.py --model nano --resolution 64 --batch 1 --steps 4" in failed["stamp"]["command"]
