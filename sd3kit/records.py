"""How a figure is kept: its interval, the stamp that says where it came from, and files of JSON lines that resume."""

import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

RESULTS = Path(__file__).parent / "results"  # the records that the lessons draw


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson interval (low, high), in 0..1, of a share that was `right` times in `total`.

    Raises:
        ValueError: no trials, or more right than trials.
    """
    if total <= 0 or not 0 <= right <= total:
        raise ValueError(f"A share needs 0 <= right <= total and total > 0, not {right} of {total}.")
    share, square = right / total, z * z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return max(0.0, centre - half), min(1.0, centre + half)


def share(answers: Sequence[bool]) -> dict:
    """A record of a share of right answers: its value, its 95% interval and how many there were."""
    right, total = sum(map(bool, answers)), len(answers)
    low, high = wilson(right, total)
    return {"share": right / total, "low": low, "high": high, "n": total}


def processor() -> str:
    """The name of this machine's processor, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def stamp(command: str) -> dict:
    """Where and how a record was made: machine, versions, date, and the command that makes it again."""
    packages = ("torch", "diffusers", "transformers", "sd3kit")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's or the system's way to say that the memory is full."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in words or "not enough memory" in words)
    )


def read(path: str | os.PathLike) -> list[dict]:
    """The records of a file of JSON lines; none where there is no file. A last line that was cut short is left out.

    Raises:
        ValueError: a damaged line before the last.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"Line {number} of {path} is damaged: delete it and measure again.") from None
    return records


def study(rows: Mapping[str, Callable[[], dict]], path: str | os.PathLike, identity: dict, command: str) -> list[dict]:
    """Measure the rows into a file of JSON lines, one by one; rows that are there for the same identity are left.

    An out-of-memory, or any other error of a row, is that row's result: the run goes on.

    Args:
        rows: what to call for each row; it returns the figures.
        path: the file. It is written after each row, so a run that was cut short resumes.
        identity: what a record must share to count as the same: model, precision, size, steps, machine, versions.
        command: what makes the file again; it goes into the stamp.

    Returns:
        The records of these rows, old and new. A record has `row`, the identity, the stamp, and either the figures, or
        `out_of_memory` or `raises` with the error's own words.
    """
    path, identity = Path(path), json.loads(json.dumps(identity))
    there = read(path)
    records = {r["row"]: r for r in there if r.items() >= identity.items() and r["row"] in rows}
    with tqdm([name for name in rows if name not in records], unit="row") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            try:
                figures = rows[name]()
            except Exception as error:
                kind = "out_of_memory" if is_out_of_memory(error) else "raises"
                words = (str(error).strip().splitlines() or [""])[0]
                figures = {kind: f"{type(error).__name__}: {words}"[:300]}
            records[name] = {"row": name} | figures | identity | {"stamp": stamp(command)}
            # the error's traceback holds the pipeline: only now, outside of the handler, can its memory be freed
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            there = [r for r in there if not (r["row"] == name and r.items() >= identity.items())] + [records[name]]
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(r) + "\n" for r in there), encoding="utf-8")
            os.replace(part, path)
    return [records[name] for name in rows]


def stored(study: str, model: str, folder: Path = RESULTS) -> list[dict]:
    """The records of "memory" or "speed" for a model that belong together: the newest run's, on the whole memory.

    Records of other machines, precisions, sizes and versions stay in the file; their times do not compare.
    """
    records = [r for r in read(folder / f"{study}.jsonl") if r["model"] == model and not r["cap_gb"]]
    shared = ("weights", "dtype", "size", "steps", "calls", "device", "machine", "threads", "versions")
    return [r for r in records if all(r[key] == records[-1][key] for key in shared)]
