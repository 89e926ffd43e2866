"""The command line: a picture comes out, and a wrong argument gets one sentence and no traceback."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import warm
from PIL import Image

from notebooks import reset
from sd3kit.command import cli, machine
from sd3kit.explore import from_png, text_to_image
from sd3kit.loading import pipeline


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, pipe):
    """What is drawn in this process is drawn by the tests' own nano; other processes load theirs."""
    monkeypatch.setattr(pipeline, "load", lambda *args, **more: pipe)


def test_generate_draws_the_prompt(tmp_path, judge, capsys):
    path = tmp_path / "fox.png"
    assert cli.main(["generate", "a fox on a blue background", "-o", str(path)]) == 0
    image = Image.open(path)
    assert image.size == (128, 128)
    assert judge.background(image) == "blue"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)


def test_a_full_memory_is_one_sentence(tmp_path, pipe, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.0 GB)")

    monkeypatch.setattr(pipe.vae, "decode", full)
    assert cli.main(["generate", "a fox", "-o", str(tmp_path / "fox.png"), "--steps", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("sd3kit: the memory is full")


def test_the_same_seed_gives_the_same_picture(tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, seed in zip(files, "778", strict=True):
        assert cli.main(["generate", "a fox", "-o", str(file), "--seed", seed, "--steps", "2"]) == 0
    a, b = (file.read_bytes() for file in files[:2])
    assert a == b
    assert Image.open(files[0]).tobytes() != Image.open(files[2]).tobytes()
    assert from_png(files[2]) == from_png(files[0]) | {"seed": 8}


def test_a_jpeg(tmp_path):
    path = tmp_path / "fox.jpg"
    assert cli.main(["generate", "a fox", "-o", str(path), "--steps", "2"]) == 0
    assert Image.open(path).format == "JPEG"


def many(tmp_path, *more):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n\na panda on a red background\n", encoding="utf-8")
    return ["--prompts", str(prompts), "--count", "2", "--steps", "2", "-o", str(tmp_path / "out"), *more]


def test_a_file_of_prompts_fills_a_folder_and_goes_on_where_it_stopped(tmp_path, pipe, capsys):
    assert cli.main(["generate", *many(tmp_path)]) == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert sorted(made) == ["00001-0.png", "00001-1.png", "00002-0.png", "00002-1.png"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows[3] == {"file_name": "00002-1.png", "text": "a panda on a red background", "seed": 1}
    again = text_to_image(pipe, "a panda on a red background", seed=1, steps=2)
    assert Image.open(tmp_path / "out" / "00002-1.png").tobytes() == again.image.tobytes()

    (tmp_path / "out" / "00001-1.png").unlink()
    kept = (tmp_path / "out" / "00001-0.png").stat().st_mtime_ns
    assert cli.main(["generate", *many(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")} == made
    assert (tmp_path / "out" / "00001-0.png").stat().st_mtime_ns == kept

    # other settings are refused, for other seeds too, whose files would not be in each other's way
    for more in (["--guidance", "3"], ["--guidance", "3", "--seed", "9"]):
        assert cli.main(["generate", *many(tmp_path, *more)]) == 2
        assert "was drawn with guidance 4.0, not 3.0" in capsys.readouterr().err
    assert cli.main(["generate", *many(tmp_path, "--seed", "1")]) == 0  # more seeds are welcome
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1, 2, 0, 1, 2]
    assert {row["file_name"] for row in rows} == {path.name for path in (tmp_path / "out").glob("*.png")}


def test_two_processes_share_a_file_of_prompts(tmp_path):
    first, second = warm.launch("sd3kit", "generate", *many(tmp_path))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert "2/2" in first.stderr  # its half


def test_reset_keeps_every_copy_of_a_lesson(tmp_path, capsys):
    lesson = tmp_path / "03_flow.ipynb"
    lesson.write_text("published")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "it"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    for answer in ("first answers", "second answers"):
        lesson.write_text(answer)
        assert reset.main(["03", "--folder", str(tmp_path)]) == 0
        assert lesson.read_text() == "published"
    kept = sorted((tmp_path / "mine").iterdir())
    assert [path.read_text() for path in kept] == ["first answers", "second answers"]


def test_reset_takes_the_upstreams_lesson_rather_than_committed_answers(tmp_path):
    def git(*words, folder):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)

    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "03_flow.ipynb").write_text("published")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "it"]):
        git(*words, folder=tmp_path / "from")
    git("clone", "-q", "from", "to", folder=tmp_path)
    lesson = tmp_path / "to" / "03_flow.ipynb"
    lesson.write_text("answers")
    git("commit", "-qam", "mine", folder=tmp_path / "to")
    assert reset.main(["03", "--folder", str(tmp_path / "to")]) == 0
    assert lesson.read_text() == "published"
    assert (tmp_path / "to" / "mine" / "03_flow-1.ipynb").read_text() == "answers"


def test_reset_puts_the_working_copy_back_without_outputs(tmp_path):
    cell = {"cell_type": "code", "source": "1 + 1", "outputs": ["2"], "execution_count": 1, "metadata": {}}
    lesson, working = tmp_path / "03_flow.ipynb", tmp_path / "mine" / "03_flow.ipynb"
    lesson.write_text(json.dumps({"cells": [cell]}))
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "it"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    working.parent.mkdir()
    working.write_text("answers")
    published = lesson.read_bytes()
    assert reset.main(["03", "--folder", str(tmp_path)]) == 0
    assert lesson.read_bytes() == published
    assert json.loads(working.read_text())["cells"] == [cell | {"outputs": [], "execution_count": None}]
    assert (working.parent / "03_flow-1.ipynb").read_text() == "answers"


@pytest.mark.parametrize(
    ("lesson", "words"),
    [("07", "no one lesson '07'"), ("/07", "no one lesson '/07'"), ("03", "not a git checkout")],
)
def test_reset_changes_nothing_where_it_cannot(lesson, words, tmp_path, capsys):
    (tmp_path / "03_flow.ipynb").write_text("answers")
    assert reset.main([lesson, "--folder", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "03_flow.ipynb").read_text() == "answers" and not (tmp_path / "mine").exists()


def test_check_lists_every_model_and_imports_no_diffusers():
    code = "import sys; from sd3kit.command import cli; cli.main(['check']); sys.exit('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    from sd3kit import MODELS

    assert all(name in done.stdout for name in MODELS)


def test_check_names_what_a_seat_or_a_container_may_use(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "pick_device", lambda: "cpu")
    monkeypatch.setattr(machine, "CGROUPS", [tmp_path / "memory.max", tmp_path / "none"])
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: argparse.Namespace(total=64 * 2**30))
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: range(16), raising=False)
    for told, limit, seat, cores, gib in (
        ("max\n", "", "", 16, 64.0),
        (f"{4 * 2**30}\n", "", "", 16, 4.0),
        (f"{4 * 2**30}\n", str(2**30), "0.5", 0.5, 1.0),
        (f"{2**63 - 4096}\n", "", "two", 16, 64.0),  # version 1 without a limit
    ):
        (tmp_path / "memory.max").write_text(told)
        monkeypatch.setenv("MEM_LIMIT", limit)
        monkeypatch.setenv("CPU_LIMIT", seat)
        assert cli.main(["check"]) == 0
        assert f"no GPU, {cores:g} cores of a processor, {gib:.1f} GiB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["check", "--help"])
    assert "what this machine has and what it can run" in capsys.readouterr().out


def test_no_line_of_the_libraries_reaches_the_terminal(tmp_path):
    command = [sys.executable, "-m", "sd3kit", "generate", "a fox", "--steps", "1", "-o", str(tmp_path / "fox.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1:] == [str(tmp_path / "fox.png")]
    assert all(line.startswith("steps:") for line in re.split(r"[\r\n]+", done.stderr) if line)
