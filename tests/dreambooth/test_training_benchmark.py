"""The benchmark: our command beside diffusers' script, and the ladder."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import warm
from runs import one_sentence

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
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **_: warm.run(*command[2:]))  # forked, not started
    options = ["--steps=4", "--resolution=64", f"--out={out}", "--weights=random", f"--script={script}", "--sets"]
    assert benchmark.main([*options, "equal"]) == 0
    ours, theirs = records.read(out)
    assert [r["row"] for r in (ours, theirs)] == ["equal, sd3kit", "equal, diffusers' script"]
    assert ours["seconds"]["n"] == 2 and ours["seconds"]["median"] > 0
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and 0 < ours["loss"] < 3
    assert ours["host_peak"] > 2**27
    assert "--script script.py --model nano --weights random --resolution 64" in ours["stamp"]["command"]
    said = capsys.readouterr().out
    assert "equal, sd3kit" in said and f"loss {ours['loss']:.4f}" in said

    def fails(target, arguments):
        assert "--base_quantization=nf4" in arguments, "measured again"  # what is there is left
        raise RuntimeError("--base_quantization needs a GPU.")

    monkeypatch.setattr(benchmark, "run", fails)
    assert benchmark.main([*options, "equal", "NF4"]) == 1  # an error of a row is one for the shell
    assert "needs a GPU" in records.read(out)[2]["raises"] and len(records.read(out)) == 3


def test_what_was_timed_is_kept_where_the_loss_cannot_be_measured(monkeypatch):
    def full(arguments, out):
        raise RuntimeError("out of memory")

    def trained(command, **_):  # in place of the process: what `inside` writes
        report = Path(command[command.index("--report") + 1])
        report.write_text(json.dumps({"host_peak": 2**28, "device_peak": None, "updates": [0.0, 1.0, 3.0, 4.0]}))
        return types.SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(benchmark, "saved_loss", full)
    monkeypatch.setattr(benchmark.subprocess, "run", trained)
    found = benchmark.run("sd3kit.dreambooth", [])
    assert found["seconds"] == {"median": 1.5, "low": 1.0, "high": 2.0, "n": 2}
    assert found["failed"].endswith("RuntimeError: out of memory")
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
