"""A recipe or a speed-up of `sd3kit.measuring`, measured by one protocol into a row of the records."""

import argparse
import contextlib
import copy
import gc
import inspect
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch._inductor.config
import torch.utils.benchmark as benchmark
from diffusers.training_utils import free_memory

from sd3kit import records
from sd3kit.errors import UserError
from sd3kit.loading.device import pick_dtype
from sd3kit.loading.pipeline import load, undisturbed
from sd3kit.measuring import protocol
from sd3kit.measuring.account import GIB
from sd3kit.measuring.plan import ENCODERS
from sd3kit.measuring.recipes import RECIPES
from sd3kit.measuring.report import distance
from sd3kit.measuring.speedups import SPEEDUPS
from sd3kit.recipe import digest
from sd3kit.recipe.judge import Judge

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

INDUCTOR_FLAGS = (
    "conv_1x1_as_mm",
    "coordinate_descent_tuning",
    "epilogue_fusion",
    "coordinate_descent_check_all_directions",
)
# The same work in other code: a first call must pay for what these gain. Fewer bits are less work only to kernels.
COMPILED = ("compiled", "compiled_plainly", "compiled_blocks", "cuda_graphs", "fp8_compiled", "int8_compiled", "best",
            "best_fp8")  # fmt: skip
SAME_WORK = (*COMPILED, "eager", "channels_last", "cudnn_attention", "flash_attention", "attention_backend")
WHOLE = ("bfloat16", "fp8_compiled", "best_fp8")  # changes the text encoders too


def timed(call: Callable[[int], object], *, n: int = 10, warmup: int = 3) -> dict:
    """Time `call(i)`: `warmup` calls apart, as they may load or compile, and then n calls; the device is waited for.

    Returns:
        Seconds: `first` (None without warm-up), `median`, `mean` (which the announcement states), `std`, `low`, `high`;
        and `n`, `warmup`. The clock and the statistics are torch.utils.benchmark's.

    Raises:
        ValueError: fewer than one call, or a negative warm-up.
    """
    if n < 1 or warmup < 0:
        raise ValueError(f"Timing needs n >= 1 and warmup >= 0, not n={n} and warmup={warmup}.")

    def once(i: int) -> float:
        start = benchmark.timer()
        call(i)
        return benchmark.timer() - start

    apart = [once(i) for i in range(warmup)]
    times = benchmark.Measurement(1, [once(i) for i in range(n)], benchmark.TaskSpec("call", None))
    return {
        "first": apart[0] if apart else None,
        "median": times.median,
        "mean": times.mean,
        "std": statistics.stdev(times.times) if n > 1 else 0.0,
        "low": min(times.times),
        "high": max(times.times),
        "n": n,
        "warmup": warmup,
    }


def adherence(pictures: list, prompts: tuple[str, ...]) -> dict:
    """The share of nano's pictures with the subject and the background that were asked for."""

    judge, answers = Judge(), []
    for picture, prompt in zip(pictures, prompts, strict=False):
        found = judge.subject(picture)
        words = prompt.split(",")[0].split()
        answers.append(found is not None and found[0] == words[1] and judge.background(picture) == words[4])
    return records.share(answers)


def versions() -> dict[str, str]:
    return records.versions("torch", "diffusers", "transformers", "bitsandbytes", "torchao")


def dtype_of(options: argparse.Namespace, name: str, device: str) -> torch.dtype:
    return getattr(torch, options.dtype) if options.dtype else pick_dtype(name, device)[0]


class Bench:
    """One model on one machine; `row` measures a recipe or a speed-up by the same protocol.

    The speed study loads the model once, or is given it: each of its rows changes a copy of the transformer and of the
    decoder, so the device holds these twice; what is not in use is not counted in the peak.
    """

    def __init__(self, options: argparse.Namespace, name: str, source: str, device: str, size: int, pipe=None):
        self.options, self.name, self.source, self.device, self.size = options, name, source, device, size
        self.on_gpu = device.startswith("cuda")
        if self.on_gpu and torch.device(device).index:
            torch.cuda.set_device(device)  # whose peaks are read
        self.dtype = dtype_of(options, name, device)
        self.prompts = PROMPTS[: options.calls]
        self.pipe = pipe
        self._references: dict[int, tuple[list, dict]] = {}
        self._moment: tuple[int, float] | None = None  # the size, and eager's seconds after the last row
        self._encoders = 0  # bytes of the text encoders

    def identity(self) -> dict:
        """What two records must share to be the same measurement."""
        weights = self.options.weights
        return {
            "study": self.options.study,
            "model": self.name,
            "weights": digest.of(self.source) if weights == "trained" else weights,
            "dtype": str(self.dtype).removeprefix("torch."),
            "size": self.size,
            "steps": self.options.steps,
            "calls": self.options.calls,
            "cap_gb": self.options.cap_gb,
            "device": self.device,
            "machine": torch.cuda.get_device_name() if self.on_gpu else records.processor(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }

    def draw(self, pipe, i: int, inputs: dict | None = None, **extra):
        """Picture i: prompt i, seed i."""
        prompt = self.prompts[i % len(self.prompts)]
        settings = {
            "generator": torch.Generator().manual_seed(i),
            "num_inference_steps": self.options.steps,
            "height": self.size,
            "width": self.size,
            "guidance_scale": 7.0,
        }
        return pipe(**(inputs[prompt] if inputs else {"prompt": prompt}), **settings | extra).images[0]

    def make(self, name: str):
        """The pipeline of a recipe, and the inputs by prompt where the recipe computed them."""
        build = RECIPES[name].build
        extra = {"prompts": self.prompts} if "prompts" in inspect.signature(build).parameters else {}
        with undisturbed(local=Path(self.source).is_dir()):
            made = build(self.source, self.dtype, self.device, **extra)
        pipe, inputs = made if isinstance(made, tuple) else (made, None)
        pipe.set_progress_bar_config(disable=True)
        return pipe, inputs

    def unchanged(self):
        """The speed study's pipeline as it was loaded."""
        if self.pipe is None:
            self.pipe = load(self.source, device=self.device, dtype=self.dtype, quiet=True)
        self.pipe.set_progress_bar_config(disable=True)
        return self.pipe

    def reference(self) -> tuple[list, dict]:
        """The default's pictures, and what one picture must cost; made once a size, without the cap."""
        if self.size not in self._references:
            self._cap(None)
            # where the default does not fit, offloading draws the same pictures
            ways = ("default",) if self.options.study == "speed" else ("default", "model_offload", "sequential_offload")
            for name in ways:
                with contextlib.suppress(torch.OutOfMemoryError):
                    self._references[self.size] = self._drawn(name)
                    break
                gc.collect()
            else:
                raise UserError(f"{self.name} does not fit on this GPU, by {' or '.join(ways)}: use a smaller model.")
            protocol.machine(self.device, self.dtype)
            self._cap(self.options.cap_gb)
        return self._references[self.size]

    def _drawn(self, name: str) -> tuple[list, dict]:
        pipe = self.unchanged() if self.options.study == "speed" else self.make(name)[0]
        self._encoders = protocol.stored_bytes(*(getattr(pipe, part) for part in ENCODERS))
        pictures = [self.draw(pipe, i) for i in range(self.options.calls)]
        return pictures, protocol.count(lambda: self.draw(pipe, 0), protocol.modules(pipe), self.device)

    def _cap(self, gib: float | None) -> None:
        if self.options.cap_gb is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory / GIB
            torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else min(1.0, gib / total), self.device)

    def row(self, name: str) -> dict:
        """Time, peak memory, floor and quality of one recipe or speed-up at `size`.

        A machine that others share drifts, within minutes and by more than some speed-ups are worth. So each of them
        has the unchanged pipeline measured beside it: `eager` holds its seconds right before and right after.
        """
        reference, counted = self.reference()
        if self.options.study == "memory":
            return self._memory(name, reference, counted)
        fresh = self._moment is None or self._moment[0] != self.size
        eager = [self._eager() if fresh else self._moment[1]]
        figures, self._moment = self._speed(name, reference, counted), None
        with contextlib.suppress(torch.OutOfMemoryError):  # what the row found is kept
            self._moment = self.size, self._eager()
            eager.append(self._moment[1])
        return figures | {"eager": eager}

    def _eager(self) -> float:
        torch._dynamo.reset()
        free_memory()
        return timed(lambda i: self.draw(self.unchanged(), i), n=min(3, self.options.calls), warmup=1)["median"]

    def _memory(self, name: str, reference: list, counted: dict) -> dict:
        free_memory()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        pipe, inputs = self.make(name)
        making = time.perf_counter() - start
        loading = torch.cuda.max_memory_allocated() if self.on_gpu else 0
        # a recipe that encodes the prompts first may have its peak there, in another process even
        loading = max(loading, self._encoders if inputs else 0)
        if inputs or RECIPES[name].without:  # what does less work has a floor of its own
            counted = protocol.count(lambda: self.draw(pipe, 0, inputs), protocol.modules(pipe), self.device)
        figures = self._figures(pipe, inputs, {}, reference, counted) | {"loading_peak": loading}
        figures["device_peak"] = max(figures["device_peak"], loading)
        return figures | ({"encoding": making} if inputs else {})  # of all prompts, with loading, outside the calls

    def _speed(self, name: str, reference: list, counted: dict) -> dict:
        base = self.unchanged()
        parts = ("transformer", "vae", *(ENCODERS if name in WHOLE else ()))
        kept = [getattr(base, part) for part in parts]
        idle = protocol.stored_bytes(*kept) if self.on_gpu else 0
        pipe = type(base)(**base.components | {part: copy.deepcopy(getattr(base, part)) for part in parts})
        pipe.set_progress_bar_config(disable=True)
        precision, inductor = torch.get_float32_matmul_precision(), torch._inductor.config
        try:
            # what a speed-up sets for the whole process is put back after its row
            flags = {flag: getattr(inductor, flag) for flag in INDUCTOR_FLAGS}
            with inductor.patch(flags | {"force_disable_caches": True}):  # a first call is not one from the disk
                extra = SPEEDUPS[name](pipe) or {}
                if name not in SAME_WORK:  # what does less work has a floor of its own
                    self.draw(pipe, 0, **extra)  # a cache may learn from a first picture
                    counted = protocol.count(lambda: self.draw(pipe, 0, **extra), protocol.modules(pipe), self.device)
                figures = self._figures(pipe, None, extra, reference, counted)
        finally:
            torch.set_float32_matmul_precision(precision)
        return figures | {"device_peak": figures["device_peak"] - idle}

    def _figures(self, pipe, inputs, extra: dict, reference: list, counted: dict) -> dict:
        calls, pictures = self.options.calls, {}

        def call(i: int) -> None:
            pictures[i] = self.draw(pipe, i, inputs, **extra)

        times = timed(call, n=calls, warmup=self.options.warmup)
        memory = protocol.peak(lambda: call(0), protocol.modules(pipe), self.device)
        memory.pop("result")
        figures = times | memory | {
            "operations": counted["operations"],
            "bytes": counted["bytes"],
            "floor": protocol.floor(counted, protocol.machine(self.device, pipe.vae.dtype)),
            "stored_bytes": protocol.stored_bytes(*protocol.modules(pipe)),
            "distance": distance([pictures[i] for i in range(calls)], reference[:calls]),
        }  # fmt: skip
        if self.name == "nano":
            figures["right"] = adherence([pictures[i] for i in range(calls)], self.prompts)
        return figures
