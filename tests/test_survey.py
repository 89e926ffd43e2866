"""`make test-gpu`'s runner: each lesson with each model, a table of what they took, and a failure that is seen."""

import lessons
import nbformat
import pytest


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A lesson that runs with nano alone, and one that always does; they show what chose their model."""
    for name, source in (
        ("00_a", "import os\nprint(os.environ['SD3KIT_MODEL'], os.environ['SD3KIT_WEIGHTS'])"),
        ("01_b", "import os\nassert os.environ['SD3KIT_MODEL'] == 'nano'"),
    ):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(lessons, "LESSONS", sorted(tmp_path.glob("*.ipynb")))
    for name in ("SD3KIT_MODEL", "SD3KIT_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.night  # four kernels, each started by a pytest of its own
def test_a_survey_tries_nano_and_then_the_model_that_is_set(two, capsys):
    assert lessons.main(["--survey", str(two / "out"), "--timeout", "60"]) == 1
    head, _, _, _, *rows = (two / "out" / "table.md").read_text().splitlines()
    found = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert "torch" in head and [(row[0], row[1], row[4]) for row in found] == [
        ("00_a", "nano", ""), ("01_b", "nano", ""),
        ("00_a", "medium, random weights", ""), ("01_b", "medium, random weights", "failed"),
    ]  # fmt: skip
    assert all(float(row[2]) >= 0 for row in found)
    said = [lessons.text_of(nbformat.read(path, 4).cells[0]) for path in sorted((two / "out").glob("*/00_a.ipynb"))]
    assert said == ["nano \n", "medium random\n"]
    assert "AssertionError" in capsys.readouterr().out
    assert not nbformat.read(two / "00_a.ipynb", 4).cells[0].outputs, "the lesson itself is not changed"


def test_a_survey_takes_the_model_of_the_environment(two, monkeypatch):
    monkeypatch.setenv("SD3KIT_MODEL", "3.5-medium")
    assert lessons.models()[1:] == [("3.5-medium", {"SD3KIT_MODEL": "3.5-medium", "SD3KIT_WEIGHTS": ""})]
    monkeypatch.setenv("SD3KIT_MODEL", "nano")
    assert [name for name, _ in lessons.models()] == ["nano"]
