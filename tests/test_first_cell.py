"""The install cell: installs only where it must, keeps torch, takes Colab's token without showing it; same in each."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import first_cell
import lessons
import nbformat
import pytest

TOKEN = "hf_" + "x" * 20


@pytest.fixture
def run(monkeypatch):
    """Execute the cell where some packages are missing, with what Colab holds; gives pip's calls and the names left."""
    asked, real = [], importlib.util.find_spec
    monkeypatch.setattr(subprocess, "run", lambda command, **how: asked.append((command, how)))
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def execute(missing=(), secrets=None):
        asked.clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else real(name))
        if secrets is not None:
            colab, userdata = types.ModuleType("google.colab"), types.ModuleType("google.colab.userdata")
            userdata.get = secrets.__getitem__
            colab.userdata = userdata
            monkeypatch.setitem(sys.modules, "google.colab", colab)
        names = {}
        exec(compile(first_cell.INSTALL, "install cell", "exec"), names)
        return list(asked), names

    return execute


def test_does_nothing_where_sd3kit_is(run):
    assert run()[0] == []
    assert "HF_TOKEN" not in os.environ


def test_installs_and_pins_the_torch_that_is_there(run):
    [(command, how)] = run(missing=["sd3kit"])[0]
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and how == {"check": True}
    assert command[-2:] == [
        "sd3kit @ git+https://github.com/sd3kit/sd3kit",
        f"torch=={importlib.metadata.version('torch')}",
    ]
    [(command, _)] = run(missing=["sd3kit", "torch"])[0]
    assert not any("torch" in word for word in command)


def test_takes_colabs_token_and_never_shows_it(run, capsys, monkeypatch):
    _, names = run(secrets={"HF_TOKEN": TOKEN})
    assert os.environ["HF_TOKEN"] == TOKEN
    assert TOKEN not in "".join(capsys.readouterr())
    assert not any(value == TOKEN for value in names.values())
    monkeypatch.setenv("HF_TOKEN", "mine")
    run(secrets={"HF_TOKEN": TOKEN})
    assert os.environ["HF_TOKEN"] == "mine", "one that is set already is kept"
    monkeypatch.delenv("HF_TOKEN")
    run(secrets={})
    assert "HF_TOKEN" not in os.environ


def test_the_source_is_the_projects(run):
    root = Path(__file__).parent.parent
    urls = tomllib.loads((root / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Source"] == f"https://github.com/{first_cell.REPOSITORY}"


def test_putting_it_in_twice_changes_nothing_the_second_time():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title\n\nText"), code := cell("x = 1")])
    assert first_cell.put(notebook, "00.ipynb") and not first_cell.put(notebook, "00.ipynb")
    assert notebook.cells[0].source == f"# Title\n\n{first_cell.badge('00.ipynb')}\n\nText"
    assert [c.source for c in notebook.cells[1:]] == [first_cell.INSTALL, code.source]


def cell(source):
    return nbformat.v4.new_code_cell(source)


@pytest.mark.parametrize("path", lessons.LESSONS, ids=lambda path: path.stem)
def test_each_lesson_begins_with_the_badge_and_the_same_cell(path):
    notebook = nbformat.read(path, as_version=4)
    assert first_cell.badge(path.name) in notebook.cells[0].source, "run `python tests/first_cell.py`"
    assert notebook.cells[1].source == first_cell.INSTALL, "run `python tests/first_cell.py`"
    assert sum(first_cell.TAG in c.metadata.get("tags", []) for c in notebook.cells) == 1
