"""What a training tells: losses, pictures for the trackers, what could not be written, and the result for the Hub.

The token goes to huggingface_hub and nowhere else.
"""

import contextlib
import errno
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm

from .. import files
from ..errors import UserError
from ..loading import hub
from .settings import DreamBoothError, Settings

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


def track_images(accelerator: Accelerator, images: list[Image.Image], step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.stack(images)}, step, **more)


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
        self.waiting.append((step, lr, loss.detach().to("cpu", non_blocking=bool(arrived), copy=True), arrived))
        if arrived:
            arrived.record()
        self.write(later=1 if arrived else 0)

    def write(self, later: int = 0) -> None:
        """Write all but the last so many. DreamBoothError: a loss is NaN or infinite, or the disk is full."""
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


def create(settings: Settings) -> str:
    """Make the repository before the training, so that a wrong token costs no hour: its id, or "" where none is wanted.

    Raises DreamBoothError: not logged in, no right to write, or no network.
    """
    if not settings.push_to_hub:
        return ""
    from huggingface_hub import create_repo

    name = settings.hub_model_id or Path(settings.output_dir).resolve().name
    ask = lambda: create_repo(name, token=settings.hub_token, exist_ok=True)  # noqa: E731
    return _try(settings, name, lambda: hub.within(hub.PATIENCE, ask), first=True).repo_id


def upload(settings: Settings, name: str, images: list[Image.Image]) -> None:
    """Upload the result to the repository of that name, with a model card; checkpoints stay here."""
    from huggingface_hub import upload_folder

    out = Path(settings.output_dir)
    files.write_whole(out / "README.md", card(settings, name, len(images)))
    hidden = ["checkpoint-*", ".*", f"{settings.logging_dir}/*", "settings.json"]
    more = dict(ignore_patterns=hidden, commit_message="Trained with sd3kit.dreambooth")
    _try(settings, name, lambda: upload_folder(repo_id=name, folder_path=out, token=settings.hub_token, **more))


def _try(settings: Settings, name: str, call, first: bool = False):
    try:
        with hub.guarded(first):
            return call()
    except Exception as error:
        why = hub.explain(error, name, name) or type(error).__name__
        if settings.hub_token and settings.hub_token in why:
            why = type(error).__name__
        advice = "log in with `hf auth login` with a token that may write, or leave out --push_to_hub."
        raise DreamBoothError(f"The Hub did not take {name} ({why.rstrip('.')}): {advice}") from None


def card(settings: Settings, name: str, drawn: int) -> str:
    """The model card: what it was taught, from what, how to load it, and the last pictures of the validation."""
    from huggingface_hub import ModelCard, ModelCardData

    base, full = settings.pretrained_model_name_or_path, settings.full_finetuning
    tags = ["stable-diffusion-3", "dreambooth", *([] if full else ["lora"])]
    more = dict(library_name="diffusers", pipeline_tag="text-to-image", instance_prompt=settings.instance_prompt)
    pictures = sorted((Path(settings.output_dir) / "validation").glob("step-*.png"))[-drawn:] if drawn else []
    lora = "" if full else f'\npipe.load_lora_weights("{name}")'
    text = f"""---
{ModelCardData(base_model=base, tags=tags, **more).to_yaml()}
---
# {name}: {settings.instance_prompt}

DreamBooth {"in full" if full else f"LoRA of rank {settings.rank}"} on {base}, trained with `sd3kit.dreambooth`. The
prompt that names the subject: `{settings.instance_prompt}`.

```python
pipe = StableDiffusion3Pipeline.from_pretrained("{name if full else base}"){lora}
```

"""
    return str(ModelCard(text + "\n".join(f"![{settings.validation_prompt}](validation/{p.name})" for p in pictures)))
