"""What a study is, and its rows in a file: stored as they are measured, continued where a run stopped."""

import dataclasses
import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.numpy import load_file

from sd3kit import records
from sd3kit.files import check_writable
from sd3kit.loading.names import NANO


def mean(values: Sequence[float]) -> dict:
    """A record of a mean: its value, its 95% interval (normal, of the mean) and how many values there were."""
    centre = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"mean": centre, "low": centre - half, "high": centre + half, "n": len(values)}


def weights(parts: Sequence[str] = ("",), folder: Path = NANO) -> str:
    """Twelve digits that tell these parts' weights from any others; by default those of all parts.

    "vae:encoder" are those tensors of a part whose names begin so: a decoder that learns on leaves the latents alone.
    """
    digest = hashlib.sha256()
    for part, _, inside in sorted(part.partition(":") for part in parts):
        for path in sorted((folder / part).rglob("*.safetensors")):
            if not inside:
                digest.update(path.read_bytes())
                continue
            for name, values in sorted(load_file(path).items()):
                digest.update(values.tobytes() if name.startswith(inside) else b"")
    return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Study:
    """`rows` are the conditions; `measure` takes one of them and returns its figures.

    `parts` are the parts of nano that the figures depend on: what is stored for other weights counts as not measured.
    """

    about: str
    rows: Sequence[dict]
    measure: Callable[[dict], dict]
    parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")


def run(name: str, study: Study, folder: str | Path = records.RESULTS) -> None:
    """Measure the rows that are not stored yet for these weights; rows of other weights go.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    check_writable(folder, folder=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    records.study(
        study.rows,
        lambda row: {"found": study.measure(row)},
        folder / f"{name}.jsonl",
        {"weights": weights(study.parts)},
        f"python -m studies {name}",
        tries=False,
        others=False,
    )
