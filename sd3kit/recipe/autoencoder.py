"""The 16-channel autoencoder of nano, trained on a CPU in half an hour.

Three things make it work on so little compute:

1. *PCA first.* For the first part the two halves learn apart: the decoder draws from 16 numbers per 8x8 patch that
   principal component analysis gives, and the encoder learns to predict those numbers. A plain start spends as long
   on a grey plateau, where GroupNorm on few channels throws the colour away.
2. *GroupNorm with 2 groups*, for the same reason.
3. *Noise on the latents* while the decoder learns, so that the small errors that a flow makes
   stay small in the picture (compare arXiv 2507.15856), and a pull towards the PCA code, which keeps latents smooth,
   centred and easy to learn.
"""

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Img2ImgPipeline
from PIL import Image

from . import scenes
from .art import SIZE, Art, draw, place, to_tensor
from .checkpoints import mark, restore_parts, save_parts, whole_files
from .text import Text
from .training import Average, Budget, cosine, fast_dtype, own_random

CHANNELS = 16
NOISE = 0.1  # deviation of the posterior, and the most in training; the latents' own deviation is about 1
CONFIG = dict(
    latent_channels=CHANNELS,
    block_out_channels=(24, 32, 64, 96),
    layers_per_block=1,
    norm_num_groups=2,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    sample_size=SIZE,
    mid_block_add_attention=False,
    use_quant_conv=False,
    use_post_quant_conv=False,
    shift_factor=0.0,  # the PCA code is centred, and the pull towards it keeps the latents so
)


def random_picture(art: Art, rng: random.Random) -> np.ndarray:
    """Anything that nano may have to draw: any icon of the art, anywhere at any size, or a scene of its own kinds."""
    kind = rng.choice(("icon", "icon", "single", "sign", "pair"))
    if kind != "icon":
        return draw(scenes.random_scene(rng, art.subjects, kind), art, rng)
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    canvas[:] = [rng.randrange(256) for _ in range(3)]
    size = rng.uniform(48, 120)
    free = (SIZE - size) / 2
    place(
        canvas, art.pixels[rng.randrange(len(art))], size, 64 + rng.uniform(-free, free), 64 + rng.uniform(-free, free)
    )
    return canvas.clip(0, 255)


def fit_pca(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean (192,) of 8x8 patches and the projection (192, 16) on half-whitened principal components."""
    patches = _patches(pictures).reshape(-1, 192)
    mean = patches.mean(0)
    _, deviation, vectors = torch.linalg.svd(patches[:: max(1, len(patches) // 60_000)] - mean, full_matrices=False)
    deviation = deviation[:CHANNELS] / deviation[:CHANNELS].mean()
    scale = (patches - mean).matmul(vectors[:CHANNELS].T).std()
    return mean, vectors[:CHANNELS].T / deviation.sqrt() / scale


def _patches(pictures: torch.Tensor) -> torch.Tensor:
    n, c, h, w = pictures.shape
    return pictures.reshape(n, c, h // 8, 8, w // 8, 8).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 8, w // 8, c * 64)


def psnr(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture (N, 3, H, W) in -1..1, encoded to the mode and decoded."""
    error = pictures - copied(vae, pictures).clamp(-1, 1)
    return 10 * torch.log10(4 / error.square().mean((1, 2, 3)))


@torch.no_grad()
def copied(vae: AutoencoderKL, pictures: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """The pictures (N, 3, H, W) encoded to the mode and decoded, so many at a time; they stay on their device."""
    parts = (part.to(vae.device) for part in pictures.split(batch))
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.to(pictures.device) for part in parts])


class Pictures(torch.utils.data.IterableDataset):
    """Random pictures without end, eight at a time, as uint8 (8, 3, 128, 128)."""

    def __init__(self, art: Art, seed: int):
        self.art, self.seed = art, seed

    def __iter__(self) -> Iterator[torch.Tensor]:
        rng = own_random(self.seed)
        while True:
            pictures = np.stack([random_picture(self.art, rng) for _ in range(8)])
            yield torch.from_numpy(pictures.round().astype(np.uint8)).permute(0, 3, 1, 2)


class Crops:
    """Batches of crops of 128 px pictures. Those of 64 px cost the same per pixel as whole ones and give more steps."""

    def __init__(self, art: Art, device: str, seed: int, side: int = 64):
        on_gpu = device != "cpu"
        workers = max(1, (os.cpu_count() or 1) - 2) if on_gpu else 0
        loader = torch.utils.data.DataLoader(
            Pictures(art, seed), batch_size=None, num_workers=workers, pin_memory=device.startswith("cuda")
        )
        self.drawn, self.device, self.count, self.side = iter(loader), device, 0, side
        first = torch.cat([next(self.drawn) for _ in range(512 if on_gpu else 64)])
        self.pool = first.to(device)

    def __call__(self, batch: int) -> torch.Tensor:
        """So many crops (N, 3, side, side) in -1..1; eight new pictures have taken the places of the oldest."""
        at = self.count % len(self.pool)
        self.pool[at : at + 8] = next(self.drawn).to(self.device, non_blocking=True)
        self.count += 8
        which, y, x = (
            torch.randint(below, (batch, 1, 1), device=self.device)
            for below in (len(self.pool), *[SIZE - self.side + 1] * 2)
        )
        along = torch.arange(self.side, device=self.device)
        crops = self.pool[which, :, y + along[:, None], x + along].permute(0, 3, 1, 2).float() / 127.5 - 1
        crops = torch.where(torch.rand(batch, 1, 1, 1, device=self.device) < 0.3, crops.flip(-1), crops)
        return crops.contiguous(memory_format=torch.channels_last)


def picture_loss(copy: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
    """L1 and L2, and L1 of the differences of neighbours, which keeps edges sharp."""
    error = copy.float() - picture
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


def noise(latents: torch.Tensor) -> torch.Tensor:
    """Gaussian noise for the latents (N, 16, h, w), of a deviation from 0 to `NOISE` for each picture."""
    return NOISE * torch.rand_like(latents[:, :1, :1, :1]) * torch.randn_like(latents)


def train(
    art: Art,
    out: Path,
    minutes: float,
    *,
    device: str = "cpu",
    rate: float = 2e-3,
    batch: int | None = None,
    apart: float = 0.15,
) -> AutoencoderKL:
    """Train for `minutes` and save to `out`/vae with the measured scaling factor; continues an interrupted run."""
    rng, dtype = random.Random(0), fast_dtype(device)
    batch = batch or (16 if device == "cpu" else 128)
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average, budget = Average(list(vae.parameters()), 0.998), Budget(minutes, "autoencoder")
    kept = {"model": vae, "optimizer": optimizer, "average": average, "budget": budget}
    checkpoint = out / "vae.pt"
    mean, projection = fit_pca(to_tensor([random_picture(art, rng) for _ in range(512)]))
    if state := restore_parts(kept, checkpoint):
        mean, projection = state["pca"]
        torch.manual_seed(budget.steps)
    crops = Crops(art, device, budget.steps)
    mean, projection = mean.to(device), projection.to(device)
    fresh = to_tensor([random_picture(art, rng) for _ in range(48)]).to(device)

    for done in budget:
        warm = min(1.0, (budget.steps + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * cosine(done, 0.2, 0.01)
        x = crops(batch)
        with torch.no_grad():
            code = ((_patches(x) - mean) @ projection).permute(0, 3, 1, 2)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            latent = vae.encode(x).latent_dist
            z = code if done < apart else latent.mean
            y = vae.decode(z + noise(z)).sample
        loss = picture_loss(y, x)
        loss = loss + 1e-3 * (latent.logvar.float() - 2 * math.log(NOISE)).square().mean()
        loss = loss + (1.0 if done < apart else 0.01) * (latent.mean.float() - code).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        if budget.steps % 100 == 99:
            average.swap()
            budget.notes = {"loss": f"{loss.item():.4f}", "psnr": f"{psnr(vae, fresh).mean().item():.2f} dB"}
            average.swap()
            save_parts(kept, checkpoint, pca=(mean.cpu(), projection.cpu()))
    save_parts(kept, checkpoint, pca=(mean.cpu(), projection.cpu()))
    average.swap()
    return finish(vae.to("cpu", memory_format=torch.contiguous_format), art, out)


@torch.no_grad()
def redrawn(pipe, subjects: int, art: Art, rng: random.Random, count: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """So many scenes of the first so many subjects, which the pipeline knows, and what it makes of them: the pictures
    (N, 3, 128, 128) in -1..1, and the latents (N, 16, 16, 16) as the decoder takes them.

    Image to image at a strength from 0.15 to 0.6 leaves nearly everything in its place and adds the errors that the
    flow makes, at guidance scales from 1.5 to 8.
    """
    again = StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    kinds = rng.choices(("single", "sign", "pair", "count", "split"), (5, 2, 1, 1, 1), k=count)
    asked = [scenes.random_scene(rng, scenes.SUBJECTS[:subjects], kind) for kind in kinds]
    pictures = [draw(scene, art, rng).round() for scene in asked]
    made = again(
        [scenes.caption(scene) for scene in asked],
        image=[Image.fromarray(picture.astype(np.uint8)) for picture in pictures],
        strength=rng.uniform(0.15, 0.6),
        guidance_scale=rng.uniform(1.5, 8),
        num_inference_steps=20,
        max_sequence_length=40,
        output_type="latent",
    )
    return to_tensor(pictures).to(pipe.device), made.images / pipe.vae.config.scaling_factor


def polish(
    pipe, subjects: int, art: Art, work: Path, minutes: float, *, rate: float = 5e-4, batch: int = 8, every: int = 8
) -> AutoencoderKL:
    """Let the decoder of a pipeline learn to bear the errors that its flow makes, in place. The latents stay as they
    are, and with them all that a flow learnt. Goes on from `work`/decoder.pt. UserError: that began from other parts.

    Every second batch is of what the pipeline has `redrawn`, some more at every so many steps. Pictures are whole, as
    in use: GroupNorm sees all of them, and learning on from crops cost 0.3 dB.
    """
    vae, device = pipe.vae.to(memory_format=torch.channels_last).requires_grad_(False), pipe.device.type
    vae.decoder.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average, budget = Average(list(vae.decoder.parameters()), 0.998), Budget(minutes, "decoder")
    kept = {"decoder": vae.decoder, "optimizer": optimizer, "average": average, "budget": budget}
    stay = {"encoder": vae.encoder, "transformer": pipe.transformer, "text encoders": Text.of(pipe)}
    began = {name: mark(part.parameters()) for name, part in (stay | {"decoder": vae.decoder}).items()}
    checkpoint = work / "decoder.pt"
    restore_parts(kept, checkpoint, began)
    rng, dtype = random.Random(budget.steps), fast_dtype(device)
    torch.manual_seed(budget.steps)
    whole, known = Crops(art, str(pipe.device), budget.steps, side=SIZE), []
    for done in budget:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (budget.steps + 1) / 100) * cosine(done, 0.1, 0.01)
        if budget.steps % every == 0 or not known:
            save_parts(kept, checkpoint, began=began)
            known += zip(*redrawn(pipe, subjects, art, rng), strict=True)
            del known[:-4096]  # of the oldest; a GPU would draw tens of gigabytes in an hour
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            if budget.steps % 2:
                x, z = map(torch.stack, zip(*rng.choices(known, k=batch), strict=True))
            else:
                x = whole(batch)
                z = vae.encode(x).latent_dist.mean
                z = z + noise(z)
            y = vae.decode(z).sample
        loss = picture_loss(y, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update()
        budget.notes = {"loss": f"{loss.item():.4f}"}
    save_parts(kept, checkpoint, began=began)
    average.swap()
    return vae.to("cpu", memory_format=torch.contiguous_format).requires_grad_(False)


@torch.no_grad()
def finish(vae: AutoencoderKL, art: Art, out: Path, count: int = 256) -> AutoencoderKL:
    """Measure the scaling factor on so many pictures of all kinds, and save."""
    rng = random.Random(1)
    pictures = to_tensor([random_picture(art, rng) for _ in range(count)])
    latents = torch.cat([vae.encode(x).latent_dist.mode() for x in pictures.split(32)])
    print(f"latents: mean {latents.mean():.3f}, deviation {latents.std():.3f}; {psnr(vae, pictures).mean():.2f} dB")
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    with whole_files(out) as part:
        vae.save_pretrained(part / "vae")
    return vae
