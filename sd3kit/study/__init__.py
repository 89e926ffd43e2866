"""Stored studies: the lessons' figures with intervals. `python -m sd3kit.study NAME` measures one again.

`store` says what a study is and where its rows are, `drawing`, `training` and `teaching` what is measured.
"""

from .drawing import overlap
from .store import load

__all__ = ["load", "overlap"]
