"""The benchmark: our command beside diffusers' script, and the ladder."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import PICTURES, one_sentence

from sd3kit import records
from sd3kit.dreambooth import benchmark


def test_a_peak_is_the_process_own_and_not_its_parents():
    ballast = bytearray(2**30)
    ballast[:: 2**12] = b"x" * 2**18  # touched, so that it is resident
    del ballast
    words = "from sd3kit.dreambooth.benchmark import peak_resident; print(peak_resident())"
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert 2**24 < int(said.stdout) < 2**30


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read on Linux only")
def test_every_row_has_its_time_peak_and_loss_or_says_why_not(tmp_path, capsys, monkeypatch):
    """On a nano with random weights. The "script" is our own command in a file: what is tested is how a file is run.

    As diffusers' script does, it opens every file of the folder as a picture.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom PIL import Image\n"
        "from sd3kit.dreambooth.__main__ import main\nfrom sd3kit.dreambooth.settings import parse\n"
        "pictures = [Image.open(path) for path in Path(parse().instance_data_dir).iterdir()]\n"
        "assert len(pictures) == 8 and '--precondition_outputs=0' in sys.argv\nsys.exit(main())\n"
    )
    out = tmp_path / "records.jsonl"
    options = ["--steps=4", "--resolution=64", f"--out={out}", "--sets", "equal", "NF4", "--weights=random"]
    failed = 0 if torch.cuda.is_available() else 1  # NF4 needs a GPU: an error of a row is one for the shell
    assert benchmark.main([*options, f"--script={script}"]) == failed
    ours, theirs, nf4 = records.read(out)
    assert [r["row"] for r in (ours, theirs, nf4)] == ["equal, sd3kit", "equal, diffusers' script", "NF4, sd3kit"]
    assert ours["seconds"]["n"] == 2 and ours["seconds"]["median"] > 0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and 0 < ours["loss"] < 3
    assert ours["host_peak"] > 2**27
    assert "--script script.py --model nano --weights random --resolution 64" in ours["stamp"]["command"]
    if failed:
        assert "--base_quantization needs a GPU" in nf4["raises"]
    said = capsys.readouterr().out
    assert "equal, sd3kit" in said and f"loss {ours['loss']:.4f}" in said

    def never(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(benchmark, "run", never)
    assert benchmark.main([*options, f"--script={script}"]) == failed  # what is there is left
    assert len(records.read(out)) == 3


def test_what_was_timed_is_kept_where_the_loss_cannot_be_measured(monkeypatch):
    def full(arguments, out):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(benchmark, "saved_loss", full)
    given = dict(resolution=64, batch=1, steps=4, precision="no")
    found = benchmark.run("sd3kit.dreambooth", benchmark.arguments(argparse.Namespace(**given), "nano", PICTURES))
    assert found["seconds"]["n"] == 2 and found["failed"].endswith("RuntimeError: out of memory")
    assert "out of memory" in benchmark.line(found | {"row": "defaults, sd3kit"})


FULL = "torch.OutOfMemoryError: CUDA out of memory."


@pytest.mark.parametrize(("last", "kind"), [(FULL, MemoryError), ("no torchvision here", RuntimeError)])
def test_a_training_that_ends_is_its_rows_result(last, kind, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"raise SystemExit({last!r})\n")
    with pytest.raises(kind, match=last):
        benchmark.run(str(script), [])


def test_wrong_arguments_of_the_benchmark(tmp_path, capsys):
    for words, phrase in (
        (["--steps=3"], "--steps must be at least 4"),
        (["--script=/nowhere.py"], "there is no script"),
        ([f"--out={tmp_path}/none/a.jsonl"], "cannot be written"),
        (["--model=nanoo", f"--out={tmp_path}/a.jsonl"], "did you mean nano"),
    ):
        assert benchmark.main(words) == 2
        assert phrase in one_sentence(capsys)
