"""For teachers: `python notebooks/strip.py notebooks -o FOLDER` writes lessons without their solutions and outputs."""

import argparse
import json
import re
import sys
from pathlib import Path

from sd3kit import files
from sd3kit.errors import UserError, answer

SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?</details>\n*", re.DOTALL)


def without_solutions(notebook: dict) -> dict:
    """A notebook (as JSON) without its folded solutions, outputs and execution counts; the original is not changed."""
    cells = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = SOLUTION.sub("", source).strip("\n")
            if not source:
                continue
        metadata = {key: value for key, value in cell["metadata"].items() if key != "execution"}
        cell = cell | {"source": source, "metadata": metadata}
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
        cells.append(cell)
    metadata = {key: value for key, value in notebook["metadata"].items() if key not in ("sd3kit", "widgets")}
    return notebook | {"cells": cells, "metadata": metadata}


def strip(source: Path, out: Path) -> list[Path]:
    """Write the notebooks of a folder (or one file) without solutions into another folder.

    Returns:
        The files written, in order.

    Raises:
        UserError: there are no notebooks, the two folders are the same, a file is not a notebook, or `out` cannot be
            written; in the first four nothing is written.
    """
    found = sorted(source.glob("*.ipynb")) if source.is_dir() else [source]
    if not found or not found[0].is_file():
        raise UserError(f"There are no notebooks in {source}: give the folder that holds them.")
    if out.resolve() == found[0].parent.resolve():
        raise UserError(f"{out} holds the originals: give another folder after -o.")
    files.check_writable(out, folder=True)
    stripped = {}
    for path in found:
        try:
            notebook = without_solutions(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is not a notebook.") from error
        stripped[out / path.name] = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    for path, text in stripped.items():
        files.write_whole(path, text)
    return list(stripped)


def main(arguments: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="python notebooks/strip.py", description=__doc__)
    top.add_argument("source", type=Path, help="the folder with the notebooks, or one of them")
    top.add_argument("-o", "--out", type=Path, required=True, help="the folder for the learners")
    options = top.parse_args(arguments)

    def work() -> None:
        for path in strip(options.source, options.out):
            print(path)

    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
