"""What sleeping threads cost on an idle machine: seconds a picture of nano with OMP_WAIT_POLICY PASSIVE and ACTIVE.

python benchmarks/idle_threads.py [PAIRS]   each pair is two fresh processes, in turn; run nothing else
"""

import os
import statistics
import subprocess
import sys

DRAW = """
import time, sd3kit, torch
pipe = sd3kit.load("nano", quiet=True)
pipe.set_progress_bar_config(disable=True)
times = []
for seed in range(5):
    start = time.perf_counter()
    pipe("a fox on a blue background, flat", generator=torch.Generator().manual_seed(seed))
    times.append(time.perf_counter() - start)
print(sorted(times[1:])[1])
"""

ratios = []
for pair in range(int(sys.argv[1]) if len(sys.argv) > 1 else 4):
    order = ("PASSIVE", "ACTIVE") if pair % 2 == 0 else ("ACTIVE", "PASSIVE")
    seconds = {}
    for policy in order:
        given = os.environ | {"OMP_WAIT_POLICY": policy}
        seconds[policy] = float(
            subprocess.run([sys.executable, "-c", DRAW], env=given, stdout=subprocess.PIPE, check=True).stdout
        )
    ratios.append(seconds["PASSIVE"] / seconds["ACTIVE"])
    print(f"passive {seconds['PASSIVE']:.3f} s, active {seconds['ACTIVE']:.3f} s, ratio {ratios[-1]:.3f}", flush=True)
print(f"median ratio {statistics.median(ratios):.3f} of {len(ratios)} pairs")
