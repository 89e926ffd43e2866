"""What can be known to be wrong with a training's settings before torch is imported or a model is loaded."""

import os
import re
from pathlib import Path

from .. import files
from .settings import PROGRESS, TRACKERS, DreamBoothError, Settings, installed, kinds, near

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
MANY = 10_000_000  # updates, epochs: years
# The least and the most that makes sense. Every number has limits, so NaN and infinity are within none.
LIMITS = {
    **dict.fromkeys(("repeats", "train_batch_size", "sample_batch_size"), (1, 1000)),
    **dict.fromkeys(("max_train_steps", "num_train_epochs", "checkpointing_steps", "validation_epochs"), (1, MANY)),
    **dict.fromkeys(("checkpoints_total_limit", "lr_num_cycles"), (1, MANY)),
    **dict.fromkeys(("adam_weight_decay", "adam_weight_decay_text_encoder", "text_encoder_lr"), (0, 10)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "prodigy_beta3"), (0, 0.9999999)),
    **{"precondition_outputs": (0, 1), "adam_epsilon": (0, 1), "lora_dropout": (0, 0.99)},
    **dict.fromkeys(("num_validation_images", "prior_loss_weight", "lr_power"), (0, 1000)),
    **{"lr_warmup_steps": (0, MANY), "local_rank": (-1, MANY)},
    **{"max_sequence_length": (1, 512), "resolution": (64, 8192), "rank": (1, 4096), "num_class_images": (1, 100_000)},
    **{"gradient_accumulation_steps": (1, 10_000), "dataloader_num_workers": (0, 256), "seed": (0, 2**32 - 1)},
    **{"logit_mean": (-10, 10), "logit_std": (1e-6, 10), "learning_rate": (1e-12, 10), "max_grad_norm": (1e-12, 1e12)},
    "mode_scale": (-1, 1.75),  # the paper's: beyond, levels are drawn from outside of 0..1
}


def check(settings: Settings) -> None:
    """Refuse what can be known to be wrong, by a UserError that says the first such thing in one sentence."""
    for problem in _problems(settings):
        raise DreamBoothError(problem)


def _problems(s: Settings):
    """What is wrong with the settings, sentence by sentence."""
    for name, (kind, optional) in kinds().items():
        value, choices = getattr(s, name), s.__dataclass_fields__[name].metadata.get("choices")
        if value is None and optional:
            continue
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            yield f"{name} must be {_NAMES[kind]}, not {value!r}."
        elif choices and value not in choices:
            yield f"--{name} must be one of {', '.join(choices)}, not {value!r}{near(value, choices)}."
        elif name in LIMITS and not LIMITS[name][0] <= value <= LIMITS[name][1]:
            low, high = LIMITS[name]
            yield f"--{name} must be at least {low:,} and at most {high:,}, not {str(value)[:40]}."
        elif name.endswith("_prompt") and any("\ud800" <= letter <= "\udfff" for letter in value):
            yield f"--{name} holds bytes that are no text: write it in UTF-8."
    if not s.pretrained_model_name_or_path:
        yield "Name the model to teach: --pretrained_model_name_or_path nano, or a Hub id or a folder."
    if bool(s.instance_data_dir) == bool(s.dataset_name):
        yield "Give the pictures' folder with --instance_data_dir, or a data set with --dataset_name: one of the two."
    if s.instance_data_dir and not os.path.isdir(s.instance_data_dir):
        yield f"There is no folder {s.instance_data_dir}: give the pictures' folder with --instance_data_dir."
    if s.dataset_name and not os.path.isdir(s.dataset_name) and not installed("datasets"):
        yield f"The data set {s.dataset_name} is no local folder, and the Hub's need a package: pip install datasets."
    if not (s.instance_prompt or "").strip():
        yield 'Name the subject: --instance_prompt "a photo of sks dog".'
    if s.with_prior_preservation and not (s.class_data_dir and (s.class_prompt or "").strip()):
        yield "Prior preservation needs --class_data_dir and --class_prompt."
    folders = [os.path.realpath(folder) for folder in (s.instance_data_dir, s.class_data_dir) if folder]
    if len(folders) > len(set(folders)):
        yield "--class_data_dir and --instance_data_dir are one folder: give the class pictures a folder of their own."
    if s.resolution % 16:
        yield f"--resolution must be divisible by 16, not {s.resolution}: try {max(64, round(s.resolution / 16) * 16)}."
    if s.optimizer.lower() not in ("adamw", "prodigy"):
        yield f"--optimizer must be AdamW or prodigy, not {s.optimizer!r}."
    if s.use_8bit_adam and s.optimizer.lower() != "adamw":
        yield "--use_8bit_adam goes with --optimizer AdamW only."
    if s.base_quantization and s.full_finetuning:
        yield "--base_quantization is for LoRA: with --full_finetuning the weights themselves learn."
    if s.report_to not in (*TRACKERS, "all", "none"):
        yield f"--report_to must be one of {', '.join(TRACKERS)}, all, none, not {s.report_to!r}."
    for tracker in ("wandb", "comet_ml"):
        if s.hub_token and (s.report_to == tracker or (s.report_to == "all" and installed(tracker))):
            yield f"--hub_token would be stored by {tracker} with the command: use `hf auth login` in its place."
    for option, package, wanted in (
        ("--optimizer prodigy", "prodigyopt", s.optimizer.lower() == "prodigy"),
        ("--use_8bit_adam", "bitsandbytes", s.use_8bit_adam),
        ("--base_quantization", "bitsandbytes", s.base_quantization),
        (f"--report_to {s.report_to}", s.report_to, s.report_to in ("wandb", "comet_ml")),
    ):
        if wanted and not installed(package):
            yield f"{option} needs a package: pip install {package}."
    if s.lora_blocks and not all(block.strip().isdigit() for block in s.lora_blocks.split(",")):
        yield f"--lora_blocks are numbers with commas, such as 12,30, not {s.lora_blocks!r}."
    if s.full_finetuning and (s.train_text_encoder or s.lora_layers or s.lora_blocks):
        yield "--full_finetuning trains the transformer alone: leave out the options of LoRA."
    if s.push_to_hub and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        yield "--push_to_hub needs the Hub, and HF_HUB_OFFLINE is set: leave one of them out."
    yield from _output_problems(s)


def _output_problems(s: Settings):
    if not s.output_dir.strip():
        yield "--output_dir is empty: name a folder for the result."
    files.check_writable(s.output_dir, folder=True)
    out = Path(s.output_dir)
    named, ours = s.resume_from_checkpoint, checkpoints(out)
    if named and named != "latest" and not any(is_checkpoint(p) for p in (Path(named), out / named)):
        yield f"There is no whole checkpoint {named}: {out} holds {', '.join(p.name for p in ours) or 'none'}."
    if others := [p.name for p in _numbered(out) if p not in ours]:
        yield f"{out} holds {others[0]}, which this command did not write: give another --output_dir, or move it away."
    if ours and not named:
        yield f"{out} holds {ours[-1].name}: add --resume_from_checkpoint latest, or give another --output_dir."


def _numbered(folder: Path) -> list[Path]:
    return [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a whole checkpoint of this command; those of diffusers' script have the same names."""
    return os.path.isfile(folder / PROGRESS)


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a training, the oldest first."""
    return sorted(filter(is_checkpoint, _numbered(folder)), key=checkpoint_step)
