"""Rows of a study as JSON lines: stored as they are measured, continued where a run stopped, spread over processes."""

import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from .. import records
from ..loading.device import processes
from ..loading.names import NANO


@dataclasses.dataclass(frozen=True)
class Study:
    """`rows` are the conditions; `measure` takes one of them and returns its figures.

    `parts` are the parts of nano that the figures depend on: what is stored for other weights counts as not measured.
    """

    about: str
    rows: Sequence[dict]
    measure: Callable[[dict], dict]
    parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")


def weights(parts: Sequence[str], folder: Path = NANO) -> str:
    """Twelve digits that tell these parts' weights from any others."""
    digest = hashlib.sha256()
    for part in sorted(parts):
        for path in sorted((folder / part).glob("*.safetensors")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def load(name: str, folder: Path = records.RESULTS) -> list[dict]:
    """The stored rows of a study, each with its conditions, figures and stamp.

    Raises:
        FileNotFoundError: nothing is stored; the message names the command.
    """
    path = Path(folder) / f"{name}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"No study {name!r} is stored: `python -m sd3kit.study {name}` measures it.")
    return records.read(path)


def run(name: str, study: Study, folder: Path = records.RESULTS) -> None:
    """Measure the rows that are not stored yet for these weights; each process of a launch takes its share."""
    folder.mkdir(parents=True, exist_ok=True)
    path, state, mark = folder / f"{name}.jsonl", processes(), weights(study.parts)
    stored = [r for r in load(name, folder) if r["weights"] == mark] if path.exists() else []
    if state.is_main_process:  # rows of other weights go
        write(path, stored)
    state.wait_for_everyone()
    missing = [row for row in study.rows if not any(r["row"] == row for r in stored)]
    stamp = records.stamp(f"python -m sd3kit.study {name}") | {"weights": mark}
    with state.split_between_processes(missing) as share:
        for row in tqdm(share, desc=name, unit="row"):
            line = json.dumps({"row": row, "found": study.measure(row)} | stamp) + "\n"
            with path.open("a", encoding="utf-8") as file:  # one short write: lines of processes do not mix
                file.write(line)
    state.wait_for_everyone()
    if state.is_main_process:  # processes finish in any order; readers get the study's
        place = {json.dumps(row): i for i, row in enumerate(study.rows)}
        write(path, sorted(load(name, folder), key=lambda r: place.get(json.dumps(r["row"]), len(place))))
    state.wait_for_everyone()


def write(path: Path, rows: Sequence[dict]) -> None:
    """Replace the file as a whole, or not at all."""
    whole = path.with_suffix(".part")
    whole.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    os.replace(whole, path)


def mean(values: Sequence[float]) -> dict:
    """A record of a mean: its value, its 95% interval (normal, of the mean) and how many values there were."""
    centre = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": centre, "low": centre - half, "high": centre + half, "n": len(values)}
