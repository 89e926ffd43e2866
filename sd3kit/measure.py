"""Honest figures: time, memory and the floor by one protocol, intervals, and the stamp that says where from."""

import contextlib
import datetime
import functools
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil
import torch
import torch.utils.benchmark as benchmark
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from tqdm.auto import tqdm

from .loading import MODELS

RESULTS = Path(__file__).parent / "results"  # the records that the lessons draw


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson interval (low, high), in 0..1, of a share that was `right` times in `total`.

    Raises:
        ValueError: no trials, or more right than trials.
    """
    if total <= 0 or not 0 <= right <= total:
        raise ValueError(f"A share needs 0 <= right <= total and total > 0, not {right} of {total}.")
    share, square = right / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(answers: Sequence[bool]) -> dict:
    """A record of a share of right answers: its value, its 95% interval and how many there were."""
    right, total = sum(map(bool, answers)), len(answers)
    low, high = wilson(right, total)
    return {"share": right / total, "low": low, "high": high, "n": total}


def processor() -> str:
    """The name of this machine's processor, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def stamp(command: str) -> dict:
    """Where and how a record was made: machine, versions, date, and the command that makes it again."""
    packages = ("torch", "diffusers", "transformers", "sd3kit")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


# ---- one protocol for time, memory and the floor --------------------------------------------------------------------


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


def stored_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of the weights and buffers of the modules as they are stored, quantised ones with their scales."""

    def size(tensor: torch.Tensor) -> int:
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's quantised tensors are wrappers
            return sum(size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)  # bitsandbytes' 4 bit
        if scales is None:
            scales = getattr(tensor, "SCB", None)  # its 8 bit
        return tensor.untyped_storage().nbytes() + (0 if scales is None else scales.numel() * scales.element_size())

    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    # bitsandbytes moves the scales of its 8 bits from the weight to the layer's state when it first runs
    states = (getattr(layer, "state", None) for module in modules for layer in module.modules())
    scales = {id(s.SCB): s.SCB for s in states if isinstance(getattr(s, "SCB", None), torch.Tensor)}
    return sum(map(size, (tensors | scales).values()))


def peak(call: Callable[[], object], modules: Iterable[torch.nn.Module] = (), device: str = "cpu") -> dict:
    """The peak memory while `call()` runs, in bytes.

    Returns:
        `device_peak`: on CUDA what its allocator held at most; elsewhere the bytes of the modules' weights plus the
        most that torch allocated on top during the call, by torch.profiler. `host_peak`: the largest resident memory
        of this process that was seen, every few milliseconds, with libraries and all. `result`: the call's.
    """
    process, seen, done = psutil.Process(), [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(process.memory_info().rss)
            done.wait(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            result = call()
            torch.cuda.synchronize()
            highest = torch.cuda.max_memory_allocated()
        else:
            weights = stored_bytes(*modules)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
                result = call()
            events = (e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]")
            highest = weights + max(0, *itertools.accumulate(events, initial=0), 0)
    finally:
        done.set()
        watcher.join()
    return {"device_peak": highest, "host_peak": max(seen), "result": result}


def count(call: Callable[[], object], modules: Iterable[torch.nn.Module] = (), device: str = "cpu") -> dict:
    """What `call()` must do whatever the program: `operations` (a multiply-add is two), and `bytes` of weights read.

    Counted by torch.utils.flop_counter; it has no formula for the processor's fused attention (torch 2.13), so
    attention runs as plain matrix products there. Weights count once for each call of the layer that owns them, without
    embedding tables, of which few rows are read.
    """
    read = 0

    def add(module: torch.nn.Module, _) -> None:
        nonlocal read
        read += sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))

    hooks = [
        part.register_forward_pre_hook(add)
        for module in modules
        for part in module.modules()
        if not isinstance(part, torch.nn.Embedding)
    ]
    try:
        plain = contextlib.nullcontext() if device.startswith("cuda") else sdpa_kernel(SDPBackend.MATH)
        with flop_counter.FlopCounterMode(display=False) as counter, plain:
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return {"operations": counter.get_total_flops(), "bytes": read}


@functools.cache
def machine(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict:
    """What this machine reached when asked for nothing else: `rate` (FLOP/s of a square matrix product in that
    precision) and `bandwidth` (bytes/s of a copy, read and written), the best of about a second each.

    A processor without instructions for a precision is slow in it, but may compute in float32 instead: the better of
    both rates counts, or the floor would be none.
    """
    side, length = (8192, 2**28) if device.startswith("cuda") else (1536, 2**26)
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    x = torch.empty(length, device=device, dtype=torch.uint8)
    threads, emulated = torch.get_num_threads(), device == "cpu" and dtype != torch.float32

    def best(statement: str, **names: torch.Tensor) -> float:
        timer = benchmark.Timer(statement, globals=names, num_threads=threads)
        return min(timer.blocked_autorange(min_run_time=0.7).times)

    return {
        "rate": max(2 * side**3 / best("a @ b", a=a, b=b), machine(device)["rate"] if emulated else 0.0),
        "bandwidth": 2 * x.nbytes / best("y.copy_(x)", x=x, y=torch.empty_like(x)),
    }


def floor(counted: dict, limits: dict) -> float:
    """The seconds below which no program gets on that machine: `count`'s operations over `machine`'s rate, or its bytes
    over the bandwidth, whichever is more. The bytes bind only where the weights do not stay in a cache.
    """
    return max(counted["operations"] / limits["rate"], counted["bytes"] / limits["bandwidth"])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's or the system's way to say that the memory is full."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in words or "not enough memory" in words)
    )


def read(path: str | os.PathLike) -> list[dict]:
    """The records of a file of JSON lines; none where there is no file. A last line that was cut short is left out.

    Raises:
        ValueError: a damaged line before the last.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"Line {number} of {path} is damaged: delete it and measure again.") from None
    return records


def stored(study: str, model: str, folder: Path = RESULTS) -> list[dict]:
    """The records of "memory" or "speed" for a model that belong together: the newest run's, on the whole memory.

    Records of other machines, precisions, sizes and versions stay in the file; their times do not compare.
    """
    records = [r for r in read(folder / f"{study}.jsonl") if r["model"] == model and not r["cap_gb"]]
    shared = ("weights", "dtype", "size", "steps", "calls", "device", "machine", "threads", "versions")
    return [r for r in records if all(r[key] == records[-1][key] for key in shared)]


def study(rows: Mapping[str, Callable[[], dict]], path: str | os.PathLike, identity: dict, command: str) -> list[dict]:
    """Measure the rows into a file of JSON lines, one by one; rows that are there for the same identity are left.

    An out-of-memory, or any other error of a row, is that row's result: the run goes on.

    Args:
        rows: what to call for each row; it returns the figures.
        path: the file. It is written after each row, so a run that was cut short resumes.
        identity: what a record must share to count as the same: model, precision, size, steps, machine, versions.
        command: what makes the file again; it goes into the stamp.

    Returns:
        The records of these rows, old and new. A record has `row`, the identity, the stamp, and either the figures, or
        `out_of_memory` or `raises` with the error's own words.
    """
    path, identity = Path(path), json.loads(json.dumps(identity))
    there = read(path)
    records = {r["row"]: r for r in there if r.items() >= identity.items() and r["row"] in rows}
    with tqdm([name for name in rows if name not in records], unit="row") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            try:
                figures = rows[name]()
            except Exception as error:
                kind = "out_of_memory" if is_out_of_memory(error) else "raises"
                words = (str(error).strip().splitlines() or [""])[0]
                figures = {kind: f"{type(error).__name__}: {words}"[:300]}
            records[name] = {"row": name} | figures | identity | {"stamp": stamp(command)}
            # the error's traceback holds the pipeline: only now, outside of the handler, can its memory be freed
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            there = [r for r in there if not (r["row"] == name and r.items() >= identity.items())] + [records[name]]
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(r) + "\n" for r in there), encoding="utf-8")
            os.replace(part, path)
    return [records[name] for name in rows]


# ---- the command's arguments; what it does is in sd3kit.bench, which is slower to import -----------------------------


class StudyError(RuntimeError):
    """A wrong argument; the message is one sentence that says what to do."""


def add_parser(commands) -> None:
    """Add `measure` to the command line's subparsers."""
    parser = commands.add_parser("measure", help="measure memory or speed, and store the records of the lessons")
    parser.add_argument("study", choices=("memory", "speed", "bytes"))
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder or a Hub id (SD3KIT_MODEL, or nano)")
    parser.add_argument("--weights", choices=("trained", "random"), default="trained", help="random needs no download")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these recipes or speed-ups")
    parser.add_argument("--steps", type=int, default=20, help="of one picture (%(default)s)")
    parser.add_argument("--size", type=int, help="pixels of each side (the model's own)")
    parser.add_argument("--calls", type=int, default=10, help="timed calls (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="calls before them (%(default)s)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="(what suits the model)")
    parser.add_argument("--cap-gb", type=float, help="let the process have only so many GiB of a CUDA device")
    parser.add_argument("--out", type=Path, help="the file of records (the package's own); run again to resume")
