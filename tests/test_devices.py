"""Mixed devices are found without a GPU: what `device_walks.py` tests, in a process that has a pretended one."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_the_package_is_right_on_a_device_that_is_not_the_cpu():
    """In its own process: torch has the device for good, and asks it about everything that concerns an accelerator."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        HERE / "device_walks.py",
    ]
    done = subprocess.run(command, env=os.environ | {"SD3KIT_DEVICE": "pretend"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
