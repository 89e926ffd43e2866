"""Every lesson runs from the installed package alone, its solutions pass, and its committed outputs are fresh."""

import re

import lessons
import nbformat
import pytest
from wrong_answers import WRONG

TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}|ghp_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16}")
PATHS = re.compile(r"(?<![\w/])/(?:home|root|tmp|work|Users|usr)/[\w.-]+")
each_lesson = pytest.mark.parametrize("path", lessons.LESSONS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def test_there_are_lessons():
    assert lessons.LESSONS[0].name == "00_start_here.ipynb"


@each_lesson
def test_runs_as_committed_and_as_solved(path, tmp_path):
    """One run in which each check meets no answer, then typical wrong ones, then the solution."""
    notebook = read(path)
    answers, wrong = iter(lessons.solutions(notebook)), iter(WRONG[path.stem])
    cells, stubs, hints = [], [], []

    def asks(cell, answer, tag):
        cells.append(nbformat.v4.new_code_cell(answer))
        cells.append(nbformat.v4.new_code_cell(cell.source, metadata={"tags": [tag]}))

    for cell in notebook.cells:
        cells.append(cell)
        tags = cell.metadata.get("tags", [])
        if "exercise" in tags:
            stubs.append(cell)
        if "check" in tags:
            for answer, hint in next(wrong):
                asks(cell, answer, "refused")
                hints.append(hint)
            asks(cell, next(answers), "solved")
    assert len(stubs) >= 4 and next(answers, None) is next(wrong, None) is None, "one check and solution an exercise"
    notebook.cells = cells
    lessons.run(notebook, tmp_path)
    said = {
        tag: [lessons.text_of(c) for c in cells if tag in c.metadata.get("tags", [])]
        for tag in ("check", "refused", "solved")
    }
    assert all("Not attempted" in text for text in said["check"]), said["check"]
    assert all("Right." in text for text in said["solved"]), said["solved"]
    for text, hint in zip(said["refused"], hints, strict=True):
        assert text.startswith("Not yet") and hint in text, (text, hint)


@each_lesson
def test_committed_outputs_are_fresh_and_clean(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert notebook.metadata.get("sd3kit", {}).get("fingerprint") == lessons.fingerprint(notebook), (
        "run `make notebooks`"
    )
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            text = str({k: v for k, v in output.get("data", {}).items() if not k.startswith("image")}) + output.get(
                "text", ""
            )
            text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
            assert not TOKEN.search(text), "a token in an output"
            assert not PATHS.search(text), f"a machine's path in an output: {PATHS.search(text)}"


@each_lesson
def test_every_picture_has_an_alternative_text(path):
    for cell in read(path).cells:
        for output in cell.get("outputs", []):
            assert "image/png" not in output.get("data", {}), "show.figure gives a figure an alternative text"
            for alt in re.findall(r'<img [^>]*?alt="([^"]*)"', output.get("data", {}).get("text/html", "")):
                assert len(alt) > 5


@each_lesson
def test_every_drawing_is_shown(path):
    """Only a cell's last line is shown: a figure that is not there is lost."""
    for cell in read(path).cells:
        if cell.cell_type == "code" and re.search(r"^show\.(figure|grid)\(", cell.source, re.MULTILINE):
            assert "<img" in "".join(o.get("data", {}).get("text/html", "") for o in cell.outputs), cell.source


@each_lesson
def test_cells_are_short_and_the_frame_is_complete(path):
    notebook = read(path)
    lengths = sorted(len(cell.source.splitlines()) for cell in notebook.cells if cell.cell_type == "code")
    assert lengths[len(lengths) // 2] <= 10 and lengths[-1] <= 40
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for part in ("You will be able to", "**Minutes:**", "**Needs:**", "## Exercises", "## Recap", "**Reading:**"):
        assert part in text, part
    assert any(re.search(r"^guess\w* = None", cell.source, re.MULTILINE) for cell in notebook.cells)
