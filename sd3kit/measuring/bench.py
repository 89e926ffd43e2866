"""`sd3kit measure`: the records that lessons 04 and 05 show, made again by one command.

sd3kit measure memory --model nano            every recipe of sd3kit.recipes
sd3kit measure speed --model medium --weights random
sd3kit measure bytes                          accounted on the meta device, the same on every machine
"""

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import inspect
import os
import shlex
import shutil
import tempfile
import time
from pathlib import Path

import torch
import torch._inductor.config
from diffusers.training_utils import free_memory

from .. import records
from ..errors import UserError
from ..loading import configs
from ..loading.device import pick_device, pick_dtype
from ..loading.names import NANO, resolve
from ..loading.pipeline import load, undisturbed
from . import protocol
from .account import GIB, peaks
from .recipes import ENCODERS, RECIPES, Recipe
from .speedups import COMPILED, INDUCTOR_FLAGS, SPEEDUPS

# One a call, so that ten calls give the times and the share of right pictures too.
PROMPTS = (
    "a fox on a blue background, flat",
    "a cat on a red background, 3d",
    "a panda on a yellow background, noto",
    "a rocket on a green background, flat",
    "a house on a white background, 3d",
    "a pizza on a purple background, noto",
    "an apple on a pink background, flat",
    "a star on a black background, 3d",
    "a penguin on an orange background, noto",
    "a mushroom on a gray background, flat",
)


def run(options: argparse.Namespace) -> int:
    """Run `sd3kit measure`.

    Raises:
        UserError, LoadError: a wrong argument, or a model that cannot be loaded; one sentence.
    """
    names = {"memory": RECIPES, "bytes": RECIPES, "speed": SPEEDUPS}[options.study]
    chosen = options.rows or list(names)
    for row in chosen:
        if row not in names:
            raise UserError(f"there is no row {row!r} in {options.study}: use some of {', '.join(names)}.")
    if options.steps < 1 or options.calls < 1 or options.warmup < 0:
        raise UserError("--steps and --calls must be 1 or more, --warmup 0 or more.")
    if options.size is not None and (options.size % 16 or options.size < 64):
        raise UserError(f"--size must be divisible by 16 and at least 64, not {options.size}.")
    if options.cap_gb is not None and (not torch.cuda.is_available() or options.cap_gb <= 0):
        raise UserError("--cap-gb needs a CUDA device and a positive size: without one there is nothing to cap.")
    out = options.out or records.RESULTS / f"{options.study}.jsonl"
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent}: make it first, or give another --out.")
    made = account(options, chosen, out) if options.study == "bytes" else measured(options, chosen, out)
    print(table(made, options.study))
    return 0


def command(options: argparse.Namespace) -> str:
    """The command that makes the records again."""
    given = [f"--{name.replace('_', '-')} {shlex.quote(str(getattr(options, name)))}"
             for name in ("model", "weights", "steps", "size", "calls", "warmup", "dtype", "cap_gb")
             if getattr(options, name) is not None]  # fmt: skip
    return " ".join(["sd3kit measure", options.study, *given])


def account(options: argparse.Namespace, chosen: list[str], out: Path) -> list[dict]:
    """Bytes of the real models by recipe, for one picture of 1024 pixels a side."""
    models = [options.model] if options.model else list(configs.TRANSFORMER)
    if models[0] not in configs.TRANSFORMER:
        raise UserError(f"bytes are accounted for {', '.join(configs.TRANSFORMER)}, not for {models[0]!r}.")
    found, size = [], options.size or 1024
    for model in models:
        rows = {row: lambda row=row, model=model: peaks(model, row, size) for row in chosen}
        identity = {"study": "bytes", "model": model, "size": size, "dtype": "float16", "versions": versions()}
        found += records.study(rows, out, identity, "sd3kit measure bytes")
    return found


def measured(options: argparse.Namespace, chosen: list[str], out: Path) -> list[dict]:
    """The rows of the memory or of the speed study, measured here."""
    name = options.model = options.model or os.environ.get("SD3KIT_MODEL") or "nano"
    device = pick_device()
    with tempfile.TemporaryDirectory(prefix="sd3kit-") as folder:
        source = resolve(name)
        if options.weights == "random":
            if not Path(source).is_dir() and shutil.disk_usage(folder).free < 20 * GIB:
                raise UserError("random weights are written to disk first: 20 GiB are needed in the temporary folder.")
            dtype = _dtype(options, name, device)
            load(name, device="cpu", dtype=dtype, weights="random", quiet=True).save_pretrained(folder)
            gc.collect()
            source = folder
        bench = Bench(options, name, source, device)
        rows = {row: lambda row=row: bench.row(row) for row in chosen}
        return records.study(rows, out, bench.identity(), command(options))


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "diffusers", "transformers", "bitsandbytes", "torchao"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _dtype(options: argparse.Namespace, name: str, device: str) -> torch.dtype:
    return getattr(torch, options.dtype) if options.dtype else pick_dtype(name, device)[0]


class Bench:
    """One model on one machine; `row` measures a recipe or a speed-up by the same protocol."""

    def __init__(self, options: argparse.Namespace, name: str, source: str, device: str):
        self.options, self.name, self.source, self.device = options, name, source, device
        self.dtype = _dtype(options, name, device)
        self.prompts = PROMPTS[: options.calls]
        self._reference: tuple[list, dict] | None = None
        self._encoders = 0  # bytes of the text encoders

    def identity(self) -> dict:
        """What two records must share to be the same measurement."""
        machine = torch.cuda.get_device_name() if self.device == "cuda" else records.processor()
        weights = self.options.weights
        if self.name == "nano" and weights == "trained":
            digest = hashlib.sha256()
            for file in sorted(NANO.rglob("*.safetensors")):
                digest.update(file.read_bytes())
            weights = digest.hexdigest()[:16]
        return {
            "study": self.options.study,
            "model": self.name,
            "weights": weights,
            "dtype": str(self.dtype).removeprefix("torch."),
            "size": self.size(),
            "steps": self.options.steps,
            "calls": self.options.calls,
            "cap_gb": self.options.cap_gb,
            "device": self.device,
            "machine": machine,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def size(self) -> int:
        return self.options.size or (128 if self.name == "nano" else 1024)

    def draw(self, pipe, i: int, inputs: dict | None = None, **extra):
        """Picture i: prompt i, seed i."""
        prompt = self.prompts[i % len(self.prompts)]
        settings = {
            "generator": torch.Generator().manual_seed(i),
            "num_inference_steps": self.options.steps,
            "height": self.size(),
            "width": self.size(),
            "guidance_scale": 7.0,
        }
        return pipe(**(inputs[prompt] if inputs else {"prompt": prompt}), **settings | extra).images[0]

    def make(self, recipe: Recipe):
        """The pipeline of a recipe, and the inputs by prompt where the recipe computed them."""
        with undisturbed(local=Path(self.source).is_dir()):
            takes_prompts = "prompts" in inspect.signature(recipe.build).parameters
            extra = {"prompts": self.prompts} if takes_prompts else {}
            made = recipe.build(self.source, self.dtype, self.device, **extra)
        pipe, inputs = made if isinstance(made, tuple) else (made, None)
        pipe.set_progress_bar_config(disable=True)
        return pipe, inputs

    def reference(self) -> tuple[list, dict]:
        """The default's pictures, and what one picture must cost; made once, without the cap."""
        if self._reference is None:
            self._cap(None)
            # where the default does not fit, offloading draws the same pictures
            for recipe in ("default", "model_offload", "sequential_offload"):
                with contextlib.suppress(torch.OutOfMemoryError):
                    self._reference = self._drawn(recipe)
                    break
                gc.collect()
            if self._reference is None:
                raise UserError(f"{self.name} does not fit on this GPU even with every layer offloaded.")
            protocol.machine(self.device, self.dtype)
            self._cap(self.options.cap_gb)
        return self._reference

    def _drawn(self, recipe: str) -> tuple[list, dict]:
        pipe, _ = self.make(RECIPES[recipe])
        self._encoders = protocol.stored_bytes(*(getattr(pipe, part) for part in ENCODERS))
        pictures = [self.draw(pipe, i) for i in range(self.options.calls)]
        return pictures, protocol.count(lambda: self.draw(pipe, 0), _modules(pipe), self.device)

    def _cap(self, gib: float | None) -> None:
        if self.options.cap_gb is not None:
            total = torch.cuda.get_device_properties(0).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else min(1.0, gib / total))

    def row(self, name: str) -> dict:
        """Time, peak memory, floor and quality of one recipe or speed-up.

        A machine that others share drifts, within minutes and by more than some speed-ups are worth. So each of them
        has the unchanged pipeline measured beside it: `eager` holds its seconds right before and right after.
        """
        if self.options.study != "speed":
            return self._row(name)
        self.reference()  # sets the cap
        eager, figures = [self._eager()], self._row(name)
        with contextlib.suppress(torch.OutOfMemoryError):  # what the row found is kept
            eager.append(self._eager())
        return figures | {"eager": eager}

    def _eager(self) -> float:
        torch._dynamo.reset()
        free_memory()
        pipe, _ = self.make(RECIPES["default"])
        return protocol.timed(lambda i: self.draw(pipe, i), n=min(5, self.options.calls), warmup=1)["median"]

    def _row(self, name: str) -> dict:
        reference, counted = self.reference()
        free_memory()
        speed = self.options.study == "speed"
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        pipe, inputs = self.make(RECIPES["default"] if speed else RECIPES[name])
        making = time.perf_counter() - start
        # a recipe that encodes the prompts first may have its peak there
        building = self._encoders if inputs else 0
        if self.device == "cuda":
            building = torch.cuda.max_memory_allocated()
        precision, inductor = torch.get_float32_matmul_precision(), torch._inductor.config
        try:
            # what a speed-up sets for the whole process is put back after its row
            flags = {flag: getattr(inductor, flag) for flag in INDUCTOR_FLAGS}
            with inductor.patch(flags | {"force_disable_caches": True}):  # a first call is not one from the disk
                extra = SPEEDUPS[name](pipe) if speed else {}
                less = name not in COMPILED if speed else bool(inputs or RECIPES[name].without)
                if less:  # what does less work has a floor of its own
                    counted = protocol.count(lambda: self.draw(pipe, 0, inputs, **extra), _modules(pipe), self.device)
                figures = self._figures(pipe, inputs, extra, reference, counted)
                apart = {"encoding": making} if inputs else {}  # of all prompts, with loading, outside the calls
                return figures | {"device_peak": max(figures["device_peak"], building)} | apart
        finally:
            torch.set_float32_matmul_precision(precision)

    def _figures(self, pipe, inputs, extra: dict, reference: list, counted: dict) -> dict:
        calls, pictures = self.options.calls, {}

        def call(i: int) -> None:
            pictures[i] = self.draw(pipe, i, inputs, **extra)

        times = protocol.timed(call, n=calls, warmup=self.options.warmup)
        memory = protocol.peak(lambda: call(0), _modules(pipe), self.device)
        memory.pop("result")
        limits = protocol.machine(self.device, pipe.vae.dtype)
        figures = times | memory | {
            "operations": counted["operations"],
            "bytes": counted["bytes"],
            "floor": protocol.floor(counted, limits),
            "stored_bytes": protocol.stored_bytes(*_modules(pipe)),
            "distance": distance([pictures[i] for i in range(calls)], reference[:calls]),
        }  # fmt: skip
        if self.name == "nano":
            figures["right"] = adherence([pictures[i] for i in range(calls)], self.prompts)
        return figures


def _modules(pipe) -> list[torch.nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def distance(pictures: list, reference: list) -> float:
    """The root mean square difference of pictures to their references, in 0..255; the same seeds and prompts."""
    import numpy as np

    pairs = zip(pictures, reference, strict=True)
    squares = [((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2).mean() for a, b in pairs]
    return float(np.sqrt(np.mean(squares)))


def adherence(pictures: list, prompts: tuple[str, ...]) -> dict:
    """The share of nano's pictures with the subject and the background that were asked for."""
    from ..recipe.judge import Judge

    judge, answers = Judge(), []
    for picture, prompt in zip(pictures, prompts, strict=False):
        found = judge.subject(picture)
        words = prompt.split(",")[0].split()
        answers.append(found is not None and found[0] == words[1] and judge.background(picture) == words[4])
    return records.share(answers)


def of_eager(record: dict) -> tuple[float, float, float]:
    """A row's time as a share of eager's beside it: by the mean of both moments, and the range between them."""
    eager = record["eager"]
    return tuple(record["median"] / t for t in (sum(eager) / len(eager), max(eager), min(eager)))


def table(rows: list[dict], study: str) -> str:
    """The records for the terminal."""
    lines = []
    for r in rows:
        if "raises" in r or "out_of_memory" in r:
            figures = "out of memory" if "out_of_memory" in r else r["raises"]
        elif study == "bytes":
            figures = f"GPU {r['device'] / GIB:6.2f} GiB   RAM {r['host'] / GIB:6.2f} GiB   ({r['stage']})"
        else:
            figures = f"{r['median']:8.3f} s ({r['low']:.3f} to {r['high']:.3f}), floor {r['floor']:.3f} s, "
            figures += f"peak {r['device_peak'] / GIB:.3f} GiB, distance {r['distance']:.1f}"
            figures += f", right {r['right']['share']:.0%}" if "right" in r else ""
            figures += ", {:.2f} ({:.2f} to {:.2f}) of eager's time".format(*of_eager(r)) if "eager" in r else ""
            figures += f", and {r['encoding']:.1f} s before, to encode the prompts" if "encoding" in r else ""
        lines.append(f"{r['model'] + ' ' if study == 'bytes' else ''}{r['row']:<26} {figures}")
    return "\n".join(lines)
