"""What becomes of records: how far and how right pictures are, and the table for the terminal."""

import numpy as np

from .. import records
from .account import GIB


def distance(pictures: list, reference: list) -> float:
    """The root mean square difference of pictures to their references, in 0..255; the same seeds and prompts."""
    pairs = zip(pictures, reference, strict=True)
    squares = [((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2).mean() for a, b in pairs]
    return float(np.sqrt(np.mean(squares)))


def adherence(pictures: list, prompts: tuple[str, ...]) -> dict:
    """The share of nano's pictures with the subject and the background that were asked for."""
    from ..recipe.judge import Judge

    judge, answers = Judge(), []
    for picture, prompt in zip(pictures, prompts, strict=False):
        found = judge.subject(picture)
        words = prompt.split(",")[0].split()
        answers.append(found is not None and found[0] == words[1] and judge.background(picture) == words[4])
    return records.share(answers)


def of_eager(record: dict) -> tuple[float, float, float]:
    """A row's time as a share of eager's beside it: by the mean of both moments, and the range between them."""
    eager = record["eager"]
    return tuple(record["median"] / t for t in (sum(eager) / len(eager), max(eager), min(eager)))


def failure(record: dict) -> str:
    """Why a row has no figures, or ""."""
    return "out of memory" if "out_of_memory" in record else record.get("raises", "")


TIMES = """Seconds: the median of a picture's, and the range. floor: the least that this machine could take for its
operations. distance: from the default's pictures, of 255 (root mean square; 0 is the same picture)."""
NOTES = {
    "memory": TIMES,
    "speed": f"""{TIMES} of eager's time: against
the unchanged pipeline's right before and right after the row; both together give the range.""",
}


def table(rows: list[dict], study: str) -> str:
    """The records for the terminal, with a note on what the columns are."""
    lines, several = [], len({(r["model"], r["size"]) for r in rows}) > 1
    for r in rows:
        if failure(r):
            figures = failure(r)
        else:
            figures = f"{r['median']:8.3f} s ({r['low']:.3f} to {r['high']:.3f}), floor {r['floor']:.3f} s, "
            figures += f"peak {r['device_peak'] / GIB:.3f} GiB, distance {r['distance']:.1f}"
            figures += f", right {r['right']['share']:.0%}" if "right" in r else ""
            figures += ", {:.2f} ({:.2f} to {:.2f}) of eager's time".format(*of_eager(r)) if "eager" in r else ""
            figures += f", and {r['encoding']:.1f} s before, to encode the prompts" if "encoding" in r else ""
        which = f"{r['model']} {r['size']} px " if several else ""
        lines.append(f"{which}{r['row']:<32} {figures}")
    return "\n".join([*lines, NOTES[study]])
