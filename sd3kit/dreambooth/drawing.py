"""What a training draws: validation pictures, and the class pictures of prior preservation."""

from io import BytesIO
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm

from .. import files
from . import hub
from .data import picture_files
from .model import encode_clips, load
from .saving import writing
from .settings import Settings


@torch.no_grad()
def draw_validation(settings, accelerator, model, vae, scheduler, prompts, step: int, seed: int) -> list:
    """Draw the validation prompt with the model as it is, into the folder `validation` and the trackers."""
    plain = accelerator.unwrap_model(model)
    device, home, texts = accelerator.device, vae.device, (settings.validation_prompt, "")
    pairs = [prompts[p] for p in texts]
    if plain.text is not None:
        pairs = [encode_clips(plain.text, [p], embeds.to(device)) for p, (embeds, _) in zip(texts, pairs, strict=True)]
    (embeds, pooled), (empty, empty_pooled) = ([t.to(device, torch.float32) for t in pair] for pair in pairs)
    pipe = StableDiffusion3Pipeline(
        transformer=plain.transformer, vae=vae.to(device), scheduler=type(scheduler).from_config(scheduler.config),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    plain.eval()
    with accelerator.autocast():
        images = [
            pipe(
                prompt_embeds=embeds, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
                negative_pooled_prompt_embeds=empty_pooled, height=settings.resolution, width=settings.resolution,
                generator=torch.Generator().manual_seed((seed + i) % 2**63),
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
    hub.track_images(accelerator, images, step)
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
        _draw_class_pictures(settings, accelerator, seed, numbers)
    accelerator.wait_for_everyone()
    free_memory()


def _draw_class_pictures(settings: Settings, accelerator: Accelerator, seed: int, numbers: list[int]) -> None:
    half = torch.float32 if accelerator.device.type == "cpu" else torch.float16
    known = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    pipe = load(settings, accelerator, known.get(settings.prior_generation_precision, half))
    pipe.set_progress_bar_config(disable=True)
    with accelerator.split_between_processes(numbers) as share:
        for start in tqdm(range(0, len(share), settings.sample_batch_size), desc="class pictures", unit="batch"):
            part = share[start : start + settings.sample_batch_size]
            sources = [torch.Generator().manual_seed((seed + n) % 2**63) for n in part]
            images = pipe(
                [settings.class_prompt] * len(part), generator=sources, max_sequence_length=settings.max_sequence_length
            ).images
            for n, image in zip(part, images, strict=True):
                write_picture(Path(settings.class_data_dir) / f"class-{n:05d}.png", image)
