"""The project's own promises: what is installed, pinned and shipped."""

import os
import re
import tomllib
from pathlib import Path

import pytest

import sd3kit

ROOT = Path(__file__).parent.parent


def test_tests_run_against_the_installed_package():
    """Under `make test` the wheel is installed; a test that imports the checkout hides a file that is not packed."""
    if not os.environ.get("CI") and "site-packages" not in sd3kit.__file__:
        pytest.skip("an editable install; `make test` installs the wheel")
    assert "site-packages" in sd3kit.__file__


def test_torch_is_pinned_once_for_all():
    pins = re.findall(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    cpu = re.findall(r"^torch==(\S+)", (ROOT / "torch-cpu.txt").read_text(), re.MULTILINE)
    assert pins == cpu == ["2.13.0"]


def test_every_dependency_is_pinned():
    pins = {
        re.split(r"==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    names = {re.match(r"[A-Za-z0-9_.-]+", item)[0].lower() for item in wanted} - {"sd3kit"}
    assert names <= pins, names - pins


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    local = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert local
    assert not [link for link in local if not (ROOT / link).exists()]
