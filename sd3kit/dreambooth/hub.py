"""Trackers and the Hub: what a training shows elsewhere. The token goes to huggingface_hub and nowhere else."""

import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from .. import files
from .settings import TRACKERS, DreamBoothError, Settings, installed


def trackers(settings: Settings) -> list[str]:
    """The trackers that are asked for and installed; a missing default is said, other missing ones were refused."""
    if settings.report_to == "none":
        return []
    if settings.report_to == "all":
        return [name for name in TRACKERS if installed(name)]
    if not installed(settings.report_to):
        print("tensorboard is not installed, so losses go to losses.jsonl alone.", file=sys.stderr)
        return []
    return [settings.report_to]


def track_images(accelerator: Accelerator, images: list[Image.Image], prompt: str, step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_images("validation", np.stack(images), step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": [wandb.Image(image, caption=prompt) for image in images]}, step=step)


def repository(settings: Settings) -> str:
    return settings.hub_model_id or Path(settings.output_dir).resolve().name


def create(settings: Settings) -> None:
    """Make the repository before the training, so that a wrong token costs no hour.

    Raises:
        DreamBoothError: not logged in, no right to write, or no network.
    """
    if settings.push_to_hub:
        from huggingface_hub import create_repo

        _try(settings, lambda: create_repo(repository(settings), token=settings.hub_token, exist_ok=True))


def upload(settings: Settings, images: list[Image.Image]) -> None:
    """Upload the result with a model card; checkpoints stay here."""
    if not settings.push_to_hub:
        return
    from huggingface_hub import create_repo, upload_folder

    out = Path(settings.output_dir)
    name = _try(settings, lambda: create_repo(repository(settings), token=settings.hub_token, exist_ok=True)).repo_id
    files.write_whole(out / "README.md", card(settings, name, images))
    hidden = ["checkpoint-*", ".*", f"{settings.logging_dir}/*", "settings.json"]
    _try(settings, lambda: upload_folder(
        repo_id=name, folder_path=out, token=settings.hub_token, ignore_patterns=hidden,
        commit_message="Trained with sd3kit.dreambooth",
    ))  # fmt: skip


def _try(settings: Settings, call):
    try:
        return call()
    except Exception as error:  # huggingface_hub's errors hold addresses and headers; their kind is enough
        raise DreamBoothError(
            f"The Hub did not take {repository(settings)} ({type(error).__name__}): log in with `hf auth login` with a "
            "token that may write, or leave out --push_to_hub."
        ) from error


def card(settings: Settings, name: str, images: list[Image.Image]) -> str:
    """The model card: what it was taught, from what, and how to load it."""
    from huggingface_hub import ModelCard, ModelCardData

    full = settings.full_finetuning
    data = ModelCardData(
        base_model=settings.pretrained_model_name_or_path,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        instance_prompt=settings.instance_prompt,
        tags=["stable-diffusion-3", "dreambooth", *([] if full else ["lora"])],
    )
    base = name if full else settings.pretrained_model_name_or_path
    how = f'pipe = StableDiffusion3Pipeline.from_pretrained("{base}")'
    how += "" if full else f'\npipe.load_lora_weights("{name}")'
    shown = "\n".join(f"![{settings.validation_prompt}](validation/{p})" for p in _names(settings)) if images else ""
    text = f"""---
{data.to_yaml()}
---
# {name}: {settings.instance_prompt}

DreamBooth {"in full" if full else f"LoRA of rank {settings.rank}"} on {settings.pretrained_model_name_or_path}, trained
with `sd3kit.dreambooth`. The prompt that names the subject: `{settings.instance_prompt}`.

```python
{how}
```

{shown}
"""
    return str(ModelCard(text))


def _names(settings: Settings) -> list[str]:
    """The pictures of the last validation."""
    names = sorted(p.name for p in (Path(settings.output_dir) / "validation").glob("step-*.png"))
    return names[-settings.num_validation_images :]
