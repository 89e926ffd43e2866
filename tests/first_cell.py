"""The install cell and the Colab badge, the same in each lesson: `python tests/first_cell.py` puts them in.

The one place that names where sd3kit is installed from. `tests/test_first_cell.py` runs the cell, and holds each
lesson to it.
"""

import sys

import lessons
import nbformat

REPOSITORY = "sd3kit/sd3kit"
INSTALL = f"""# Installs sd3kit where it is missing, as on Colab, and leaves torch alone. Elsewhere it installs nothing.
import importlib.metadata
import importlib.util
import logging
import os
import subprocess
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of torch that wait sleep, and leave the cores to others
SOURCE = "sd3kit @ git+https://github.com/{REPOSITORY}"
if importlib.util.find_spec("sd3kit") is None:
    there = importlib.util.find_spec("torch") is not None
    keep = ["torch==" + importlib.metadata.version("torch")] if there else []
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE, *keep], check=True)
if "google.colab" in sys.modules and "HF_TOKEN" not in os.environ:
    from google.colab import userdata

    try:
        os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")
    except Exception:
        pass  # not set, or not shared with this notebook; only the gated models need it
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes optional kernels, which no lesson needs"""
TAG = "install"


def badge(name: str) -> str:
    """The line that opens a notebook of the repository in Colab."""
    page = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({page})"


def put(notebook: nbformat.NotebookNode, name: str) -> bool:
    """Put badge and cell into a notebook, below the title; whether anything changed."""
    before = nbformat.writes(notebook)
    head = notebook.cells[0]
    title, _, rest = head.source.partition("\n")
    lines = [line for line in rest.split("\n") if "colab-badge.svg" not in line]
    head.source = f"{title}\n\n{badge(name)}\n\n" + "\n".join(lines).strip("\n")
    if TAG not in notebook.cells[1].metadata.get("tags", []):
        notebook.cells.insert(1, nbformat.v4.new_code_cell(metadata={"tags": [TAG]}, id=TAG))
    notebook.cells[1].source = INSTALL
    return nbformat.writes(notebook) != before


def main() -> int:
    for path in lessons.LESSONS:
        notebook = nbformat.read(path, as_version=4)
        if put(notebook, path.name):
            nbformat.write(notebook, path)
            print(f"{path.name}: changed; execute it again (make notebooks)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
