"""One protocol for time, memory and the floor."""

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterable

import psutil
import torch
import torch.utils.benchmark as benchmark
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter


def modules(pipe) -> list[torch.nn.Module]:
    """The parts of a pipeline that have weights."""
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


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
