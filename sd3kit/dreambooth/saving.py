"""What a training writes: checkpoints, the result, pictures. Each is whole or not there."""

import json
import os
import shutil
from io import BytesIO
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import free_memory
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .. import files
from ..loading.names import own_settings
from . import reporting
from .checks import checkpoint_step, checkpoints, is_checkpoint
from .data import picture_files
from .model import Denoiser, encode_clips, load
from .reporting import AGAIN, writing
from .settings import PROGRESS, DreamBoothError, Settings

TRAINED_FILE = "trained.safetensors"


def check_finite(accelerator: Accelerator, model: torch.nn.Module, step: int) -> None:
    """Stop, in every process, before weights that hold NaN are written; the loss shows it a step later."""
    own = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters() if p.requires_grad]  # a shard
    broken = any(not p.isfinite().all() for p in own)
    if accelerator.reduce(torch.tensor(float(broken), device=accelerator.device), "sum") > 0:
        raise DreamBoothError(f"The trained weights hold NaN or infinity at step {step}: {AGAIN}")


def progress(settings: Settings, accelerator: Accelerator, step: int, seed: int | None) -> dict[str, int | None]:
    """Where a training is, and what its samples follow from."""
    own = {name: getattr(settings, name) for name in ("train_batch_size", "gradient_accumulation_steps")}
    return {"step": step, "seed": seed, **own, "num_processes": accelerator.num_processes}


def read_progress(settings: Settings, accelerator: Accelerator, checkpoint: Path) -> dict[str, int]:
    """What `progress` was when a checkpoint was written.

    Raises:
        DreamBoothError: it cannot be read, or an option has changed, so that other samples would follow.
    """
    now = progress(settings, accelerator, 0, settings.seed)
    try:
        stored = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        then = {name: int(stored[name]) for name in now}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DreamBoothError(f"The checkpoint {checkpoint} is damaged: its {PROGRESS} cannot be read.") from error
    for name, value in now.items():
        if name != "step" and value not in (None, then[name]):
            raise DreamBoothError(
                f"The checkpoint {checkpoint} was made with {name} {then[name]}, not {value}: go on with "
                f"{then[name]}, or start again in another --output_dir."
            )
    return then


def save_checkpoint(settings: Settings, accelerator: Accelerator, model: torch.nn.Module, step: int, seed: int) -> None:
    """Write a checkpoint under another name and rename it when it is whole; then remove the outdated ones.

    Those are the ones over the limit, and all of later steps: an earlier training wrote them, and this one went on from
    a checkpoint before them.
    """
    check_finite(accelerator, model, step)
    out = Path(settings.output_dir)
    folder, part = out / f"checkpoint-{step}", out / f".checkpoint-{step}.part"
    with writing("A checkpoint", out):
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            text = json.dumps(progress(settings, accelerator, step, seed))
            (part / PROGRESS).write_text(text, encoding="utf-8")
            outdated = [set_aside(folder)] if folder.exists() else []
            os.rename(part, folder)
            whole = checkpoints(out)
            own = [p for p in whole if checkpoint_step(p) <= step]
            kept = own[-(settings.checkpoints_total_limit or len(own)) :]
            outdated += [set_aside(p) for p in whole if p not in kept]
            for gone in outdated:
                shutil.rmtree(gone)
    accelerator.wait_for_everyone()


def set_aside(folder: Path) -> Path:
    """Take a checkpoint's name away: half removed it must not be taken for a whole one."""
    gone = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(folder, gone)
    return gone


def find_checkpoint(settings: Settings) -> Path | None:
    out, named = Path(settings.output_dir), settings.resume_from_checkpoint
    if named and named != "latest":
        return next(p for p in (Path(named), out / named) if is_checkpoint(p))
    return (checkpoints(out) or [None])[-1] if named else None


def use_small_checkpoints(settings: Settings, accelerator: Accelerator) -> None:
    """Let accelerate's checkpoints hold what learns, not the frozen model; a LoRA also as diffusers reads it."""

    def save(models, weights, folder):
        if accelerator.is_main_process:
            model = accelerator.unwrap_model(models[0])
            learning = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
            save_file(learning, Path(folder) / TRAINED_FILE)
            if not settings.full_finetuning:
                save_lora(model, model.state_dict(), Path(folder))
        weights.clear()

    def restore(models, folder):
        stored = load_file(Path(folder) / TRAINED_FILE)
        learning = {n: p for n, p in accelerator.unwrap_model(models[0]).named_parameters() if p.requires_grad}
        if stored.keys() != learning.keys():
            raise RuntimeError("other layers were trained")
        for name, parameter in learning.items():
            parameter.data.copy_(stored[name])
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(restore)


def save_lora(model: Denoiser, state: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the LoRA as `load_lora_weights` of diffusers' SD3 pipeline reads it."""

    def layers(name: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        return {k: v.to(dtype or v.dtype).cpu() for k, v in get_peft_model_state_dict(module, own).items()}

    found = {f"{name}_lora_layers": layers(name, module) for name, module in model.named_children()}
    StableDiffusion3Pipeline.save_lora_weights(folder, **found)


def save_result(
    settings: Settings, accelerator: Accelerator, model: torch.nn.Module, step: int, dtype: torch.dtype
) -> None:
    """Write the LoRA, or a whole pipeline, to the output folder; each file appears when it is whole."""
    check_finite(accelerator, model, step)
    out = Path(settings.output_dir)
    state, part = accelerator.get_state_dict(model), out / ".result.part"
    if not accelerator.is_main_process:
        return
    plain = accelerator.unwrap_model(model)
    dtype = torch.float32 if settings.upcast_before_saving else dtype
    if settings.full_finetuning:
        own = {k.removeprefix("transformer."): v.to("cpu", dtype) for k, v in state.items()}
        with torch.device("meta"):
            trained = SD3Transformer2DModel.from_config(plain.transformer.config)
        trained.load_state_dict(own, assign=True)
        pipe = load(settings, accelerator, dtype, transformer=trained, device="cpu")  # the training fills the device
    with writing("The result", out):
        shutil.rmtree(part, ignore_errors=True)
        if settings.full_finetuning:
            pipe.save_pretrained(part, safe_serialization=True)
            (out / "model_index.json").unlink(missing_ok=True)
        else:
            save_lora(plain, state, part, dtype)
        # the index goes first and comes last: with it the folder counts as a pipeline
        for path in sorted(part.iterdir(), key=lambda p: p.name == "model_index.json"):
            if (out / path.name).is_dir():
                shutil.rmtree(out / path.name)
            os.replace(path, out / path.name)
        part.rmdir()


@torch.no_grad()
def draw_validation(settings, accelerator, model, vae, scheduler, prompts, step: int, seed: int) -> list:
    """Draw the validation prompt with the model as it is, into the folder `validation` and the trackers."""
    plain = accelerator.unwrap_model(model)
    device, home, texts = accelerator.device, vae.device, (settings.validation_prompt, "")
    pairs = [prompts[p] for p in texts]
    plain.eval()
    if plain.text is not None:
        with accelerator.autocast():  # the CLIPs in half precision, their LoRA in float32
            pairs = [encode_clips(plain.text, [p], e.to(device)) for p, (e, _) in zip(texts, pairs, strict=True)]
    (embeds, pooled), (empty, empty_pooled) = ([t.to(device, torch.float32) for t in pair] for pair in pairs)
    pipe = StableDiffusion3Pipeline(
        transformer=plain.transformer, vae=vae.to(device), scheduler=type(scheduler).from_config(scheduler.config),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    with accelerator.autocast():
        images = [
            pipe(
                prompt_embeds=embeds, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
                negative_pooled_prompt_embeds=empty_pooled, height=settings.resolution, width=settings.resolution,
                generator=torch.Generator().manual_seed((seed + i) % 2**63), **_own_settings(settings),
            ).images[0]
            for i in range(settings.num_validation_images)
        ]  # fmt: skip
    plain.train()
    vae.to(home)  # the CPU, where the latents are cached
    folder = Path(settings.output_dir) / "validation"
    with writing("A validation picture", folder):
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            write_picture(folder / f"step-{step:06d}-{i}.png", image)
    reporting.track_images(accelerator, images, step)
    return images


def write_picture(path: Path, image) -> None:
    image.save(stored := BytesIO(), "PNG")
    files.write_whole(path, stored.getvalue())


@torch.no_grad()
def draw_class_pictures(settings: Settings, accelerator: Accelerator, seed: int) -> None:
    """Fill the folder of class pictures with the model's own, each process its share; those there are kept."""
    folder = Path(settings.class_data_dir)
    wanted = settings.num_class_images - len(picture_files(folder) if folder.is_dir() else [])
    free = (n for n in range(10**6) if not (folder / f"class-{n:05d}.png").exists())
    numbers = [next(free) for _ in range(max(0, wanted))]
    accelerator.wait_for_everyone()  # all have counted before one draws
    if not numbers:
        return
    with files.lock(folder):
        accelerator.wait_for_everyone()  # the folder is there
        _draw(settings, accelerator, seed, numbers)
    accelerator.wait_for_everyone()
    free_memory()


def _own_settings(settings: Settings) -> dict:
    own = own_settings(settings.pretrained_model_name_or_path)
    return {"num_inference_steps": own["steps"], "guidance_scale": own["guidance"]}


def _draw(settings: Settings, accelerator: Accelerator, seed: int, numbers: list[int]) -> None:
    half = torch.float32 if accelerator.device.type == "cpu" else torch.float16
    known = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    pipe = load(settings, accelerator, known.get(settings.prior_generation_precision, half))
    pipe.set_progress_bar_config(disable=True)
    with accelerator.split_between_processes(numbers) as share:
        for start in tqdm(range(0, len(share), settings.sample_batch_size), desc="class pictures", unit="batch"):
            part = share[start : start + settings.sample_batch_size]
            sources = [torch.Generator().manual_seed((seed + n) % 2**63) for n in part]
            images = pipe(
                [settings.class_prompt] * len(part),
                generator=sources,
                max_sequence_length=settings.max_sequence_length,
                **_own_settings(settings),
            ).images
            for n, image in zip(part, images, strict=True):
                write_picture(Path(settings.class_data_dir) / f"class-{n:05d}.png", image)
