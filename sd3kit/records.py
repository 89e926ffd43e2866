"""How a figure is kept: its interval, the stamp that says where it came from, and files of JSON lines that resume."""

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .errors import UserError
from .files import check_writable, unwritable, write_whole
from .loading.device import is_out_of_memory, processes

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


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of these packages, or "not installed"."""
    found = dict.fromkeys(packages, "not installed")
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def processor() -> str:
    """The name of this machine's processor, as far as the system tells it."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def stamp(command: str) -> dict:
    """Where and how a record was made: machine, versions, date, and the command that makes it again."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions("torch", "diffusers", "transformers", "sd3kit"),
    }


def read(path: str | os.PathLike) -> list[dict]:
    """The records of a file of JSON lines; none where there is no file. A last line that was cut short is left out.

    Raises:
        UserError: the file cannot be read, or a line before the last is no record.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another file.") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            records[-1]["row"]
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):  # what follows the last line's end is nothing, or was cut short
                raise UserError(f"Line {number} of {path} is no record: mend it, or give another file.") from None
            del records[number - 1 :]
    return records


def study(
    rows: Sequence,
    measure: Callable[..., dict],
    path: str | os.PathLike,
    identity: dict,
    command: str,
    *,
    tries: bool = True,
    others: bool = True,
) -> list[dict]:
    """Measure rows into a file of JSON lines, one by one; rows that are there for the same identity are left.

    Each process of an `accelerate launch` takes its share of the rows.

    Args:
        rows: the conditions, each a name or a dict.
        measure: takes one of them and returns its figures.
        path: the file. It grows by a line a row, so a run that was cut short resumes.
        identity: what a record must share to count as the same: model, precision, size, steps, machine, versions.
        command: what makes the file again; it goes into the stamp.
        tries: an out-of-memory, or any other error of a row, is that row's result, and the run goes on.
        others: keep what the file has for other identities.

    Returns:
        The records of these rows, old and new. A record has `row`, the figures, the identity and the `stamp`; of a row
        that failed `out_of_memory` or `raises`, with the error's own words, instead of figures.

    Raises:
        UserError: the file has a damaged line or cannot be written; said before anything is measured, where it can be.
    """
    from accelerate.utils.memory import clear_device_cache

    check_writable(path)
    path, identity, state = Path(path), json.loads(json.dumps(identity)), processes()
    place = {json.dumps(row): i for i, row in enumerate(rows)}

    def ours(record: dict) -> bool:
        return record.items() >= identity.items()

    def kept() -> list[dict]:
        """The file's records in the order of the rows, those of other identities first."""
        found = [r for r in read(path) if others or ours(r)]
        return sorted(found, key=lambda r: place.get(json.dumps(r["row"]), len(place)) if ours(r) else -1)

    def write() -> None:
        write_whole(path, "".join(json.dumps(r) + "\n" for r in kept()))

    there = [json.dumps(r["row"]) for r in kept() if ours(r)]
    missing = [row for row in rows if json.dumps(row) not in there]
    state.wait_for_everyone()
    if missing and state.is_main_process:
        write()  # without a line that was cut short
    state.wait_for_everyone()
    with state.split_between_processes(missing) as share, tqdm(share, unit="row") as bar:
        for row in bar:
            bar.set_postfix_str(str(row))
            try:
                figures = measure(row)
            except Exception as error:
                if not tries:
                    raise
                kind = "out_of_memory" if is_out_of_memory(error) else "raises"
                words = (str(error).strip().splitlines() or [""])[0]
                figures = {kind: f"{type(error).__name__}: {words}"[:300]}
            record = {"row": row} | figures | identity | {"stamp": stamp(command)}
            try:
                with path.open("a", encoding="utf-8") as file:  # one short write: lines of processes do not mix
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise unwritable(path, error) from error
            # the error's traceback holds the pipeline: only now, outside of the handler, can its memory be freed
            clear_device_cache(garbage_collection=True)
    state.wait_for_everyone()
    if missing and state.is_main_process:  # processes finish in any order; readers get the study's
        write()
    state.wait_for_everyone()
    return [r for r in kept() if ours(r) and json.dumps(r["row"]) in place]


def stored(study: str, model: str, folder: Path = RESULTS) -> list[dict]:
    """The records of "memory" or "speed" for a model that belong together: the newest run's, on the whole memory.

    Records of other machines, precisions, sizes and versions stay in the file; their times do not compare.
    """
    records = [r for r in read(folder / f"{study}.jsonl") if r["model"] == model and not r["cap_gb"]]
    shared = ("weights", "dtype", "size", "steps", "calls", "device", "machine", "threads", "versions")
    return [r for r in records if all(r[key] == records[-1][key] for key in shared)]
