"""What the trainings of nano share: the device and its precision, a budget in minutes, averages."""

import math
import random
import time
from collections.abc import Callable, Iterator

import torch
from torch import distributed
from tqdm.auto import tqdm

from ..errors import UserError


def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where the machine multiplies matrices in it, float32 elsewhere."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # a CPU without these instructions emulates bfloat16, slower than float32
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 does not tell them
    native = device == "cpu" and capabilities.get("avx512_bf16", False)
    return torch.bfloat16 if native else torch.float32


def own_random(seed: int) -> random.Random:
    """Random numbers of a process that draws: each worker of a `DataLoader` has others."""
    worker = torch.utils.data.get_worker_info()
    return random.Random(f"{seed} {worker.id if worker else 0}")


class Muon(torch.optim.Muon):
    """torch's Muon with `match_rms_adamw`, 4 steps and no decay, for all matrices of one shape together.

    torch 2.13 takes them one by one, so that a GPU waits for the launches, and always in bfloat16, which a CPU without
    such instructions emulates: 7.7 s a step of nano on one, where float32 takes 0.2 s. The state is torch's.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, dtype: torch.dtype):
        super().__init__(matrices, lr=lr, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for shape, matrices in shapes.items():
                gradients = [p.grad for p in matrices]
                momenta = [self.state[p]["momentum_buffer"] for p in matrices]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))  # Nesterov's
                at_once = 1 if ahead.device.type == "cpu" else len(ahead)  # a CPU's cache holds one: a fifth faster
                how = group["ns_coefficients"], group["ns_steps"], group["eps"]
                even = torch.cat([orthogonal(part, *how) for part in ahead.to(self.dtype).split(at_once)])
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_add_(matrices, even.to(ahead.dtype).unbind(), alpha=-rate)


def orthogonal(x: torch.Tensor, factors: tuple[float, float, float], steps: int, eps: float) -> torch.Tensor:
    """Each matrix of a stack (N, m, n) with its singular values near 1, by Newton-Schulz steps as torch's Muon does."""
    a, b, c = factors
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT.contiguous() if tall else x


def process() -> tuple[int, int]:
    """Which of the processes that torchrun or `accelerate launch` started this is, of how many: (0, 1) alone."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def same(value: float) -> float:
    """What the first process says, in all of them: they must end, and slow down, together."""
    nccl = distributed.is_initialized() and distributed.get_backend() == "nccl"  # it moves no tensors of the CPU
    told = torch.tensor(value, dtype=torch.float64, device="cuda" if nccl else "cpu")
    if distributed.is_initialized():
        distributed.broadcast(told, 0)
    return told.item()


def average_gradients(model: torch.nn.Module) -> None:
    """Over all processes, once a step. On a CPU two processes of one thread are up to twice as fast as one of two.

    The threads of one process meet after every operation, and most of nano's operations are short.
    """
    if distributed.is_initialized():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        parts = (flat / distributed.get_world_size()).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


class Replayed:
    """A function on a GPU as CUDA graphs, one for each of its arguments: its kernels are launched together.

    Launching nano's small kernels one by one takes longer than their work. The function must not wait for the GPU, nor
    copy to it. What it returned when it was captured holds what the last call found.
    """

    def __init__(self, function: Callable):
        self.function, self.graphs = function, {}

    def __call__(self, *arguments):
        if arguments not in self.graphs:
            # What is compiled, is compiled for the first arguments alone, which most steps have: each takes a while.
            with torch.compiler.set_stance("force_eager" if self.graphs else "default"):
                self.graphs[arguments] = self.captured(*arguments)
        graph, found = self.graphs[arguments]
        graph.replay()
        return found

    def captured(self, *arguments):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):  # what is made at first use must be there
                self.function(*arguments)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # the pools' threads pin memory meanwhile
            found = self.function(*arguments)
        return graph, found


class Average:
    """An exponential average of parameters: what draws, while the parameters themselves go on learning."""

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float):
        self.decay, self.steps = decay, 0
        self.source = parameters
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.source], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the parameters; twice brings back what was."""
        for value, parameter in zip(self.values, self.source, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)

    def state_dict(self) -> dict:
        return {"steps": self.steps, "values": self.values}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for value, stored in zip(self.values, state["values"], strict=True):
            value.copy_(stored)


class Guard:
    """Goes back to the average, and to half the learning rates, where a loss rises or a gradient is not finite: a
    GPU's minutes are dear. What it goes back to is the average at the last look at a gradient that was finite.

    Each method says whether it went back; the losses that were seen until then are no longer the model's.
    """

    def __init__(self, average: Average, *optimizers: torch.optim.Optimizer):
        self.average, self.optimizers, self.slower, self.best = average, optimizers, 1.0, math.inf
        self.sound: list[torch.Tensor] = []

    def follow(self, norm: torch.Tensor, look: bool = True) -> bool:
        """Told the norm of the gradients after each step; the average follows."""
        self.sound = self.sound or [value.clone() for value in self.average.values]
        self.average.update()
        return look and self.look(norm)

    @torch.no_grad()
    def look(self, norm: torch.Tensor) -> bool:
        """Now and then, since a GPU waits here, and before anything is saved: what is not finite once stays so."""
        sound = math.isfinite(norm.item())
        for value, kept in zip(self.average.values, self.sound, strict=True):
            kept.copy_(value) if sound else value.copy_(kept)
        return not sound and self._back("a gradient was not finite")

    def watch(self, loss: float) -> bool:
        """Told the smoothed loss now and then."""
        if loss < 1.5 * self.best:  # false also where it is not a number
            self.best = min(self.best, loss)
            return False
        return self._back(f"the loss rose to {loss:.3f}")

    @torch.no_grad()
    def _back(self, why: str) -> bool:
        self.slower /= 2
        if self.slower < 0.001:
            raise UserError(f"the training fails at whatever rate ({why}): begin again with another --work.")
        for value, parameter in zip(self.average.values, self.average.source, strict=True):
            parameter.copy_(value)
        for optimizer in self.optimizers:
            optimizer.state.clear()
        print(f"{why}: back to the average, at {self.slower:g} of the rates")
        return True

    def state_dict(self) -> dict:
        return {"slower": self.slower, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.slower, self.best = state["slower"], state["best"]


class Budget:
    """Minutes to spend, whatever the machine does in them; iterating gives the part that is done, from 0 to 1.

    A budget in time and not in steps makes one recipe serve a laptop, a session of a few hours, and a GPU.
    """

    def __init__(self, minutes: float, name: str):
        self.minutes, self.name, self.spent, self.steps = minutes, name, 0.0, 0
        self.notes: dict[str, str] = {}

    def __iter__(self) -> Iterator[float]:
        total = self.minutes * 60
        if self.spent >= total and process()[0] == 0:
            print(f"{self.name}: {self.spent / 60:.3g} minutes are done, of {self.minutes:g}: give more to go on.")
        last = time.monotonic()
        bar = tqdm(
            total=round(total), initial=round(self.spent), unit="s", desc=self.name, mininterval=10,
            disable=process()[0] > 0,
        )  # fmt: skip
        with bar:
            while self.spent < total:
                yield self.spent / total
                now = time.monotonic()
                self.spent, last = same(self.spent + now - last), now
                self.steps += 1
                bar.set_postfix({"step": self.steps} | self.notes, refresh=False)
                bar.update(round(self.spent) - bar.n)

    def state_dict(self) -> dict:
        return {"spent": self.spent, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.spent, self.steps = state["spent"], state["steps"]


def cosine(done: float, start: float, floor: float) -> float:
    """A learning-rate factor: 1 until `start` of the budget is done, then a cosine down to `floor` at the end."""
    after = max(0.0, (done - start) / (1 - start))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, after)))
