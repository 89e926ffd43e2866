"""Trackers and the Hub: what a training shows elsewhere. The token goes to huggingface_hub and nowhere else."""

from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from .. import files
from .settings import DreamBoothError, Settings


def track_images(accelerator: Accelerator, images: list[Image.Image], step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.stack(images)}, step, **more)


def create(settings: Settings) -> str:
    """Make the repository before the training, so that a wrong token costs no hour; its id, or "" where none is wanted.

    Raises:
        DreamBoothError: not logged in, no right to write, or no network.
    """
    if not settings.push_to_hub:
        return ""
    from huggingface_hub import create_repo

    name = settings.hub_model_id or Path(settings.output_dir).resolve().name
    return _try(name, lambda: create_repo(name, token=settings.hub_token, exist_ok=True)).repo_id


def upload(settings: Settings, name: str, images: list[Image.Image]) -> None:
    """Upload the result to the repository of that name, with a model card; checkpoints stay here."""
    from huggingface_hub import upload_folder

    out = Path(settings.output_dir)
    files.write_whole(out / "README.md", card(settings, name, len(images)))
    hidden = ["checkpoint-*", ".*", f"{settings.logging_dir}/*", "settings.json"]
    more = dict(ignore_patterns=hidden, commit_message="Trained with sd3kit.dreambooth")
    _try(name, lambda: upload_folder(repo_id=name, folder_path=out, token=settings.hub_token, **more))


def _try(name: str, call):
    try:
        return call()
    except Exception as error:  # huggingface_hub's errors hold addresses and headers; their kind is enough
        raise DreamBoothError(
            f"The Hub did not take {name} ({type(error).__name__}): log in with `hf auth login` with a token that may "
            "write, or leave out --push_to_hub."
        ) from error


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
