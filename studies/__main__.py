"""Measure what a study lacks: `python -m studies NAME`, or under `accelerate launch -m` to spread it over processes.

Rows that are stored for the same weights of nano stay as they are, and those of other weights go. To measure all of
them again, give another folder (--out FOLDER).
"""

import argparse
import sys
from pathlib import Path

from sd3kit import records
from sd3kit.errors import answer
from sd3kit.files import check_writable

from .drawing import STUDIES as DRAWING
from .few import STUDIES as FEW
from .store import run
from .teaching import STUDIES as TEACHING
from .training import STUDIES as TRAINING

STUDIES = DRAWING | TRAINING | TEACHING | FEW


def main(arguments: list[str] | None = None) -> int:
    listed = "\n".join(f"  {name:<12}{study.about} ({len(study.rows)} rows)" for name, study in STUDIES.items())
    parser = argparse.ArgumentParser(
        prog="python -m studies",
        description=__doc__,
        epilog=f"studies:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", choices=STUDIES, metavar="NAME")
    parser.add_argument("--out", default=records.RESULTS, help="the folder of the records (%(default)s)")
    options = parser.parse_args(arguments)

    def work() -> None:
        check_writable(options.out, folder=True)
        for name in options.names:
            records.read(Path(options.out, f"{name}.jsonl"))  # all of them before the first is measured
        for name in options.names:
            run(name, STUDIES[name], options.out)

    return answer(work, "stopped; the same command goes on with the rows that are missing.")


if __name__ == "__main__":
    sys.exit(main())
