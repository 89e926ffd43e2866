"""The lessons' stored studies: figures with intervals, measured by `python -m studies NAME` in the repository."""

from pathlib import Path

import numpy as np
import torch

from . import records


def load(name: str, folder: Path = records.RESULTS) -> list[dict]:
    """The stored rows of a study: of each `row`, its conditions, what was `found`, the `weights` and the `stamp`.

    Raises:
        FileNotFoundError: nothing is stored; the message names the command.
    """
    path = Path(folder) / f"{name}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"No study {name!r} is stored: `python -m studies {name}` measures it.")
    return records.read(path)


def overlap(heat: torch.Tensor, mask: np.ndarray) -> float:
    """Intersection over union of a map (rows, columns), scaled up and cut at its mean, and the true mask (H, W)."""
    large = torch.nn.functional.interpolate(heat[None, None], mask.shape, mode="bilinear", align_corners=False)[0, 0]
    cut = (large > large.mean()).cpu().numpy()
    return float((cut & mask).sum() / max(1, (cut | mask).sum()))
