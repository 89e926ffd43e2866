"""What a training is fed: pictures with their captions, and for each sample its noise and its noise level.

Everything about sample number n (which picture, crop and flip, which noise, which level) follows from the seed and n
alone. So one process with a batch of four, four processes with one each, and a run that was killed and resumed see the
same samples, and a latent can never meet another picture's caption (diffusers issue 14430).
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image, ImageOps

from .settings import DreamBoothError, Settings

FORMATS = {"PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "WEBP": (".webp",), "BMP": (".bmp",)}
MOST_PIXELS = 2**26  # a picture of more is refused before it is decoded: 64 megapixels are 200 MB


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture, as a file or opened, and its caption."""

    source: Path | Image.Image
    caption: str

    def open(self) -> Image.Image:
        return self.source if isinstance(self.source, Image.Image) else open_picture(self.source)


def open_picture(source: str | os.PathLike | io.BytesIO, name: str = "") -> Image.Image:
    """A picture file as RGB, turned as its EXIF data say, on white where it is transparent; `name` is for errors.

    Raises:
        DreamBoothError: not a picture of the formats above, damaged, or larger than `MOST_PIXELS`.
    """
    try:
        with Image.open(source, formats=tuple(FORMATS)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Image.DecompressionBombError as error:  # Pillow's own limit comes later, at 179 million
        raise DreamBoothError(
            f"The picture {name or source} has more than {MOST_PIXELS:,} pixels: scale it down."
        ) from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for damaged files
        raise DreamBoothError(
            f"The picture {name or source} cannot be read (damaged, or not {', '.join(FORMATS)}): replace or remove it."
        ) from error


def picture_files(folder: Path) -> list[Path]:
    """The picture files of a folder, by name; hidden ones are passed over."""
    suffixes = tuple(s for group in FORMATS.values() for s in group)
    return sorted(p for p in folder.iterdir() if p.name.lower().endswith(suffixes) and not p.name.startswith("."))


def instance_rows(settings: Settings) -> list[Row]:
    """The pictures of the subject, opened, each with its caption; `repeats` times.

    Raises:
        DreamBoothError: an empty folder, an unreadable picture, or captions that do not match the pictures.
    """
    named = settings.instance_data_dir or settings.dataset_name
    folder = Path(named)
    pairs = _folder_pairs(folder, settings) if folder.is_dir() else _dataset_pairs(settings)
    if not pairs:
        raise DreamBoothError(f"{named} holds no picture ({', '.join(FORMATS)}): put the subject's pictures there.")
    rows = [Row(Row(source, "").open(), caption or settings.instance_prompt) for source, caption in pairs]
    return [row for row in rows for _ in range(settings.repeats)]


def _folder_pairs(folder: Path, settings: Settings) -> list[tuple[Path, str]]:
    files = picture_files(folder)
    if settings.caption_column:
        captions = _table(folder, settings.caption_column)
        source = "the caption table"
    else:
        texts = [p for p in folder.glob("*.txt") if not p.name.startswith(".")]
        captions = {}
        for text in texts:
            owner = next((f.name for f in files if f.stem == text.stem), text.name)
            try:
                captions[owner] = text.read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise DreamBoothError(f"The caption file {text} cannot be read: save it as text in UTF-8.") from error
        source = "a .txt file"
    names = {f.name for f in files}
    if captions and (lone := names ^ captions.keys()):
        name = sorted(lone)[0]
        lacks = f"the picture {name} has no caption" if name in names else f"{name} has no picture"
        raise DreamBoothError(
            f"Captions and pictures in {folder} do not match: {lacks}; each picture needs one in {source}."
        )
    return [(f, captions.get(f.name, "")) for f in files]


def _table(folder: Path, column: str) -> dict[str, str]:
    """Captions by file name from metadata.jsonl or metadata.csv, as `datasets` lays them out."""
    for path in (folder / "metadata.jsonl", folder / "metadata.csv"):
        if not path.exists():
            continue
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
            return {str(row["file_name"]): str(row[column] or "").strip() for row in rows}
        except KeyError as error:
            raise DreamBoothError(f"{path} has no column {error}: name one of its columns.") from error
        except (ValueError, TypeError) as error:
            raise DreamBoothError(f"{path} cannot be read: one JSON object a line is wanted ({error}).") from error
    raise DreamBoothError(f"--caption_column needs a metadata.jsonl or metadata.csv in {folder}, and there is none.")


def _dataset_pairs(settings: Settings) -> list[tuple[Image.Image, str]]:
    from datasets import Image as Undecoded
    from datasets import load_dataset

    name = settings.dataset_name
    try:
        loaded = load_dataset(name, settings.dataset_config_name, cache_dir=settings.cache_dir)["train"]
    except Exception as error:
        raise DreamBoothError(
            f"The data set {name} cannot be loaded ({type(error).__name__}): check its name and the network."
        ) from error
    for column in filter(None, (settings.image_column, settings.caption_column)):
        if column not in loaded.column_names:
            raise DreamBoothError(f"{name} has no column {column}: it has {', '.join(loaded.column_names)}.")
    captions = loaded[settings.caption_column] if settings.caption_column else [""] * len(loaded)
    try:  # as files, so that a picture is opened here, with the limits above
        files = list(loaded.cast_column(settings.image_column, Undecoded(decode=False))[settings.image_column])
    except Exception as error:
        raise DreamBoothError(
            f"The column {settings.image_column} of {name} holds no pictures: give another --image_column."
        ) from error
    pairs = []
    for n, (file, caption) in enumerate(zip(files, captions, strict=True)):
        file = file or {}  # an empty row
        source = io.BytesIO(file["bytes"]) if file.get("bytes") else file.get("path")
        pairs.append((open_picture(source, f"{n} of {name}"), caption or ""))
    return pairs


def class_rows(settings: Settings) -> list[Row]:
    """The class pictures of prior preservation, `num_class_images` at most; opened once to see that they can be."""
    files = picture_files(Path(settings.class_data_dir))[: settings.num_class_images]
    for file in files:
        open_picture(file)
    return [Row(file, settings.class_prompt) for file in files]


def generator(seed: int, what: str, n: int) -> torch.Generator:
    """A source of random numbers for one thing of one sample, independent of any other."""
    digest = hashlib.blake2b(f"{seed}/{what}/{n}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def to_pixels(image: Image.Image, settings: Settings, rng: torch.Generator) -> torch.Tensor:
    """A picture as (3, resolution, resolution) in -1..1: its shorter edge scaled, then cropped, perhaps mirrored."""
    side = settings.resolution
    scale = side / min(image.size)
    size = max(side, round(image.width * scale)), max(side, round(image.height * scale))
    image = image.resize(size, Image.Resampling.BILINEAR)
    room = size[0] - side, size[1] - side
    if settings.center_crop:
        left, top = room[0] // 2, room[1] // 2
    else:
        left, top = (int(torch.randint(r + 1, (), generator=rng)) for r in room)
    image = image.crop((left, top, left + side, top + side))
    if settings.random_flip and torch.rand((), generator=rng) < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Samples(torch.utils.data.Dataset):
    """Sample number n of a training, from 0 without an end; an epoch is `len` of them.

    A sample is a list of one part, or of two with prior preservation (subject, class). A part is a dictionary: `pixels`
    (3, H, W) or, once `cache` has been called, `mean` and `std` (C, h, w) of its latent's distribution; `caption`;
    `draw` and `noise` (C, h, w), both standard normal, for that distribution and for the flow; `u`, where on the
    schedule its noise level lies, in 0..1.
    """

    def __init__(self, groups: Sequence[Sequence[Row]], settings: Settings, seed: int, latent: tuple[int, int, int]):
        self.groups, self.settings, self.seed, self.latent = groups, settings, seed, latent
        self.cached: list[list[tuple[torch.Tensor, torch.Tensor]]] | None = None

    def __len__(self) -> int:
        return max(len(rows) for rows in self.groups)

    @torch.no_grad()
    def cache(self, vae) -> None:
        """Encode every row once; what is kept stands at its row's own index."""
        self.cached = []
        for g, rows in enumerate(self.groups):
            encoded = []
            for i, row in enumerate(rows):
                pixels = to_pixels(row.open(), self.settings, generator(self.seed, f"cached crop {g}", i))
                found = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
                encoded.append((found.mean[0].cpu(), found.std[0].cpu()))
            self.cached.append(encoded)

    def row(self, g: int, n: int) -> int:
        """Which row of group g sample n shows: each epoch takes all of them, in an order of its own."""
        epoch, place = divmod(n, len(self.groups[g]))
        return int(torch.randperm(len(self.groups[g]), generator=generator(self.seed, f"order {g}", epoch))[place])

    def __getitem__(self, n: int) -> list[dict]:
        s, parts = self.settings, []
        for g, rows in enumerate(self.groups):
            i, rng = self.row(g, n), generator(self.seed, f"noise {g}", n)
            part = {"caption": rows[i].caption}
            part["draw"], part["noise"] = torch.randn(2, *self.latent, generator=rng)
            part["u"] = compute_density_for_timestep_sampling(
                s.weighting_scheme, 1, s.logit_mean, s.logit_std, s.mode_scale, generator=rng
            )
            if self.cached is None:
                part["pixels"] = to_pixels(rows[i].open(), s, generator(self.seed, f"crop {g}", n))
            else:
                part["mean"], part["std"] = self.cached[g][i]
            parts.append(part)
        return parts


def collate(samples: list[list[dict]]) -> dict:
    """A batch: all subjects, then all class pictures; tensors stacked, captions in a list."""
    parts = [sample[g] for g in range(len(samples[0])) for sample in samples]
    return {
        key: [p[key] for p in parts] if key == "caption" else torch.stack([p[key] for p in parts]) for key in parts[0]
    }
