"""The benchmark: our command beside diffusers' script, and the ladder."""

import argparse
import json
import subprocess
import sys

import pytest
from runs import PICTURES

from sd3kit.dreambooth import benchmark


def test_a_peak_is_the_process_own_and_not_its_parents():
    ballast = bytearray(2**30)
    ballast[:: 2**12] = b"x" * 2**18  # touched, so that it is resident
    del ballast
    words = "from sd3kit.dreambooth.benchmark import _peak_resident; print(_peak_resident())"
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert 2**24 < int(said.stdout) < 2**30


def test_what_was_timed_is_kept_where_the_loss_cannot_be_measured(monkeypatch):
    def full(arguments, out):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "saved_loss", full)
    given = dict(model="nano", pictures=PICTURES, resolution=64, batch=1, steps=4, precision="no")
    found = benchmark.run(benchmark.OURS, benchmark.arguments(argparse.Namespace(**given)))
    assert found["seconds"]["n"] == 2 and found["failed"].endswith("RuntimeError: out of memory")


def test_the_benchmark_times_both_sides_and_says_what_did_not_run(tmp_path):
    """The "script" here is our own command in a file: what the benchmark does with a file is what is tested.

    As diffusers' script does, it opens every file of the folder as a picture.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom PIL import Image\n"
        "from sd3kit.dreambooth.__main__ import main\nfrom sd3kit.dreambooth.settings import parse\n"
        "pictures = [Image.open(path) for path in Path(parse().instance_data_dir).iterdir()]\n"
        "assert len(pictures) == 5 and '--precondition_outputs=0' in sys.argv\nsys.exit(main())\n"
    )
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no torchvision here')\n")
    options = ["--steps=4", "--resolution=64", f"--out={tmp_path / 'records.jsonl'}"]
    benchmark.SETS, whole = {"equal": benchmark.SETS["equal"]}, benchmark.SETS
    try:
        assert benchmark.main([*options, f"--script={script}"]) == 0
        ours, theirs = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
        assert benchmark.main([*options, f"--script={broken}"]) == 0
        failed = json.loads((tmp_path / "records.jsonl").read_text().splitlines()[1])
    finally:
        benchmark.SETS = whole
    assert ours["seconds"]["n"] == 2 and ours["seconds"]["median"] > 0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and 0 < ours["loss"] < 3
    assert ours["host_peak"] > 2**27
    assert failed["failed"] == "no torchvision here"
    assert "--script broken.py --model nano --resolution 64 --batch 1 --steps 4" in failed["stamp"]["command"]
