"""What a study is, and its rows in a file: stored as they are measured, continued where a run stopped."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import records
from ..files import check_writable


@dataclasses.dataclass(frozen=True)
class Study:
    """`rows` are the conditions; `measure` takes one of them and returns its figures.

    `parts` are the parts of nano that the figures depend on: what is stored for other weights counts as not measured.
    """

    about: str
    rows: Sequence[dict]
    measure: Callable[[dict], dict]
    parts: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae")


def load(name: str, folder: Path = records.RESULTS) -> list[dict]:
    """The stored rows of a study: of each `row`, its conditions, what was `found`, the `weights` and the `stamp`.

    Raises:
        FileNotFoundError: nothing is stored; the message names the command.
    """
    path = Path(folder) / f"{name}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"No study {name!r} is stored: `python -m sd3kit.study {name}` measures it.")
    return records.read(path)


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
        f"python -m sd3kit.study {name}",
        tries=False,
        others=False,
    )
