"""What threads that wait cost: nano's pass alone and beside two busy threads, by how torch's threads wait.

python benchmarks/threads.py   five minutes; run nothing else. Each row is a fresh process.
"""

import os
import subprocess
import sys

PASS = """
import os, statistics, subprocess, sys, time
import torch
from diffusers import SD3Transformer2DModel
from sd3kit.loading.names import NANO

torch.set_num_threads(int(sys.argv[1]))
model = SD3Transformer2DModel.from_pretrained(NANO / "transformer", dtype=torch.float32).eval()
given = torch.randn(2, 16, 16, 16), torch.randn(2, 117, 192), torch.randn(2, 160), torch.tensor([500.0, 500.0])

@torch.no_grad()
def milliseconds(calls):
    start = time.perf_counter()
    for _ in range(calls):
        model(*given)
    return (time.perf_counter() - start) / calls * 1e3

milliseconds(10)
alone = statistics.median(milliseconds(20) for _ in range(3))
loop = "import torch; a = torch.randn(700, 700); print(1, flush=True)\\nwhile True: a @ a"
env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | {"OMP_WAIT_POLICY": "PASSIVE"}
busy = subprocess.Popen([sys.executable, "-c", loop], env=env, stdout=subprocess.PIPE)
busy.stdout.readline()
try:
    beside = statistics.median(milliseconds(4) for _ in range(10))
finally:
    busy.kill()
print(f"{alone:.0f} ms alone, {beside:.0f} ms beside")
"""
SPINS = (1_000, 3_000, 10_000, 100_000)
ROWS = (("PASSIVE", None, 1), ("PASSIVE", None, 2), *(("PASSIVE", n, 2) for n in SPINS), ("ACTIVE", None, 2))

for policy, spins, threads in ROWS:
    given = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | {"OMP_WAIT_POLICY": policy}
    given |= {"GOMP_SPINCOUNT": str(spins)} if spins else {}
    command = [sys.executable, "-c", PASS, str(threads)]
    said = subprocess.run(command, env=given, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    print(f"{policy}, {spins or 'usual'} spins, {threads} threads: {said}", flush=True)
