"""A pipeline's parts from a folder, each of them whole.

diffusers and transformers load a part whose weights are missing, draw random ones in their place and only report it.
Here what they report is an error that names the part and the tensor; where they fail, the part's files are looked at,
so that the error names the file. A tokenizer must fit its encoder, and each weight must be a number.
"""

import importlib
import itertools
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from .device import is_out_of_memory
from .names import LoadError

LIBRARIES = ("diffusers", "transformers")  # whose classes are loaded here; others are left to the pipeline
NEEDED = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
# What the libraries report of a part's weights, and how that is said.
REPORTED = {
    "missing_keys": "lacks the weight",
    "mismatched_keys": "has a weight of another shape than its configuration asks for:",
    "unexpected_keys": "holds a weight that its configuration does not know:",
}


class Damaged(LoadError):
    """A file of the folder is missing or damaged: `path` is which, and `what` is wrong with it."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path} {what}")
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
    parts = {name: found.get(name) for name in NEEDED}
    parts |= {name: value for name, value in found.items() if not name.startswith("_") and isinstance(value, list)}
    for name, value in parts.items():
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(word, str | None) for word in value):
            raise Damaged(path, f"is damaged: it lists no library and class for the {name}")
    return {name: tuple(value) for name, value in parts.items() if all(value)}


def load(folder: Path, given: Collection[str], variant: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Load a pipeline's parts but those that are given, each by its own class.

    Raises:
        Damaged: a file is missing or damaged, a part cannot be loaded, or its weights are not what its class needs.
    """
    if variant and not any(folder.glob(f"*/*.{variant}*.safetensors*")):
        raise Damaged(folder, f"holds no weights of the variant {variant!r}: leave variant out")
    parts: dict[str, Any] = {}
    for name, (library, kind) in index(folder).items():
        if name in given or library not in LIBRARIES:
            continue
        cls = getattr(importlib.import_module(library), kind, None)
        if cls is None:
            raise Damaged(folder / "model_index.json", f"asks for {kind}, which this {library} does not have")
        try:
            parts[name] = _part(folder, name, cls, variant, dtype)
        except Damaged:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            look(folder / name)
            files = (folder / name).glob("*.safetensors")
            kinds = [re.search(r"\.(\w+)(-\d+-of-\d+)?\.safetensors$", file.name) for file in files]
            if not variant and kinds and all(kinds):
                only = kinds[0][1]
                raise LoadError(f'{folder} has its weights only as variant="{only}": give load that too.') from error
            words = (str(error).strip().splitlines() or [""])[0][:300]
            raise Damaged(folder / name, f"cannot be loaded ({type(error).__name__}: {words})") from error
    _words_fit(folder, parts)
    return parts


def _part(folder: Path, name: str, cls: type, variant: str | None, dtype: torch.dtype) -> Any:
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        return cls.from_pretrained(folder, subfolder=name)
    read_json(folder / name / "config.json")  # without one transformers takes another model's settings
    own = variant if variant and any((folder / name).glob(f"*.{variant}*.safetensors*")) else None
    part, report = cls.from_pretrained(
        folder, subfolder=name, variant=own, dtype=dtype, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    for key, words in REPORTED.items():
        if tensors := sorted(k if isinstance(k, str) else k[0] for k in report.get(key) or ()):
            more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
            raise Damaged(folder / name, f"{words} {tensors[0]}{more}")
    return part


def look(folder: Path) -> None:
    """Look for what is wrong with the files of a part that could not be loaded.

    Raises:
        Damaged: the folder is missing, or the first file that is cut, no JSON, a link to nothing, or a pointer.
    """
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise Damaged(folder, "is missing" if not folder.exists() else "is damaged: it is no folder")
    for file in sorted(folder.iterdir()):
        if file.suffix == ".json":
            read_json(file)
        elif file.suffix == ".safetensors":
            _read(file, 64)
            try:
                with safe_open(file, "pt"):  # which reads the header and compares it with the file's length
                    pass
            except (SafetensorError, OSError) as error:
                raise Damaged(file, f"is damaged ({str(error).splitlines()[0]})") from error


def _words_fit(folder: Path, parts: dict) -> None:
    """A tokenizer must read, and know no more words than its encoder: otherwise drawing fails, or reads other words."""
    for number in ("", "_2", "_3"):
        name, encoder = f"tokenizer{number}", parts.get(f"text_encoder{number}")
        tokenizer = parts.get(name)
        if tokenizer is None:
            continue
        try:  # where its words are missing, transformers makes one that knows none
            reads = "fox" in tokenizer.decode(tokenizer("a fox").input_ids).replace(" ", "")
        except Exception:
            reads = False
        if not reads:
            look(folder / name)
            raise Damaged(folder / name, "cannot read a prompt: its words, such as tokenizer.json, are missing")
        if encoder is not None and len(tokenizer) > (known := encoder.config.vocab_size):
            words = f"has {len(tokenizer)} words, and the text encoder knows {known}"
            raise Damaged(folder / name, f"is another model's: it {words}")


@torch.no_grad()
def check_finite(folder: Path, parts: dict) -> None:
    """Every weight must be a finite number; one NaN makes the picture black. A gigabyte takes 0.1 s on a CPU.

    Raises:
        Damaged: the first part and tensor that is not.
    """
    for name, module in parts.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for key, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
            # 8-bit and 4-bit numbers have no arithmetic here, and what is offloaded has no numbers
            numbers = tensor.is_floating_point() and tensor.itemsize > 1 and tensor.device.type != "meta"
            if numbers and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():  # both ends show NaN
                raise Damaged(folder / name, f"holds NaN or infinity in the weight {key}")
