"""What a study is, and its rows in a file: stored as they are measured, continued where a run stopped."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from sd3kit import records
from sd3kit.files import check_writable


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
        {"weights": records.weights(study.parts)},
        f"python -m studies {name}",
        tries=False,
        others=False,
    )
