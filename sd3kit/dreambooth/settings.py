"""The options of `sd3kit.dreambooth`: one typed field each, with its help, and every check that needs no model.

Names, spelling and meaning are those of diffusers' `examples/dreambooth/train_dreambooth_lora_sd3.py`, which people's
notes use. A default differs in one place, and its help says so.
"""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import os
import re
import tomllib
import types
import typing
from pathlib import Path

from ..errors import UserError

WEIGHTING = ("sigma_sqrt", "logit_normal", "mode", "cosmap")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "comet_ml": ("comet_ml",)}
SECRET = "hub_token"
PROGRESS = "progress.json"  # written last: a checkpoint that has it is whole, and this command's


class DreamBoothError(UserError):
    """What stops a training; the message is one sentence that says what to do."""


def option(default, text: str, choices: tuple[str, ...] | None = None, **more):
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices}, **more)


@dataclasses.dataclass
class Settings:
    """How to train. Every field is an option of the command line and a key of a settings file."""

    # the model
    pretrained_model_name_or_path: str | None = option(
        None, "the model to teach: a Hub id, a saved pipeline's folder, or a name of sd3kit such as nano or medium"
    )
    revision: str | None = option(None, "the Hub revision of the model")
    variant: str | None = option(None, "the variant of its files, such as fp16")
    full_finetuning: bool = option(False, "train all of the transformer and save a whole pipeline, in place of a LoRA")
    # the pictures
    instance_data_dir: str | None = option(
        None, "a folder of pictures of the subject; a NAME.txt beside NAME.png is its caption"
    )
    dataset_name: str | None = option(None, "in place of a folder: a data set of the Hub, or a local one's folder")
    dataset_config_name: str | None = option(None, "the data set's configuration")
    cache_dir: str | None = option(None, "where downloaded data sets are kept")
    image_column: str = option("image", "the data set's column of pictures")
    caption_column: str | None = option(
        None,
        "the column of captions, of the data set or of a metadata.jsonl in the folder; no caption: instance_prompt",
    )
    repeats: int = option(1, "how many times a picture counts in an epoch")
    instance_prompt: str | None = option(None, 'the prompt that names the subject, such as "a photo of sks dog"')
    max_sequence_length: int = option(77, "tokens of a prompt for the T5")
    resolution: int = option(512, "pixels of a training picture's side; the shorter edge is scaled to it")
    center_crop: bool = option(False, "cut the middle out of a picture, not a random part")
    random_flip: bool = option(False, "mirror half of the pictures")
    cache_latents: bool = option(
        False, "encode each picture once, with one crop and one flip, and keep its latents with its own caption"
    )
    # prior preservation
    with_prior_preservation: bool = option(False, "train on pictures of the class too, so that it is not forgotten")
    prior_loss_weight: float = option(1.0, "the weight of the class pictures' loss")
    class_data_dir: str | None = option(None, "a folder of class pictures; missing ones are drawn by the model")
    class_prompt: str | None = option(None, 'the class in words, such as "a photo of a dog"')
    num_class_images: int = option(100, "how many class pictures there should be")
    sample_batch_size: int = option(4, "how many of them are drawn at once")
    prior_generation_precision: str | None = option(
        None, "the precision to draw them in; none: fp16 on a GPU, else fp32", ("no", "fp32", "fp16", "bf16")
    )
    # what is trained
    rank: int = option(4, "the rank of the LoRA matrices")
    base_quantization: str | None = option(
        None, "nf4: keep the frozen transformer in 4 bits (QLoRA, arXiv 2305.14314), with bitsandbytes", ("nf4",)
    )
    lora_dropout: float = option(0.0, "the dropout of the LoRA layers, 0 to 1")
    lora_layers: str | None = option(
        None, "the layers that get a LoRA, with commas: attn.to_k,attn.to_q; none: all eight of the joint attention"
    )
    lora_blocks: str | None = option(None, "the numbers of the blocks that get one, with commas: 12,30; none: all")
    train_text_encoder: bool = option(False, "LoRA on both CLIPs too (diffusers loads none for the T5)")
    # the loss
    weighting_scheme: str = option(
        "logit_normal",
        "logit_normal and mode say how noise levels are drawn; sigma_sqrt and cosmap weight the loss of uniform levels",
        WEIGHTING,
    )
    logit_mean: float = option(0.0, "the mean of logit_normal")
    logit_std: float = option(1.0, "the deviation of logit_normal")
    mode_scale: float = option(1.29, "the scale of mode")
    precondition_outputs: int = option(
        0,
        "1: compare pictures (x - sigma v), not velocities, which multiplies the loss by sigma squared; diffusers' "
        "default is 1, ours is 0, the paper's loss (diffusers issues 8917, 9086)",
    )
    # how long, how fast
    train_batch_size: int = option(4, "pictures a process and forward pass")
    num_train_epochs: int = option(1, "passes over the pictures")
    max_train_steps: int | None = option(None, "updates in all; where given, the epochs follow from it")
    gradient_accumulation_steps: int = option(1, "forward passes to an update")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, slower")
    learning_rate: float = option(1e-4, "the learning rate after the warm-up")
    text_encoder_lr: float = option(
        5e-6, "the learning rate of the text encoders' LoRA; 0 stands, where diffusers' script takes learning_rate"
    )
    scale_lr: bool = option(False, "multiply the learning rate by processes, accumulation and batch size")
    lr_scheduler: str = option("constant", "how the learning rate changes", SCHEDULES)
    lr_warmup_steps: int = option(500, "updates of warm-up; schedule constant has none")
    lr_num_cycles: int = option(1, "restarts of cosine_with_restarts")
    lr_power: float = option(1.0, "the power of polynomial")
    optimizer: str = option("AdamW", "AdamW or prodigy")
    use_8bit_adam: bool = option(False, "AdamW with 8-bit states, of bitsandbytes")
    adam_beta1: float = option(0.9, "the first beta of AdamW and prodigy")
    adam_beta2: float = option(0.999, "the second beta")
    prodigy_beta3: float | None = option(None, "prodigy's beta for its step size; none: the root of beta2")
    prodigy_decouple: bool = option(True, "prodigy: decoupled weight decay")
    prodigy_use_bias_correction: bool = option(True, "prodigy: Adam's bias correction")
    prodigy_safeguard_warmup: bool = option(True, "prodigy: keep a warm-up out of its estimate")
    adam_weight_decay: float = option(1e-4, "weight decay of the transformer's parameters")
    adam_weight_decay_text_encoder: float = option(1e-3, "weight decay of the text encoders' parameters")
    adam_epsilon: float = option(1e-8, "the epsilon of AdamW and prodigy")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    dataloader_num_workers: int = option(0, "processes that prepare pictures; 0 is none but the training itself")
    mixed_precision: str | None = option(
        None, "no, fp16 or bf16; none: what accelerate is configured for", ("no", "fp16", "bf16")
    )
    allow_tf32: bool = option(False, "TF32 in matrix products, on Ampere and later")
    seed: int | None = option(None, "the same seed trains the same model; none: one is drawn")
    # what is written
    output_dir: str = option("sd3-dreambooth", "where the result and the checkpoints go")
    upcast_before_saving: bool = option(False, "save the LoRA in float32 also after training in half precision")
    checkpointing_steps: int = option(500, "updates between checkpoints")
    checkpoints_total_limit: int | None = option(None, "how many checkpoints are kept, the newest; none: all")
    resume_from_checkpoint: str | None = option(None, "a checkpoint's folder, or latest")
    validation_prompt: str | None = option(None, "a prompt that is drawn during training and at its end")
    num_validation_images: int = option(4, "how many pictures of it")
    validation_epochs: int = option(50, "epochs between them")
    report_to: str = option("tensorboard", "tensorboard, wandb, comet_ml, all or none; losses.jsonl is always written")
    logging_dir: str = option("logs", "the tracker's folder in the output folder")
    push_to_hub: bool = option(False, "upload the result to the Hub")
    hub_model_id: str | None = option(None, "the repository to upload to; none: the output folder's name")
    hub_token: str | None = option(None, "the token for it; `hf auth login` is safer", repr=False)
    local_rank: int = option(-1, "accepted for old launchers; accelerate knows the rank")

    def public(self) -> dict[str, typing.Any]:
        """The settings without the token, for trackers and files."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != SECRET}

    def check(self) -> None:
        """Refuse what can be known to be wrong before a model is loaded.

        Raises:
            DreamBoothError: the first thing that is wrong, in one sentence.
        """
        for problem in _problems(self):
            raise DreamBoothError(problem)


def _problems(s: Settings):
    """What is wrong with the settings, sentence by sentence."""
    for name, kind in _kinds().items():
        value, choices = getattr(s, name), _field(name).metadata["choices"]
        if value is None and name in _OPTIONAL:
            continue
        wanted = (int, float) if kind is float else kind
        if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
            yield f"{name} must be {_NAMES[kind]}, not {value!r}."
        elif choices and value not in choices:
            yield f"--{name} must be one of {', '.join(choices)}, not {value!r}{_near(value, choices)}."
    if not s.pretrained_model_name_or_path:
        yield "Name the model to teach: --pretrained_model_name_or_path nano, or a Hub id or a folder."
    if bool(s.instance_data_dir) == bool(s.dataset_name):
        yield "Give the pictures' folder with --instance_data_dir, or a data set with --dataset_name: one of the two."
    if s.instance_data_dir and not Path(s.instance_data_dir).is_dir():
        yield f"There is no folder {s.instance_data_dir}: give the pictures' folder with --instance_data_dir."
    if s.dataset_name and not Path(s.dataset_name).is_dir() and not installed("datasets"):
        yield f"The data set {s.dataset_name} is no local folder, and the Hub's need a package: pip install datasets."
    if not (s.instance_prompt or "").strip():
        yield 'Name the subject: --instance_prompt "a photo of sks dog".'
    if s.with_prior_preservation and not (s.class_data_dir and (s.class_prompt or "").strip()):
        yield "Prior preservation needs --class_data_dir and --class_prompt."
    if s.resolution < 64 or s.resolution % 16:
        near = max(64, round(s.resolution / 16) * 16)
        yield f"--resolution must be divisible by 16 and at least 64, not {s.resolution}: try {near}."
    for name, (low, high) in _RANGES.items():
        value = getattr(s, name)
        if value is not None and not low <= value <= high:
            top = "" if high == float("inf") else f" and at most {high:g}"
            yield f"--{name} must be at least {low:g}{top}, not {value:g}."
    if s.optimizer.lower() not in ("adamw", "prodigy"):
        yield f"--optimizer must be AdamW or prodigy, not {s.optimizer!r}."
    if s.optimizer.lower() == "prodigy" and not installed("prodigyopt"):
        yield "--optimizer prodigy needs a package: pip install prodigyopt."
    if s.use_8bit_adam and s.optimizer.lower() != "adamw":
        yield "--use_8bit_adam goes with --optimizer AdamW only."
    if s.use_8bit_adam and not installed("bitsandbytes"):
        yield "--use_8bit_adam needs a package: pip install bitsandbytes."
    if s.base_quantization and s.full_finetuning:
        yield "--base_quantization is for LoRA: with --full_finetuning the weights themselves learn."
    if s.base_quantization and not installed("bitsandbytes"):
        yield "--base_quantization needs a package: pip install bitsandbytes."
    if s.report_to not in (*TRACKERS, "all", "none"):
        yield f"--report_to must be one of {', '.join(TRACKERS)}, all, none, not {s.report_to!r}."
    for tracker in ("wandb", "comet_ml"):
        if s.hub_token and (s.report_to == tracker or (s.report_to == "all" and installed(tracker))):
            yield f"--hub_token would be stored by {tracker} with the command: use `hf auth login` in its place."
    if s.report_to in ("wandb", "comet_ml") and not installed(s.report_to):
        yield f"--report_to {s.report_to} needs a package: pip install {s.report_to}."
    if s.lora_blocks and not all(block.strip().isdigit() for block in s.lora_blocks.split(",")):
        yield f"--lora_blocks are numbers with commas, such as 12,30, not {s.lora_blocks!r}."
    if s.full_finetuning and (s.train_text_encoder or s.lora_layers or s.lora_blocks):
        yield "--full_finetuning trains the transformer alone: leave out the options of LoRA."
    if s.push_to_hub and os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        yield "--push_to_hub needs the Hub, and HF_HUB_OFFLINE is set: leave one of them out."
    yield from _output_problems(s)


def _output_problems(s: Settings):
    out = Path(s.output_dir)
    parent = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    if not parent.is_dir():
        yield f"The output folder {out} is a file, or lies under one: give another --output_dir."
    elif not os.access(parent, os.W_OK):
        yield f"The output folder {out} cannot be written: give another --output_dir."
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
    return (folder / PROGRESS).is_file()


def checkpoint_step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a training, the oldest first."""
    return sorted(filter(is_checkpoint, _numbered(folder)), key=checkpoint_step)


_INFINITY = float("inf")
_RANGES = {
    "repeats": (1, _INFINITY),
    "max_sequence_length": (1, 512),
    "num_class_images": (1, _INFINITY),
    "sample_batch_size": (1, _INFINITY),
    "prior_loss_weight": (0, _INFINITY),
    "rank": (1, 4096),
    "lora_dropout": (0, 0.99),
    "logit_std": (1e-6, _INFINITY),
    "precondition_outputs": (0, 1),
    "train_batch_size": (1, _INFINITY),
    "num_train_epochs": (1, _INFINITY),
    "max_train_steps": (1, _INFINITY),
    "gradient_accumulation_steps": (1, _INFINITY),
    "learning_rate": (1e-12, 10),
    "text_encoder_lr": (0, 10),
    "lr_warmup_steps": (0, _INFINITY),
    "lr_num_cycles": (1, _INFINITY),
    "adam_beta1": (0, 0.99999),
    "adam_beta2": (0, 0.9999999),
    "adam_epsilon": (0, 1),
    "max_grad_norm": (1e-12, _INFINITY),
    "dataloader_num_workers": (0, 256),
    "seed": (0, 2**32 - 1),
    "checkpointing_steps": (1, _INFINITY),
    "checkpoints_total_limit": (1, _INFINITY),
    "num_validation_images": (0, 1000),
    "validation_epochs": (1, _INFINITY),
}
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _field(name: str) -> dataclasses.Field:
    return next(f for f in dataclasses.fields(Settings) if f.name == name)


def _kinds() -> dict[str, type]:
    """The type of each option; `str | None` counts as str."""
    kinds = {}
    for name, hint in typing.get_type_hints(Settings).items():
        kinds[name] = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
    return kinds


_OPTIONAL = {name for name, hint in typing.get_type_hints(Settings).items() if isinstance(hint, types.UnionType)}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _near(name: object, names) -> str:
    near = difflib.get_close_matches(str(name), names, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise DreamBoothError(f"{message[0].upper()}{message[1:]}; --help lists the options.")


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"true or false is wanted, not {text!r}")
    return text.lower() in ("true", "1", "yes")


def parser() -> argparse.ArgumentParser:
    """An option for each field. What is not given stays out of the result, so that a settings file can say it."""
    top = _Parser(
        prog="accelerate launch -m sd3kit.dreambooth",
        description="Teach Stable Diffusion 3 a subject from a few pictures, with LoRA or in full.",
        argument_default=argparse.SUPPRESS,
    )
    top.add_argument("--settings", help="a .json, .toml or .yaml file of options; the command line overrules it")
    kinds = _kinds()
    for field in dataclasses.fields(Settings):
        kind, default = kinds[field.name], field.default
        text = field.metadata["help"].replace("%", "%%") + ("" if default in (None, False) else f" ({default})")
        if kind is bool and default is False:
            top.add_argument(f"--{field.name}", action="store_true", help=text)
        elif kind is bool:
            top.add_argument(f"--{field.name}", type=_truth, nargs="?", const=True, metavar="BOOL", help=text)
        else:
            choices = field.metadata["choices"]
            top.add_argument(
                f"--{field.name}", type=kind, choices=choices, metavar=None if choices else "VALUE", help=text
            )
    return top


def parse(arguments: list[str] | None = None) -> Settings:
    """The settings that a command line, and the file that its `--settings` names, give.

    Raises:
        DreamBoothError: an unknown option, a value of the wrong kind, or a file that cannot be read.
    """
    given, unknown = parser().parse_known_args(arguments)
    names = [f.name for f in dataclasses.fields(Settings)]
    if unknown:
        name = unknown[0].partition("=")[0]  # its value may be a secret
        raise DreamBoothError(f"There is no option {name}{_near(name.lstrip('-'), names)}; --help lists them.")
    values = vars(given)
    stored = _read(Path(file)) if (file := values.pop("settings", None)) else {}
    for name in stored:
        if name not in names:
            raise DreamBoothError(f"The file {file} names an unknown option {name}{_near(name, names)}.")
    return Settings(**(stored | values))


def _read(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            found = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            found = yaml.safe_load(text)
        else:
            found = json.loads(text)
    except OSError as error:
        raise DreamBoothError(f"The settings file {path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # each format has an error of its own
        raise DreamBoothError(f"The settings file {path} is no valid {path.suffix or 'JSON'} file.") from error
    if not isinstance(found, dict):
        raise DreamBoothError(f"The settings file {path} must hold names and values.")
    return found
