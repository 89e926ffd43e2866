"""What a number of learners at once need, each in a kernel of their own: `python -m studies.seats`.

They load the model and draw at the same moment. The rows go to a file, and a run that was cut short goes on.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sd3kit import files, records
from sd3kit.errors import UserError, answer
from sd3kit.loading.names import resolve

PROMPT = "a fox on a blue background, flat"
# What a learner's kernel holds: the pipeline, the explorer's functions and the libraries behind them, all used once.
SETUP = f"""
import json, sd3kit
from sd3kit import explore
pipe = sd3kit.load({{model!r}}, quiet=True)
explore.schedule(pipe, {PROMPT!r}, steps=2)
print(0)
"""
DRAW = f"""
print(json.dumps([explore.text_to_image(pipe, {PROMPT!r}, seed=seed).seconds for seed in range({{pictures}})]))
"""
# A process's share of the memory where the system tells it, else all of its memory.
MEMORY = """
import psutil
info = psutil.Process().memory_full_info()
print(getattr(info, "pss", 0) or getattr(info, "uss", 0) or info.rss)
"""


@contextlib.contextmanager
def learner(threads: int | None) -> Iterator[Callable[[str], str]]:
    """One learner's kernel, as JupyterLab starts it: a function that runs code in it and gives what the code prints.

    It raises a RuntimeError where the code fails or the kernel dies, most likely for want of memory.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbformat.v4 import new_code_cell, new_notebook

    # on a busy machine the output may come long after the answer; what has not come by then is lost
    client = NotebookClient(new_notebook(), kernel_name="python3", timeout=3600, iopub_timeout=60)
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})

    def run(code: str) -> str:
        cell = new_code_cell(code)
        client.nb.cells = [cell]
        try:
            client.execute_cell(cell, 0)
        except DeadKernelError as error:
            raise RuntimeError("a learner's kernel was killed, most likely for want of memory") from error
        except CellExecutionError as error:
            raise RuntimeError(f"a learner's kernel failed: {error.ename}: {error.evalue}") from error
        return "".join(out["text"] for out in cell.outputs if out.get("name") == "stdout")

    with client.setup_kernel(env=environment):
        yield run


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
    with contextlib.ExitStack() as open_kernels, ThreadPoolExecutor(learners) as pool:
        kernels = [open_kernels.enter_context(learner(threads)) for _ in range(learners)]

        def all_at_once(code: str) -> list:
            return [json.loads(said) for said in pool.map(lambda run: run(code), kernels)]

        all_at_once(SETUP.format(model=model))
        every = [second for times in all_at_once(DRAW.format(pictures=pictures)) for second in times]
        memory = all_at_once(MEMORY)
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


def run(options: argparse.Namespace) -> int:
    if min(*options.learners, options.pictures, options.threads) < 1:
        raise UserError("--learners, --pictures and --threads must be 1 or more.")
    model = options.model or os.environ.get("SD3KIT_MODEL") or "nano"
    resolve(model)
    files.check_writable(options.out)
    records.read(options.out)
    settings = {"pictures": options.pictures, "threads": options.threads, "model": model}
    rows = {f"{n} learners": lambda n=n: seats(n, **settings) for n in options.learners}
    command = f"python -m studies.seats --pictures {options.pictures} --threads {options.threads}"
    command += f" --model {shlex.quote(model)}"
    stamp = records.stamp(command)
    # without the weights: whatever they are, they take the same time and memory
    identity = {"study": "seats", **settings, "machine": records.processor()}
    identity |= {name: stamp[name] for name in ("cores", "versions")}
    measured = records.study(list(rows), lambda row: rows[row](), options.out, identity, command)
    print(report(measured))
    return 2 if any("seconds" not in record for record in measured) else 0


def main(arguments: list[str] | None = None) -> int:
    top = argparse.ArgumentParser(prog="python -m studies.seats", description=__doc__.splitlines()[0])
    top.add_argument("--learners", type=int, nargs="+", default=[1, 2, 5, 10], metavar="N", help="(1 2 5 10)")
    top.add_argument("--pictures", type=int, default=3, help="that each learner draws (%(default)s)")
    top.add_argument("--threads", type=int, default=1, help="of each kernel (%(default)s)")
    top.add_argument("--model", help="as in sd3kit.load (SD3KIT_MODEL, or nano)")
    top.add_argument("--out", type=Path, default=Path("seats.jsonl"), help="the file of records (%(default)s)")
    options = top.parse_args(arguments)
    return answer(lambda: run(options), "stopped; the rows that were measured are kept, and the same command goes on.")


if __name__ == "__main__":
    sys.exit(main())
