"""What a study is, and its rows in a file: stored as they are measured, continued where a run stopped."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from sd3kit import records
from sd3kit.files import check_writable
from sd3kit.recipe.digest import weights


def student(freedom: int) -> float:
    """What 95% of Student's t lies within, for so many degrees of freedom.

    Abramowitz and Stegun's expansion 26.7.5, within 0.1% from 4 degrees on, 1% too small at 2 and 11% at 1.
    """
    x, v = statistics.NormalDist().inv_cdf(0.975), freedom
    terms = (
        x,
        (x**3 + x) / (4 * v),
        (5 * x**5 + 16 * x**3 + 3 * x) / (96 * v**2),
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / (384 * v**3),
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / (92_160 * v**4),
    )
    return sum(terms)


def mean(values: Sequence[float]) -> dict:
    """A record of a mean: its value, its 95% interval (Student's t, since some means are of five) and their number."""
    centre = statistics.fmean(values)
    half = math.inf
    if len(values) > 1:
        half = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": centre, "low": centre - half, "high": centre + half, "n": len(values)}


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
