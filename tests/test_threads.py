"""Threads that wait must sleep: a drawing beside other work is a little slower, not forty times."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch

import sd3kit
from sd3kit.loading import device

pytestmark = pytest.mark.xdist_group("threads")  # in one test process, so that the drawing is made once

# Two threads of torch that never rest, and that themselves sleep while they wait: the worst neighbour that was found.
BUSY = """
import torch
a = torch.randn(700, 700)
print("started", flush=True)
while True:
    a @ a
"""
DRAW = f"""
import json, os, statistics, subprocess, sys, time
import sd3kit
from sd3kit import explore

pipe = sd3kit.load("nano", quiet=True)
compiler = "torch._inductor.compile_fx" in sys.modules


def seconds():
    start = time.perf_counter()
    explore.text_to_image(pipe, "a fox on a blue background", steps=6)
    return time.perf_counter() - start


seconds()
alone = statistics.median(seconds() for _ in range(3))
busy = subprocess.Popen(
    [sys.executable, "-c", {BUSY!r}], env=os.environ | {{"OMP_WAIT_POLICY": "PASSIVE"}}, stdout=subprocess.PIPE
)
try:
    busy.stdout.readline()
    beside = statistics.median(seconds() for _ in range(3))
finally:
    busy.kill()
import torch

twice = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item()
compiled = torch._dynamo.utils.counters["frames"]["ok"]
print(json.dumps([alone, beside, compiler, twice * compiled]))
"""


@functools.cache
def drawn() -> tuple[float, float, bool, float]:
    """Of a process that sd3kit prepares: the seconds of a short drawing by two threads, alone and beside two busy ones;
    whether `load` brought torch's compiler; 2 where torch.compile then serves."""
    given = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | {"OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", DRAW], env=given, capture_output=True, text=True, check=True)
    return tuple(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the neighbours were measured on Linux")
def test_a_drawing_beside_busy_threads_takes_less_than_five_times_as_long():
    alone, beside, *_ = drawn()
    assert beside < 5 * alone, (alone, beside)


def test_load_leaves_the_compiler_out_and_in_order():
    assert drawn()[2:] == (False, 2)


def test_a_policy_that_was_set_stays(tmp_path):
    code = "import os, sd3kit; print(os.environ['OMP_WAIT_POLICY'])"
    for given, kept in (("ACTIVE", "ACTIVE"), (None, "PASSIVE")):
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        env |= {"OMP_WAIT_POLICY": given} if given else {}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == kept and run.stderr == ""


def test_who_imports_torch_first_is_told_how():
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    run = subprocess.run(
        [sys.executable, "-c", "import torch, sd3kit"], env=env, capture_output=True, text=True, check=True
    )
    assert run.stderr.count("\n") == 1 and "Import sd3kit before torch" in run.stderr


def test_a_small_model_on_the_cpu_takes_one_thread_unless_somebody_chose(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(device, "THREADS", 4)
        for chosen, small, left in ((4, True, 1), (1, False, 4), (3, True, 3)):
            torch.set_num_threads(chosen)
            device.use_threads(small)
            assert torch.get_num_threads() == left
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        torch.set_num_threads(4)
        sd3kit.load("nano", device="cpu", quiet=True)
        assert torch.get_num_threads() == 4
        monkeypatch.delenv("OMP_NUM_THREADS")
        sd3kit.load("nano", device="cpu", quiet=True)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
