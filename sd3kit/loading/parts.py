"""A pipeline's parts from a folder: each is looked at before it is loaded, and what the libraries report is an error.

diffusers and transformers load a part whose weights are missing, draw random ones in their place and only report it.
Here a missing, foreign, mis-shaped or infinite weight is an error that names the part and the tensor.
"""

import contextlib
import importlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .names import LoadError

# The libraries whose classes are loaded here, and how their weights are called; others are left to the pipeline.
LIBRARIES = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
# What holds a tokenizer's words: transformers reads any of these.
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))


class Damaged(LoadError):
    """A file of the folder is missing or damaged; `path` is which."""

    def __init__(self, path: Path, what: str):
        super().__init__(what)
        self.path, self.what = path, what


def read_json(path: Path) -> dict:
    """A JSON file that holds an object.

    Raises:
        Damaged: it is missing, a link to nothing, a pointer of Git LFS, or no JSON object.
    """
    data = _read(path)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(path, "is damaged: it is not JSON") from error
    if not isinstance(found, dict):
        raise Damaged(path, f"is damaged: it holds a {type(found).__name__} in place of settings")
    return found


def _read(path: Path, most: int = -1) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(most)
    except FileNotFoundError as error:
        there = f"is a link to {path.readlink()}, which is not there" if path.is_symlink() else "is missing"
        raise Damaged(path, there) from error
    except OSError as error:
        raise Damaged(path, f"cannot be read ({error.strerror})") from error
    if data.startswith(b"version https://git-lfs"):
        raise Damaged(path, "is only a pointer of Git LFS (`git lfs pull` brings the file)")
    return data


def index(folder: Path) -> dict[str, tuple[str, str]]:
    """The parts that a pipeline's model_index.json lists, each with its library and class.

    Raises:
        Damaged: it cannot be read, or it is no index of an SD3 pipeline.
    """
    path = folder / "model_index.json"
    found = read_json(path)
    cls = found.get("_class_name")
    if not isinstance(cls, str) or not cls.startswith("StableDiffusion3"):
        raise Damaged(path, f"describes a {cls}, not a StableDiffusion3Pipeline")
    parts = {name: value for name, value in found.items() if not name.startswith("_") and isinstance(value, list)}
    for name in ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        if name not in parts:
            raise Damaged(path, f"is damaged: it does not list the {name}")
    for name, value in parts.items():
        if len(value) != 2 or not all(isinstance(word, str | None) for word in value):
            raise Damaged(path, f"is damaged: it lists no library and class for the {name}")
    return {name: tuple(value) for name, value in parts.items() if all(value)}


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The safetensors that a part is loaded from: one file, or the shards that its index lists.

    Raises:
        Damaged: there are none, or one is missing, cut or no safetensors. A pickle does not count.
    """
    middle = f".{variant}" if variant else ""
    one, many = (folder / f"{stem}{middle}.safetensors{end}" for end in ("", ".index.json"))
    files = [one]
    if not os.path.lexists(one):
        if not os.path.lexists(many):
            others = sorted(f.name.split(".")[1].partition("-")[0] for f in folder.glob(f"{stem}.*.safetensors*"))
            if others and not variant:
                raise Damaged(folder, f'holds weights of another variant only: give variant="{others[0]}"')
            raise Damaged(one, "is missing")
        shards = read_json(many).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise Damaged(many, "is damaged: it lists no files")
        files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        with _opened(file):
            pass
    return files


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, whose header is read and compared with its length.

    Raises:
        Damaged: it is missing, cut or no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    _read(file, 64)
    try:
        tensors = safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise Damaged(file, f"is damaged ({str(error).splitlines()[0]})") from error
    with tensors:
        yield tensors


def variant_of(folder: Path, name: str, variant: str | None) -> str | None:
    """The variant that a part has: the one that is asked for, or none, as diffusers falls back."""
    return variant if variant and any((folder / name).glob(f"*.{variant}*.safetensors*")) else None


def examine(folder: Path, skip: set[str], variant: str | None) -> dict[str, tuple[str, str]]:
    """Look at the files of every part before anything is loaded, which takes milliseconds.

    Args:
        skip: parts that were given, so their files are not needed.

    Returns:
        The parts to load, as `index` gives them.

    Raises:
        Damaged: a file of them is missing or damaged, or no part has the variant.
    """
    found = {name: value for name, value in index(folder).items() if name not in skip}
    modules = []
    for name, (library, cls) in found.items():
        own = folder / name
        if library not in LIBRARIES:
            continue
        if not own.is_dir():
            raise Damaged(own, "is missing" if not own.exists() else "is damaged: it is no folder")
        for path in sorted(own.glob("*.json")):
            read_json(path) if path.name != "vocab.json" else _read(path)
        if cls.endswith("Scheduler"):
            read_json(own / "scheduler_config.json")
        elif "Tokenizer" in cls:
            if not any(all((own / file).exists() for file in files) for files in VOCABULARIES):
                raise Damaged(own / "tokenizer.json", "is missing")
        elif not cls.endswith(("Processor", "Extractor", "ProcessorFast")):
            read_json(own / "config.json")
            modules.append(name)
    if variant and modules and not any(variant_of(folder, name, variant) for name in modules):
        raise Damaged(folder, f"holds no weights of the variant {variant!r}: leave variant out")
    for name in modules:
        weight_files(folder / name, LIBRARIES[found[name][0]], variant_of(folder, name, variant))
    return found


def load(folder: Path, found: dict[str, tuple[str, str]], variant: str | None, dtype: torch.dtype) -> dict:
    """Load the parts that `examine` found, each by its own class.

    Raises:
        Damaged: a part cannot be loaded, or not all of its weights are what its class needs.
    """
    from diffusers.utils import logging as notes

    parts: dict[str, Any] = {}
    verbosity = notes.get_verbosity()
    notes.set_verbosity_error()  # what it would report is read below
    try:
        for name, (library, kind) in found.items():
            if library in LIBRARIES:
                parts[name] = _part(folder, name, library, kind, variant, dtype)
    finally:
        notes.set_verbosity(verbosity)
    _words_fit(folder, parts)
    return parts


def _part(folder: Path, name: str, library: str, kind: str, variant: str | None, dtype: torch.dtype) -> Any:
    cls = getattr(importlib.import_module(library), kind, None)
    if cls is None:
        raise Damaged(folder / "model_index.json", f"asks for {kind}, which this {library} does not have")
    try:
        if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
            return cls.from_pretrained(folder, subfolder=name)
        part, report = cls.from_pretrained(
            folder, subfolder=name, use_safetensors=True, output_loading_info=True,
            variant=variant_of(folder, name, variant), dtype=dtype,
        )  # fmt: skip
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        words = (str(error).strip().splitlines() or [""])[0][:200]
        reason = next(
            wrong_weights(folder, name, library, cls, variant), f"cannot be loaded ({type(error).__name__}: {words})"
        )
        raise Damaged(folder / name, reason) from error
    for key, words in (
        ("missing_keys", "lacks the weight"),
        ("mismatched_keys", "has a weight of another shape than its configuration asks for:"),
        ("unexpected_keys", "holds a weight that its configuration does not know:"),
    ):
        if tensors := sorted(k if isinstance(k, str) else k[0] for k in report.get(key) or ()):
            raise Damaged(folder / name, f"{words} {tensors[0]}{_more(tensors)}")
    return part


def _more(tensors: list[str]) -> str:
    return f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""


def wrong_weights(folder: Path, name: str, library: str, cls: type, variant: str | None) -> Iterator[str]:
    """Why a part's weights do not fit its configuration, found on the meta device after a library has refused them."""
    try:
        config = cls.config_class.from_pretrained(folder, subfolder=name) if hasattr(cls, "config_class") else None
        with torch.device("meta"):
            model = cls(config) if config is not None else cls.from_config(cls.load_config(folder, subfolder=name))
        wanted = {key: list(value.shape) for key, value in model.state_dict().items()}
    except Exception:  # the configuration itself is wrong; the library's own words are told then
        return
    there = {}
    for file in weight_files(folder / name, LIBRARIES[library], variant_of(folder, name, variant)):
        with _opened(file) as tensors:
            there |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
    for key in wanted.keys() & there.keys():
        if wanted[key] != there[key]:
            yield f"has the shape {there[key]} in the weight {key}, where its configuration asks for {wanted[key]}"
    if missing := sorted(wanted.keys() - there.keys()):
        yield f"lacks the weight {missing[0]}{_more(missing)}"


def _words_fit(folder: Path, parts: dict) -> None:
    """A tokenizer must read, and know no more words than its encoder: otherwise drawing fails, or reads other words."""
    for number in ("", "_2", "_3"):
        tokenizer, encoder = parts.get(f"tokenizer{number}"), parts.get(f"text_encoder{number}")
        if tokenizer is None:
            continue
        try:
            read = tokenizer("a fox").input_ids
        except Exception as error:
            raise Damaged(folder / f"tokenizer{number}", f"cannot read a prompt ({type(error).__name__})") from error
        if not read or (encoder is not None and len(tokenizer) > encoder.config.vocab_size):
            known = f"; the text encoder knows {encoder.config.vocab_size}" if encoder is not None else ""
            raise Damaged(folder / f"tokenizer{number}", f"is another model's: it has {len(tokenizer)} words{known}")


@torch.no_grad()
def check_finite(folder: Path, parts: dict) -> None:
    """Every weight must be a finite number; one NaN makes the picture black. A gigabyte takes 0.1 s on a CPU.

    Raises:
        Damaged: the first part and tensor that is not.
    """
    for name, module in parts.items():
        if not isinstance(module, torch.nn.Module):
            continue
        groups: dict[tuple, list] = {}
        for key, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            # 8-bit and 4-bit numbers have no arithmetic here, and what is offloaded has no numbers
            if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel() and tensor.device.type != "meta":
                groups.setdefault((tensor.device, tensor.dtype), []).append((key, torch.aminmax(tensor)))
        for own in groups.values():  # NaN goes through both ends; one wait for each group
            ends = torch.stack([end for _, both in own for end in both])
            good = ends.isfinite().reshape(-1, 2).all(1).tolist()
            if bad := sorted(key for (key, _), fine in zip(own, good, strict=True) if not fine):
                raise Damaged(folder / name, f"holds NaN or infinity in the weight {bad[0]}{_more(bad)}")
