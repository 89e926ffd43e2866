"""A whole table of recipes or speed-ups: where it is measured, what is said of it before, and how it is printed."""

import argparse
import contextlib
import shutil
import tempfile
from pathlib import Path

import psutil
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import free_memory

from sd3kit import records
from sd3kit.errors import UserError
from sd3kit.loading import configs
from sd3kit.loading.device import pick_device
from sd3kit.loading.hub import explain
from sd3kit.loading.names import TURBO, LoadError, resolve
from sd3kit.loading.pipeline import load
from sd3kit.measuring import protocol
from sd3kit.measuring.account import GIB
from sd3kit.measuring.report import of_eager

from .bench import Bench, dtype_of


def measured(options: argparse.Namespace, chosen: list[str], out: Path, command: str) -> list[dict]:
    """The rows of the memory or of the speed study, measured here, at each size.

    Raises:
        LoadError, UserError: the model cannot be loaded or does not draw such a size; before anything is measured.
    """
    name, source, device, found = options.model, resolve(options.model), pick_device(), []
    if source == str(TURBO):
        raise UserError("nano-turbo takes nano's memory, and nano's time a step: measure nano, with --steps.")
    own, most = draws(name, source, options.weights)
    sizes = options.size or [own]
    if max(sizes) > most:
        raise UserError(f"--size {max(sizes)} is more than {name} draws: it has places for {most} pixels a side.")
    with contextlib.ExitStack() as stack:
        pipe = None
        if options.weights == "random":
            pipe = built(options, name, device)
            if options.study == "memory":  # recipes load from a folder
                source = stack.enter_context(room(protocol.stored_bytes(*protocol.modules(pipe))))
                pipe.save_pretrained(source)
                pipe = None
                free_memory()
        bench = Bench(options, name, source, device, sizes[0], pipe)
        if options.study == "speed":
            bench.unchanged()
        for bench.size in sizes:
            found += records.study(chosen, bench.row, out, bench.identity(), command)
    return found


def draws(name: str, source: str, weights: str) -> tuple[int, int]:
    """The pixels a side that a model is made for, and the most that it has positions for.

    Raises:
        LoadError: the model cannot be reached, or there are no random weights of it.
    """
    if weights == "random" and name in configs.TRANSFORMER:
        config = configs.TRANSFORMER[name]
    elif weights == "random" and name != "nano":
        raise LoadError(f"random weights are there for nano, {', '.join(configs.TRANSFORMER)} only, not for {name!r}.")
    else:
        try:
            config = SD3Transformer2DModel.load_config(source, subfolder="transformer")
        except Exception as error:
            raise LoadError(explain(error, name, source) or f"{name} cannot be read: {error}") from error
    return 8 * config["sample_size"], 8 * config["patch_size"] * config["pos_embed_max_size"]


def built(options: argparse.Namespace, name: str, device: str):
    """A model of random weights, built on the device itself; where it does not fit there, on the processor."""
    settings = {"dtype": dtype_of(options, name, device), "weights": "random", "quiet": True}
    try:
        return load(name, device=device, **settings)
    except LoadError:
        if device == "cpu" or options.study == "speed":
            raise
    return load(name, device="cpu", **settings)


@contextlib.contextmanager
def room(size: int):
    """A temporary folder for so many bytes: in memory where there is plenty, since a disk is slow to write and read."""
    memory = Path("/dev/shm") if psutil.virtual_memory().available > 3 * size + 16 * GIB else None
    memory = memory if memory and memory.is_dir() and shutil.disk_usage(memory).free > 1.2 * size else None
    with tempfile.TemporaryDirectory(prefix="sd3kit-", dir=memory) as folder:
        if shutil.disk_usage(folder).free < 1.1 * size:
            raise UserError(f"random weights are written first: {1.1 * size / GIB:.0f} GiB are needed in {folder}.")
        yield folder


def failure(record: dict) -> str:
    """Why a row has no figures, or ""."""
    return "out of memory" if "out_of_memory" in record else record.get("raises", "")


TIMES = """Seconds: the median of a picture's, and the range. floor: the least that this machine could take for its
operations. distance: from the default's pictures, of 255 (root mean square; 0 is the same picture)."""
NOTES = {
    "memory": TIMES,
    "speed": f"""{TIMES} of eager's time: against
the unchanged pipeline's right before and right after the row; both together give the range.""",
}


def table(rows: list[dict], study: str) -> str:
    """The records for the terminal, with a note on what the columns are."""
    lines, several = [], len({(r["model"], r["size"]) for r in rows}) > 1
    for r in rows:
        if failure(r):
            figures = failure(r)
        else:
            figures = f"{r['median']:8.3f} s ({r['low']:.3f} to {r['high']:.3f}), floor {r['floor']:.3f} s, "
            figures += f"peak {r['device_peak'] / GIB:.3f} GiB, distance {r['distance']:.1f}"
            figures += f", right {r['right']['share']:.0%}" if "right" in r else ""
            figures += ", {:.2f} ({:.2f} to {:.2f}) of eager's time".format(*of_eager(r)) if "eager" in r else ""
            figures += f", and {r['encoding']:.1f} s before, to encode the prompts" if "encoding" in r else ""
        which = f"{r['model']} {r['size']} px " if several else ""
        lines.append(f"{which}{r['row']:<32} {figures}")
    return "\n".join([*lines, NOTES[study]])
