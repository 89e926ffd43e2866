"""For teachers: `python -m sd3kit.teach strip` and `python -m sd3kit.teach seats`.

`strip` writes notebooks without their solutions and outputs; `seats` measures what a number of learners at once need.
"""

import argparse
import json
import os
import queue
import re
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import records
from .errors import UserError

SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?</details>\n*", re.DOTALL)
PROMPT = "a fox on a blue background, flat"
# What a learner's kernel holds: the pipeline, the explorer's functions and the libraries behind them, all used once.
SETUP = f"""
import statistics, time
import sd3kit
from sd3kit import explore
pipe = sd3kit.load({{model!r}}, quiet=True)
explore.schedule(pipe, {PROMPT!r}, steps=2)
"""
DRAW = f"""
times = [explore.text_to_image(pipe, {PROMPT!r}, seed=seed).seconds for seed in range({{pictures}})]
"""


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
        UserError: there are no notebooks, the two folders are the same, or a file is not a notebook.
    """
    files = sorted(source.glob("*.ipynb")) if source.is_dir() else [source]
    if not files or not files[0].is_file():
        raise UserError(f"There are no notebooks in {source}: give the folder that holds them.")
    if out.resolve() == files[0].parent.resolve():
        raise UserError(f"{out} holds the originals: give another folder after -o.")
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for file in files:
        try:
            stripped = without_solutions(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not a notebook.") from error
        path = out / file.name
        path.write_text(json.dumps(stripped, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(path)
    return written


# ---- seats ----------------------------------------------------------------------------------------------------------


class Seat:
    """One learner's kernel, as JupyterLab starts it."""

    def __init__(self, threads: int | None):
        from jupyter_client import KernelManager

        extra = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(env=os.environ | extra)
        self.client = self.manager.client()
        self.client.start_channels()

    def ready(self) -> None:
        self.client.wait_for_ready(timeout=300)

    def ask(self, code: str, wanted: str = "None") -> str:
        """Send code without waiting; `answer` with what this returns gives the value of `wanted`."""
        return self.client.execute(code, user_expressions={"wanted": wanted}, store_history=False)

    def answer(self, asked: str, timeout: float = 3600) -> str:
        end = time.monotonic() + timeout
        while True:
            try:
                message = self.client.get_shell_msg(timeout=1)
            except queue.Empty:
                if not self.manager.is_alive():
                    raise RuntimeError("a learner's kernel was killed, most likely for want of memory") from None
                if time.monotonic() > end:
                    raise RuntimeError(f"a learner's kernel gave no answer in {timeout:g} seconds") from None
                continue
            if message["parent_header"].get("msg_id") == asked:
                break
        content = message["content"]
        if content["status"] != "ok":
            raise RuntimeError(f"a learner's kernel failed: {content.get('ename')}: {content.get('evalue')}")
        return content["user_expressions"]["wanted"]["data"]["text/plain"]

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


def _memory() -> str:
    """Code whose value is this process's memory in bytes: its share where the system tells it, else all of it."""
    return (
        "(lambda info: getattr(info, 'pss', 0) or getattr(info, 'uss', 0) or info.rss)"
        "(__import__('psutil').Process().memory_full_info())"
    )


def seats(learners: int, *, model: str | None = None, pictures: int = 3, threads: int | None = 1) -> dict:
    """Let so many learners draw at once, each in a kernel of its own, and measure what they need.

    Args:
        learners: 1 or more.
        model: as in `sd3kit.load`.
        pictures: how many each draws, with the model's default settings; one after another.
        threads: of each kernel; None is torch's own choice.

    Returns:
        `seconds` a picture: median, `low`, `high` over all learners; `bytes`: mean memory of a seat, where the system
        tells it the proportional share (libraries that kernels share are counted once), and `bytes_high`, of the
        largest.

    Raises:
        ValueError: fewer than one learner or picture. RuntimeError: a kernel failed, with its words.
    """
    if learners < 1 or pictures < 1:
        raise ValueError("There must be at least one learner and one picture.")
    kernels: list[Seat] = []
    try:
        for _ in range(learners):
            kernels.append(Seat(threads))
        for seat in kernels:
            seat.ready()
        for seat, asked in [(seat, seat.ask(SETUP.format(model=model))) for seat in kernels]:
            seat.answer(asked)
        draw = DRAW.format(pictures=pictures)
        asked = [seat.ask(draw, "times") for seat in kernels]  # all at once
        times = [json.loads(seat.answer(a)) for seat, a in zip(kernels, asked, strict=True)]
        memory = [int(seat.answer(seat.ask("", _memory()))) for seat in kernels]
    finally:
        for seat in kernels:
            seat.close()
    every = [second for each in times for second in each]
    return {
        "learners": learners,
        "seconds": statistics.median(every),
        "low": min(every),
        "high": max(every),
        "n": len(every),
        "bytes": statistics.fmean(memory),
        "bytes_high": max(memory),
    }


def report(records: Sequence[dict]) -> str:
    """The records of `seats` as a Markdown table, for TEACHING.md."""
    lines = ["| learners at once | seconds a picture, median (low to high) | memory a seat |", "|---|---|---|"]
    for r in records:
        if "seconds" not in r:
            lines.append(f"| {r['row']} | {r.get('raises') or r.get('out_of_memory')} | |")
            continue
        times = f"{r['seconds']:.1f} ({r['low']:.1f} to {r['high']:.1f}), n = {r['n']}"
        lines.append(f"| {r['learners']} | {times} | {r['bytes'] / 2**30:.2f} GiB |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m sd3kit.teach", description=__doc__.splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    one = commands.add_parser("strip", help="write notebooks without solutions and outputs")
    one.add_argument("source", type=Path, help="the folder with the notebooks, or one of them")
    one.add_argument("-o", "--out", type=Path, required=True, help="the folder for the learners")
    two = commands.add_parser("seats", help="measure memory and seconds for some numbers of learners at once")
    two.add_argument("--learners", type=int, nargs="+", default=[1, 2, 5, 10], metavar="N", help="(1 2 5 10)")
    two.add_argument("--pictures", type=int, default=3, help="that each learner draws (%(default)s)")
    two.add_argument("--threads", type=int, default=1, help="of each kernel (%(default)s)")
    two.add_argument("--model", help="as in sd3kit.load (SD3KIT_MODEL, or nano)")
    two.add_argument("--out", type=Path, default=Path("seats.jsonl"), help="the file of records (%(default)s)")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "strip":
            for path in strip(options.source, options.out):
                print(path)
            return 0
        if min(*options.learners, options.pictures, options.threads, 1) < 1:
            raise UserError("--learners, --pictures and --threads must be 1 or more.")
    except UserError as error:
        print(f"sd3kit: {error}", file=sys.stderr)
        return 2
    settings = {"pictures": options.pictures, "threads": options.threads, "model": options.model}
    rows = {f"{n} learners": lambda n=n: seats(n, **settings) for n in options.learners}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    identity = {"study": "seats", **settings, "machine": records.processor(), "cores": cores}
    command = f"python -m sd3kit.teach seats --pictures {options.pictures} --threads {options.threads}"
    if options.model:
        command += f" --model {shlex.quote(options.model)}"
    print(report(records.study(list(rows), lambda row: rows[row](), options.out, identity, command)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
