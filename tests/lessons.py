"""Run lessons: execute and stamp them (`python tests/lessons.py [00 01 ...]`), and what their tests share."""

import hashlib
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9]*.ipynb"))


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """What the outputs of a notebook depend on: its code, and nano's weights."""
    from sd3kit.loading.names import NANO

    digest = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode())
    for weights in sorted(NANO.rglob("*.safetensors")):
        digest.update(weights.read_bytes())
    return digest.hexdigest()[:16]


def run(notebook: nbformat.NotebookNode, folder: Path, timeout: int = 300) -> nbformat.NotebookNode:
    """Execute in a folder of its own, as a learner who has only the wheel."""
    NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell printed."""
    return "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")


def solutions(notebook: nbformat.NotebookNode) -> list[str]:
    """The code of the collapsed solutions, in order."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for folded in re.findall(r"<details><summary>Solution</summary>(.*?)</details>", cell.source, re.DOTALL):
                found += re.findall(r"```python\n(.*?)```", folded, re.DOTALL)
    return found


def without_widgets(notebook: nbformat.NotebookNode) -> None:
    """Put a line in place of each explorer, and nothing in place of progress bars, whose stored text is their start.

    What is stored of a widget is large, and dead until its cell runs again.
    """
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if "%|" not in output.get("data", {}).get("text/plain", "")
            ]
            for output in cell.outputs:
                if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                    output.data = {"text/plain": "An explorer: run this cell to use it."}


def main(numbers: list[str]) -> None:
    import tempfile

    for path in LESSONS:
        if numbers and path.name[:2] not in numbers:
            continue
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            run(notebook, Path(folder))
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        without_widgets(notebook)
        notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook.metadata["language_info"] = {"name": "python"}
        notebook.metadata["sd3kit"] = {"fingerprint": fingerprint(notebook)}
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
