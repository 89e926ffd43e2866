"""The command line: the announcement's, diffusers', and wrong ones."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import PICTURES, SMALL, environment, losses, one_sentence, run, words

from sd3kit.dreambooth import DreamBoothError, Settings, checks, settings
from sd3kit.dreambooth import train as training
from sd3kit.dreambooth.__main__ import main

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


def test_options_may_stand_in_a_file_and_what_comes_after_overrules_it(tmp_path):
    (tmp_path / "options").write_text("--rank=8\n--center_crop\n--lora_blocks=1,2\n--learning_rate=1e-3\n")
    found = settings.parse([f"@{tmp_path}/options", "--rank", "2"])
    assert found == Settings(rank=2, center_crop=True, lora_blocks="1,2", learning_rate=1e-3)
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
    ({"base_quantization": "nf4"}, "a GPU" if checks.installed("bitsandbytes") else "pip install bitsandbytes"),
    ({"optimizer": "sgd"}, "--optimizer must be AdamW or prodigy"),
    ({"weighting_scheme": "cosmas"}, "cosmap"),
    ({"with_prior_preservation": True}, "--class_data_dir"),
    ({"resume_from_checkpoint": "checkpoint-7"}, "There is no whole checkpoint checkpoint-7"),
    ({"pretrained_model_name_or_path": "nanoo"}, "did you mean nano or nano-turbo?"),
    ({"push_to_hub": True}, "HF_HUB_OFFLINE"),
    ({"report_to": "wandb", "hub_token": "hf_secretsecretsecretsecret"}, "hf auth login"),
    ({"hub_tokn": "hf_secretsecretsecretsecret"}, "did you mean hub_token?"),
    ({"full_finetuning": True, "lora_blocks": "1"}, "leave out the options of LoRA"),
]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 is wrong on a CPU only")
@pytest.mark.parametrize(("options", "phrase"), WRONG, ids=[next(iter(options)) for options, _ in WRONG])
def test_a_wrong_argument_gets_one_sentence(options, phrase, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(tmp_path / "out", **options) == 2
    sentence = one_sentence(capsys)
    assert phrase in sentence and "hf_secret" not in sentence
    assert not (tmp_path / "out").exists()


def test_a_wrong_file_of_options_gets_one_sentence(tmp_path, capsys):
    path = tmp_path / "options"
    for text, phrase in ((b"--rnk=2", "did you mean rank?"), (b"--rank=x", "invalid int"), (b"\xff\xfe", "UTF-8")):
        path.write_bytes(text)
        assert main([f"@{path}"]) == 2
        assert phrase in one_sentence(capsys)
    assert main(["@/nowhere"]) == 2
    assert "No such file" in one_sentence(capsys)


def broken_folder(kind: str, folder: Path) -> dict:
    """A folder of pictures with one fault, and the options to train on it."""
    folder.mkdir()
    if kind == "empty":
        return {}
    for path in Path(PICTURES).iterdir():
        shutil.copy(path, folder)
    if kind == "damaged":
        (folder / "small.png").write_bytes((folder / "small.png").read_bytes()[:2000])
    elif kind == "disguised":
        Image.new("RGB", (64, 64)).save(folder / "small.png", "PPM")
    elif kind in ("large", "huge"):
        content = bytearray((folder / "small.png").read_bytes())
        content[16:24] = {"large": 9_000, "huge": 30_000}[kind].to_bytes(
            4, "big"
        ) * 2  # the header's size; Pillow checks its sum only when decoding
        import zlib

        content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4, "big")
        (folder / "small.png").write_bytes(content)
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
        ("damaged", "small.png cannot be read"),
        ("disguised", "small.png cannot be read"),
        ("large", "scale it to at most 67,108,864 pixels"),
        ("huge", "scale it to at most 67,108,864 pixels"),
        ("caption", "small.png has no caption"),
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
    monkeypatch.setattr(checks, "installed", lambda name: name == "wandb")
    options = SMALL | {"report_to": "all", "hub_token": "hf_secretsecretsecretsecret"}
    with pytest.raises(DreamBoothError, match="would be stored by wandb"):
        checks.check(Settings(**options))
    monkeypatch.setattr(checks, "installed", lambda name: False)
    checks.check(Settings(**options))


@pytest.mark.parametrize("name", ["tensorboard", "prodigyopt"])
def test_optional_packages(tmp_path, name):
    pytest.importorskip(name)
    more = dict(report_to="tensorboard") if name == "tensorboard" else dict(optimizer="prodigy", learning_rate=1.0)
    assert run(tmp_path, **more, max_train_steps=1) == 0
    assert name != "tensorboard" or list((tmp_path / "logs").rglob("events.out*"))


def test_the_loop_is_read_in_one_sitting():
    assert len(Path(training.__file__).read_text().splitlines()) <= 400
