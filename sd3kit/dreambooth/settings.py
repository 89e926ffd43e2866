"""The options of `sd3kit.dreambooth`: one typed field each, with its help, and the command line that gives them.

Names, spelling and meaning are those of diffusers' `examples/dreambooth/train_dreambooth_lora_sd3.py`, which people's
notes use. A default differs in one place, and its help says so.
"""

import dataclasses
import difflib
import importlib.util
import types
import typing

from ..errors import UserError

WEIGHTING = ("sigma_sqrt", "logit_normal", "mode", "cosmap")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
TRACKERS = ("tensorboard", "wandb", "comet_ml")
SECRET = "hub_token"
PROGRESS = "progress.json"  # written last: a checkpoint that has it is whole, and this command's


class DreamBoothError(UserError):
    """What stops a training; the message is one sentence that says what to do."""


def option(default, text: str, choices: tuple[str, ...] | None = None, **more):
    limited = {"choices": choices} if choices else {}
    return dataclasses.field(default=default, metadata={"help": text} | limited, **more)


@dataclasses.dataclass
class Settings:
    """How to train. Every field is an option of the command line."""

    # the model
    pretrained_model_name_or_path: str | None = option(None, "the model to teach: a Hub id, a folder, or a sd3kit name")
    revision: str | None = option(None, "the Hub revision of the model")
    variant: str | None = option(None, "the variant of its files, such as fp16")
    full_finetuning: bool = option(False, "train all of the transformer and save a whole pipeline, in place of a LoRA")
    # the pictures
    instance_data_dir: str | None = option(None, "a folder of pictures; a NAME.txt beside NAME.png is its caption")
    dataset_name: str | None = option(None, "in place of a folder: a data set of the Hub, or a local one's folder")
    dataset_config_name: str | None = option(None, "the data set's configuration")
    cache_dir: str | None = option(None, "where downloaded data sets are kept")
    image_column: str = option("image", "the data set's column of pictures")
    caption_column: str | None = option(None, "the column of captions, of the data set or a metadata.jsonl")
    repeats: int = option(1, "how many times a picture counts in an epoch")
    instance_prompt: str | None = option(None, 'the prompt that names the subject, such as "a photo of sks dog"')
    max_sequence_length: int = option(77, "tokens of a prompt for the T5")
    resolution: int = option(512, "pixels of a training picture's side; the shorter edge is scaled to it")
    center_crop: bool = option(False, "cut the middle out of a picture, not a random part")
    random_flip: bool = option(False, "mirror half of the pictures")
    cache_latents: bool = option(False, "encode each picture once, with one crop and one flip")
    # prior preservation
    with_prior_preservation: bool = option(False, "train on pictures of the class too, so that it is not forgotten")
    prior_loss_weight: float = option(1.0, "the weight of the class pictures' loss")
    class_data_dir: str | None = option(None, "a folder of class pictures; missing ones are drawn by the model")
    class_prompt: str | None = option(None, 'the class in words, such as "a photo of a dog"')
    num_class_images: int = option(100, "how many class pictures there should be")
    sample_batch_size: int = option(4, "how many of them are drawn at once")
    prior_generation_precision: str | None = option(
        None, "the precision they are drawn in; not given: fp16 on a GPU, else fp32", ("no", "fp32", "fp16", "bf16")
    )
    # what is trained
    rank: int = option(4, "the rank of the LoRA matrices")
    base_quantization: str | None = option(None, "nf4: the frozen transformer in 4 bits (arXiv 2305.14314)", ("nf4",))
    lora_dropout: float = option(0.0, "the dropout of the LoRA layers, 0 to 1")
    lora_layers: str | None = option(None, "layers with a LoRA: attn.to_k,attn.to_q; none: all of the joint attention")
    lora_blocks: str | None = option(None, "the numbers of the blocks that get one, with commas: 12,30; none: all")
    train_text_encoder: bool = option(False, "LoRA on both CLIPs too (diffusers loads none for the T5)")
    # the loss
    weighting_scheme: str = option("logit_normal", "how noise levels are drawn or the loss is weighted", WEIGHTING)
    logit_mean: float = option(0.0, "the mean of logit_normal")
    logit_std: float = option(1.0, "the deviation of logit_normal")
    mode_scale: float = option(1.29, "the scale of mode")
    precondition_outputs: int = option(0, "1: diffusers' loss; ours, 0, is the paper's (diffusers issues 8917, 9086)")
    # how long, how fast
    train_batch_size: int = option(4, "pictures a process and forward pass")
    num_train_epochs: int = option(1, "passes over the pictures")
    max_train_steps: int | None = option(None, "updates in all; where given, the epochs follow from it")
    gradient_accumulation_steps: int = option(1, "forward passes to an update")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, slower")
    learning_rate: float = option(1e-4, "the learning rate after the warm-up")
    text_encoder_lr: float = option(5e-6, "the learning rate of the text encoders' LoRA; 0 keeps them as they are")
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
    mixed_precision: str | None = option(None, "none: what accelerate is configured for", ("no", "fp16", "bf16"))
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
    validation_epochs: int = option(50, "epochs between two validations")
    report_to: str = option("tensorboard", "tensorboard, wandb, comet_ml, all or none; losses.jsonl is always written")
    logging_dir: str = option("logs", "the tracker's folder in the output folder")
    push_to_hub: bool = option(False, "upload the result to the Hub")
    hub_model_id: str | None = option(None, "the repository to upload to; none: the output folder's name")
    hub_token: str | None = option(None, "the token for it; `hf auth login` is safer", repr=False)
    local_rank: int = option(-1, "accepted for old launchers; accelerate knows the rank")

    def public(self) -> dict[str, typing.Any]:
        """The settings without the token, for trackers and files."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != SECRET}


def kinds() -> dict[str, tuple[type, bool]]:
    """The type of each option, and whether it may be None: `str | None` is (str, True)."""
    found = {}
    for name, hint in typing.get_type_hints(Settings).items():
        optional = isinstance(hint, types.UnionType)
        found[name] = (typing.get_args(hint)[0] if optional else hint, optional)
    return found


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def near(name: object, names) -> str:
    found = difflib.get_close_matches(str(name), names, n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def parse(arguments: list[str] | None = None) -> Settings:
    """The settings that a command line gives, by transformers' parser; @FILE stands for options in a file, one a line.

    Raises:
        DreamBoothError: an unknown option, a value of the wrong kind, or a file that cannot be read.
    """
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def convert_arg_line_to_args(self, line: str) -> list[str]:
            line.encode()  # Python 3.12 reads bytes that are no UTF-8 as surrogates, which raise here
            return super().convert_arg_line_to_args(line)

        def add_argument(self, *names: str, **how):
            if names[0].startswith("--no_"):  # else it has the words of the option that it switches off
                how["help"] = f"switch {names[0].replace('no_', '', 1)} off"
            return super().add_argument(*names, **how)

        def error(self, message: str) -> typing.NoReturn:
            raise DreamBoothError(f"{message[0].upper()}{message[1:200]}; --help lists the options.")

    parser = Parser(Settings, prog="accelerate launch -m sd3kit.dreambooth", fromfile_prefix_chars="@")
    parser.description = "Teach Stable Diffusion 3 a subject from a few pictures, with LoRA or in full."
    try:
        found, unknown = parser.parse_args_into_dataclasses(arguments, True, look_for_args_file=False)
    except UnicodeError as error:
        raise DreamBoothError("The file of options is no text: save it in UTF-8.") from error
    if unknown:
        name = unknown[0].partition("=")[0][:40]  # its value may be a secret
        known = [f.name for f in dataclasses.fields(Settings)]
        raise DreamBoothError(f"There is no option {name}{near(name.lstrip('-'), known)}; --help lists them.")
    return found
