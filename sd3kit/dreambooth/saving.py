"""What a training writes: checkpoints, the result, losses, pictures. Checkpoint and result are whole or not there."""

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .. import files
from ..errors import UserError
from .checks import checkpoint_step, checkpoints, is_checkpoint
from .model import Denoiser, load
from .settings import PROGRESS, DreamBoothError, Settings

TRAINED_FILE = "trained.safetensors"
FROM_THE_START = "the model's weights hold NaN, or overflow in fp16: get the model again, or use bf16 or no."
AGAIN = "lower --learning_rate, or use bf16 in place of fp16, and go on with --resume_from_checkpoint latest."


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Turn the many errors of a full or broken disk into one sentence."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's own is a RuntimeError
        if isinstance(error, torch.OutOfMemoryError | UserError):
            raise
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "the disk is full" if full else (str(error) or type(error).__name__).splitlines()[0][:120]
        advice = "make room" if full else "see that it can be"
        raise DreamBoothError(
            f"{what} could not be written to {folder} ({reason}): {advice} and go on with --resume_from_checkpoint "
            "latest; what was saved before is whole."
        ) from error


def check_finite(accelerator: Accelerator, model: torch.nn.Module, step: int) -> None:
    """Stop, in every process, before weights that hold NaN are written; the loss shows it a step later."""
    own = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters() if p.requires_grad]  # a shard
    broken = any(not p.isfinite().all() for p in own)
    if accelerator.reduce(torch.tensor(float(broken), device=accelerator.device), "sum") > 0:
        raise DreamBoothError(f"The trained weights hold NaN or infinity at step {step}: {AGAIN}")


def progress(settings: Settings, accelerator: Accelerator, step: int, seed: int | None) -> dict[str, int | None]:
    """Where a training is, and what its samples follow from."""
    return {
        "step": step,
        "seed": seed,
        "train_batch_size": settings.train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "num_processes": accelerator.num_processes,
    }


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
        # with a device_map, even none, it stays on the CPU: the training fills the device
        pipe = load(settings, accelerator, dtype, transformer=trained, device_map=None)
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


class Losses:
    """`losses.jsonl`: a line an update (step, loss, lr). A resumed training drops the lines after its checkpoint.

    On a GPU an update's loss is read when the next update has been queued: the device never waits for this program.
    """

    def __init__(self, accelerator: Accelerator, path: Path, step: int, bar: tqdm):
        self.accelerator, self.bar, self.file, self.waiting = accelerator, bar, None, []
        if not accelerator.is_main_process:
            return
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if step and path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError) as error:
            raise DreamBoothError(f"The file {path} is damaged: move it away, and a new one is begun.") from error
        files.write_whole(path, "".join(kept))
        self.file = path.open("a", encoding="utf-8")

    def add(self, step: int, lr: float, loss: torch.Tensor) -> None:
        arrived = torch.cuda.Event() if loss.device.type == "cuda" else None
        self.waiting.append((step, lr, loss.detach().to("cpu", non_blocking=True, copy=True), arrived))
        if arrived:
            arrived.record()
        self.write(later=1 if arrived else 0)

    def write(self, later: int = 0) -> None:
        """Write all but the last so many.

        Raises:
            DreamBoothError: a loss is NaN or infinite, or the disk is full.
        """
        while len(self.waiting) > later:
            step, lr, loss, arrived = self.waiting.pop(0)
            if arrived:
                arrived.synchronize()
            loss = loss.item()
            if not math.isfinite(loss):
                raise DreamBoothError(f"The loss is {loss} at step {step}: {AGAIN if step > 1 else FROM_THE_START}")
            self.bar.set_postfix(loss=f"{loss:.4f}", lr=lr)
            self.accelerator.log({"loss": loss, "lr": lr}, step=step)
            if self.file:
                with writing("The losses", Path(self.file.name).parent):
                    self.file.write(json.dumps({"step": step, "loss": loss, "lr": lr}) + "\n")
                    self.file.flush()
