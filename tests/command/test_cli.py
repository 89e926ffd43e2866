"""The command line: a picture comes out, and a wrong argument gets one sentence and no traceback."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from sd3kit.command import cli
from sd3kit.explore import from_png, text_to_image


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
    a, b = (file.read_bytes() for file in files[:2])
    assert a == b
    assert Image.open(files[0]).tobytes() != Image.open(files[2]).tobytes()
    assert from_png(files[2]) == from_png(files[0]) | {"seed": 8}


def test_a_jpeg(tmp_path):
    path = tmp_path / "fox.jpg"
    assert cli.main(["generate", "a fox", "-o", str(path), "--steps", "2"]) == 0
    assert Image.open(path).format == "JPEG"


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

    assert cli.main(["generate", *many(tmp_path, "--guidance", "3")]) == 2
    assert "was drawn with guidance 7.0, not 3.0" in capsys.readouterr().err


def test_two_processes_share_a_file_of_prompts(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "sd3kit"]
    done = subprocess.run(
        [*command, "generate", *many(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert "2/2" in done.stderr  # the bar of the first process: its half


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: ["generate"], "either a prompt"),
        (lambda folder: ["generate", "a fox", *many(folder)], "either a prompt"),
        (lambda folder: ["generate", *many(folder, "--count", "0")], "--count must be"),
        (lambda folder: ["generate", *many(folder, "-o", "fox.png")], "into a folder"),
        (lambda folder: ["generate", "--prompts", str(folder / "none.txt")], "could not be read"),
        (lambda folder: ["generate", *many(folder, "--prompts", str(empty(folder)))], "holds no prompt"),
    ],
)
def test_a_wrong_file_of_prompts_is_one_sentence(make, words, capsys, tmp_path):
    assert cli.main(make(tmp_path)) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and "Traceback" not in said


def empty(folder):
    path = folder / "empty.txt"
    path.write_text("\n \n", encoding="utf-8")
    return path


def test_an_empty_prompt(capsys):
    assert cli.main(["generate", "  "]) == 2
    assert "prompt is empty" in capsys.readouterr().err


def test_reset_keeps_every_copy_of_a_lesson(tmp_path, capsys):
    lesson = tmp_path / "03_flow.ipynb"
    lesson.write_text("published")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "it"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    for answer in ("first answers", "second answers"):
        lesson.write_text(answer)
        assert cli.main(["reset", "03", "--folder", str(tmp_path)]) == 0
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
    assert cli.main(["reset", "03", "--folder", str(tmp_path / "to")]) == 0
    assert lesson.read_text() == "published"
    assert (tmp_path / "to" / "mine" / "03_flow-1.ipynb").read_text() == "answers"


@pytest.mark.parametrize(
    ("lesson", "words"),
    [("07", "no one lesson '07'"), ("/07", "no one lesson '/07'"), ("03", "not a git checkout")],
)
def test_reset_changes_nothing_where_it_cannot(lesson, words, tmp_path, capsys):
    (tmp_path / "03_flow.ipynb").write_text("answers")
    assert cli.main(["reset", lesson, "--folder", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "03_flow.ipynb").read_text() == "answers" and not (tmp_path / "mine").exists()


def test_check_lists_every_model(capsys):
    assert cli.main(["check"]) == 0
    said = capsys.readouterr().out
    from sd3kit import MODELS

    assert all(name in said for name in MODELS)


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "sd3kit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip()
