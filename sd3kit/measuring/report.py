"""What lessons say of pictures and records: how far pictures are from others, and a row's time beside eager's."""

import numpy as np


def distance(pictures: list, reference: list) -> float:
    """The root mean square difference of pictures to their references, in 0..255; the same seeds and prompts."""
    pairs = zip(pictures, reference, strict=True)
    squares = [((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2).mean() for a, b in pairs]
    return float(np.sqrt(np.mean(squares)))


def of_eager(record: dict) -> tuple[float, float, float]:
    """A row's time as a share of eager's beside it: by the mean of both moments, and the range between them."""
    eager = record["eager"]
    return tuple(record["median"] / t for t in (sum(eager) / len(eager), max(eager), min(eager)))
