"""What a training is fed: pictures with their captions, and for each sample its noise and its noise level.

Everything about sample number n (which picture, crop and flip, which noise, which level) follows from the seed and n
alone. So one process with a batch of four, four processes with one each, and a run that was killed and resumed see the
same samples, and a latent can never meet another picture's caption (diffusers issue 14430).
"""

import csv
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from PIL import Image, ImageOps

from ..loading import hub
from ..pictures import FORMATS, SUFFIXES, flatten, open_picture
from .settings import DreamBoothError, Settings


@dataclasses.dataclass(frozen=True)
class Row:
    """A picture, as a file or opened, and its caption."""

    source: Path | Image.Image
    caption: str

    def open(self, side: int) -> Image.Image:
        """The picture with its shorter edge scaled to `side` pixels."""
        return self.source if isinstance(self.source, Image.Image) else read(self.source, side)


def read(source: str | Path | bytes, side: int, name: str = "") -> Image.Image:
    """A picture as RGB, on white where it is transparent, its shorter edge scaled to `side` pixels; or PictureError."""
    image = flatten(open_picture(source, name))
    scale = side / min(image.size)
    size = max(side, round(image.width * scale)), max(side, round(image.height * scale))
    return image.resize(size, Image.Resampling.BILINEAR)


def picture_files(folder: Path) -> list[Path]:
    """The picture files of a folder, by name; hidden ones are passed over."""
    return sorted(p for p in _visible(folder) if p.suffix.lower() in SUFFIXES and not p.is_dir())


def passed_over(settings: Settings) -> str:
    """A sentence that counts and names what the pictures' folder holds beside pictures and captions, or nothing."""
    if not settings.instance_data_dir:
        return ""
    folder = Path(settings.instance_data_dir)
    names = [f"{p.name}/" if p.is_dir() else p.name for p in sorted(_visible(folder))]
    names = [name for name in names if not name.lower().endswith((*SUFFIXES, ".txt", ".jsonl", ".csv"))]
    said = ", ".join([*names[:8], *["..."] * (len(names) > 8)])
    used = f"Used are the folder's own files {', '.join(SUFFIXES)}."
    return f"Passed over in {folder}: {len(names)} ({said}). {used}" if names else ""


def _visible(folder: Path) -> list[Path]:
    try:
        return [p for p in folder.iterdir() if not p.name.startswith(".")]
    except OSError as error:
        raise DreamBoothError(
            f"The folder {folder} cannot be read ({error.strerror}): change its permissions."
        ) from error


def instance_rows(settings: Settings) -> list[Row]:
    """The pictures of the subject, opened and scaled, each with its caption; `repeats` times.

    Raises:
        DreamBoothError: an empty folder, an unreadable picture, or captions that do not match the pictures.
    """
    named = settings.instance_data_dir or settings.dataset_name
    folder = Path(named)
    pairs = _folder_pairs(folder, settings) if folder.is_dir() else _dataset_pairs(settings)
    if not pairs:
        raise DreamBoothError(f"{named} holds no picture ({', '.join(FORMATS)}): put the subject's pictures there.")
    rows = [
        Row(Row(source, "").open(settings.resolution), caption or settings.instance_prompt) for source, caption in pairs
    ]
    return [row for row in rows for _ in range(settings.repeats)]


def _folder_pairs(folder: Path, settings: Settings) -> list[tuple[Path, str]]:
    files = picture_files(folder)
    if settings.caption_column:
        captions = _table(folder, settings.caption_column)
        source = "the caption table"
    else:
        texts = [p for p in _visible(folder) if p.suffix.lower() == ".txt"]
        captions = {}
        for text in texts:
            owner = next((f.name for f in files if f.stem == text.stem), text.name)
            try:
                captions[owner] = text.read_text(encoding="utf-8-sig").strip()
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
            with path.open(encoding="utf-8-sig", newline="") as file:
                lines = (line for line in file if line.strip())
                rows = list(csv.DictReader(lines)) if path.suffix == ".csv" else [json.loads(line) for line in lines]
            captions = {str(row["file_name"]): row[column] for row in rows}
        except KeyError as error:
            raise DreamBoothError(f"{path} has no column {error}: name one of its columns.") from error
        except OSError as error:
            raise DreamBoothError(f"{path} cannot be read: {error.strerror}.") from error
        except (ValueError, TypeError, RecursionError, csv.Error) as error:
            raise DreamBoothError(f"{path} cannot be read: one JSON object a line is wanted ({error}).") from error
        return {name: _caption(caption, f"{name} in {path}") for name, caption in captions.items()}
    raise DreamBoothError(f"--caption_column needs a metadata.jsonl or metadata.csv in {folder}, and there is none.")


def _caption(value: object, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise DreamBoothError(f"The caption of {name} is {str(value)[:40]!r}, not one text: give one text a picture.")
    return (value or "").strip()


def _dataset_pairs(settings: Settings) -> list[tuple[Image.Image, str]]:
    from datasets import Image as Undecoded
    from datasets import load_dataset

    name = settings.dataset_name
    try:
        with hub.guarded():
            loaded = load_dataset(name, settings.dataset_config_name, cache_dir=settings.cache_dir)["train"]
    except Exception as error:
        why = f"The data set {name} cannot be loaded ({type(error).__name__}): check its name and the network."
        raise DreamBoothError(hub.explain(error, f"The data set {name}", f"datasets/{name}") or why) from error
    for column in filter(None, (settings.image_column, settings.caption_column)):
        if column not in loaded.column_names:
            raise DreamBoothError(f"{name} has no column {column}: it has {', '.join(loaded.column_names)}.")
    captions = loaded[settings.caption_column] if settings.caption_column else [""] * len(loaded)
    column = settings.image_column
    try:  # as files, so that a picture is opened here, with the limits of all pictures
        files = list(loaded.cast_column(column, Undecoded(decode=False))[column])
    except Exception as error:
        raise DreamBoothError(
            f"The column {column} of {name} holds no pictures: give another --image_column."
        ) from error
    pairs = []
    for n, (file, caption) in enumerate(zip(files, captions, strict=True)):
        file = file or {}  # an empty row
        source = file.get("bytes") or file.get("path") or b""
        pairs.append((read(source, settings.resolution, f"{n} of {name}"), _caption(caption, f"{n} of {name}")))
    return pairs


def class_rows(settings: Settings) -> list[Row]:
    """The class pictures of prior preservation, `num_class_images` at most; opened once to see that they can be."""
    files = picture_files(Path(settings.class_data_dir))[: settings.num_class_images]
    for file in files:
        read(file, settings.resolution)
    return [Row(file, settings.class_prompt) for file in files]


def generator(seed: int, what: str, n: int) -> torch.Generator:
    """A source of random numbers for one thing of one sample, independent of any other."""
    digest = hashlib.blake2b(f"{seed}/{what}/{n}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def to_pixels(image: Image.Image, settings: Settings, rng: torch.Generator) -> torch.Tensor:
    """A picture of `read` as (3, resolution, resolution) in -1..1: cropped, perhaps mirrored."""
    side, size = settings.resolution, image.size
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

    def fixed(self) -> bool:
        """Whether each epoch shows the same pixels: no picture is cropped or mirrored at random."""
        side = self.settings.resolution
        whole = (row.open(side).size == (side, side) for rows in self.groups for row in rows)
        return not self.settings.random_flip and (self.settings.center_crop or all(whole))

    @torch.no_grad()
    def cache(self, vae) -> None:
        """Encode every row once; what is kept stands at its row's own index."""
        self.cached, once, fixed = [], {}, self.fixed()
        for g, rows in enumerate(self.groups):
            encoded = []
            for i, row in enumerate(rows):
                key = id(row) if fixed else (g, i)  # a picture that counts several times is one row several times
                if key not in once:
                    image = row.open(self.settings.resolution)
                    pixels = to_pixels(image, self.settings, generator(self.seed, f"cached crop {g}", i))
                    found = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
                    once[key] = found.mean[0].cpu(), found.std[0].cpu()
                encoded.append(once[key])
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
                part["pixels"] = to_pixels(rows[i].open(s.resolution), s, generator(self.seed, f"crop {g}", n))
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
