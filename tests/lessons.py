"""Run lessons: execute and stamp them (`python tests/lessons.py [00 01 ...]`), and what their tests share.

With `--survey` they are not stored but tried, as `make test-gpu` does: with nano, then with the model that is set.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9]*.ipynb"))


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """What the outputs of a notebook depend on: its code, nano's weights, and nano-turbo's where it names them."""
    from sd3kit.loading.names import NANO, TURBO

    digest = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode())
    turbo = any("nano-turbo" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    for weights in (*sorted(NANO.rglob("*.safetensors")), *(TURBO.glob("*.safetensors") if turbo else ())):
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


class GpuMemory:
    """The most memory that the first NVIDIA GPU had in use while this lasted, in `peak` (GiB), asked twice a second.

    It is that of all processes; torch keeps what it once had, so a short peak is seen too. None without such a GPU.
    """

    def __enter__(self):
        self.peak, self.ended, self.watch = None, threading.Event(), threading.Thread(target=self._watch)
        self.watch.start()
        return self

    def _watch(self) -> None:
        question = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while shutil.which(question[0]) and not self.ended.is_set():
            answer = subprocess.run(question, capture_output=True, text=True).stdout.strip()
            if answer.isdigit():  # MiB
                self.peak = max(self.peak or 0.0, int(answer) / 1024)
            self.ended.wait(0.5)

    def __exit__(self, *_):
        self.ended.set()
        self.watch.join()


def models() -> list[tuple[str, dict[str, str]]]:
    """What a survey tries, each with the environment that chooses it: nano, then what SD3KIT_MODEL and SD3KIT_WEIGHTS
    say, or where they say nothing SD3 Medium at its true size with random weights, which needs no download."""
    nano = {"SD3KIT_MODEL": "nano", "SD3KIT_WEIGHTS": ""}
    if not (model := os.environ.get("SD3KIT_MODEL")):
        return [("nano", nano), ("medium, random weights", {"SD3KIT_MODEL": "medium", "SD3KIT_WEIGHTS": "random"})]
    weights = os.environ.get("SD3KIT_WEIGHTS", "")
    chosen = (model + f", {weights} weights" * bool(weights), {"SD3KIT_MODEL": model, "SD3KIT_WEIGHTS": weights})
    return [("nano", nano)] + [chosen] * (model != "nano")


def survey(numbers: list[str], out: Path, timeout: int) -> int:
    """Run lessons by nbmake with each of `models`; what each took is in `out`/table.md, written after every lesson.

    The executed copies are kept beside it, in a folder for each model. Returns how many lessons failed.
    """
    from sd3kit import records
    from sd3kit.loading.device import pick_device

    stamp, rows, failed = records.stamp("make test-gpu"), [], 0
    head = f"{stamp['date']}, {stamp['device']}, on {pick_device()}, " + ", ".join(
        f"{name} {version}" for name, version in stamp["versions"].items()
    )
    table = ["| lesson | model | minutes | peak GPU memory, GiB | |", "|---|---|---|---|---|"]
    for place, (model, environment) in enumerate(models()):
        folder = out / f"{place} {model}".replace(" ", "_").replace(",", "").replace("/", "_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in chosen(numbers):
            copy = shutil.copy(path, folder)
            nbmake = [sys.executable, "-m", "pytest", "-q", "--nbmake", f"--nbmake-timeout={timeout}", "--overwrite"]
            began = time.monotonic()
            with GpuMemory() as memory:
                done = subprocess.run(
                    [*nbmake, "-p", "no:cacheprovider", f"--rootdir={folder}", Path(copy).name],
                    cwd=folder, env=os.environ | environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )  # fmt: skip
            minutes, peak = (time.monotonic() - began) / 60, "" if memory.peak is None else f"{memory.peak:.1f}"
            said = "" if done.returncode == 0 else "failed"
            rows.append(f"| {path.stem} | {model} | {minutes:.1f} | {peak} | {said} |")
            failed += bool(said)
            print(rows[-1], *([done.stdout[-4000:]] if said else []), sep="\n", flush=True)
            (out / "table.md").write_text("\n".join([head + ".", "", *table, *rows, ""]), encoding="utf-8")
    return failed


def chosen(numbers: list[str]) -> list[Path]:
    return [path for path in LESSONS if not numbers or path.name[:2] in numbers]


def store(numbers: list[str]) -> None:
    """Execute lessons where they are, and write their outputs and their stamp into them."""
    for path in chosen(numbers):
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


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "numbers", nargs="*", metavar="NUMBER", help="of lessons, such as 00 01; all where none is given"
    )
    parser.add_argument(
        "--survey", type=Path, metavar="FOLDER", help="try them and write a table there; none is changed"
    )
    parser.add_argument("--timeout", type=int, default=3600, help="seconds for a cell of a survey (%(default)s)")
    options = parser.parse_args(arguments)
    if options.survey is None:
        return store(options.numbers) or 0
    return 1 if survey(options.numbers, options.survey.absolute(), options.timeout) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
