"""The command line: a picture comes out, and a wrong argument gets one sentence and no traceback."""

import subprocess
import sys

import pytest
from PIL import Image

from sd3kit import cli


def test_generate_draws_the_prompt(tmp_path, judge, capsys):
    path = tmp_path / "fox.png"
    assert cli.main(["generate", "a fox on a blue background", "-o", str(path)]) == 0
    image = Image.open(path)
    assert image.size == (128, 128)
    assert judge.background(image) == "blue"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)


def test_the_same_seed_gives_the_same_picture(tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, seed in zip(files, "778", strict=True):
        assert cli.main(["generate", "a fox", "-o", str(file), "--seed", seed, "--steps", "4"]) == 0
    a, b, c = (file.read_bytes() for file in files)
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "100"], "divisible by 16"),
        (["--size", "512"], "up to 256"),
        (["--steps", "0"], "--steps must be"),
        (["--guidance", "50"], "--guidance must be"),
        (["--seed", "-1"], "--seed must be"),
        (["--model", "medum"], "did you mean medium"),
        (["-o", "fox.gif"], "must end in"),
        (["-o", "no/such/folder/fox.png"], "no folder"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "a fox", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt(capsys):
    assert cli.main(["generate", "  "]) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_check_lists_every_model(capsys):
    assert cli.main(["check"]) == 0
    said = capsys.readouterr().out
    from sd3kit import MODELS

    assert all(name in said for name in MODELS)


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "sd3kit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
