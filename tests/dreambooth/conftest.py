"""accelerate keeps one state a process; each training here starts as in a process of its own."""

import pytest
import runs
from accelerate.state import AcceleratorState, GradientState, PartialState


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The folder of a training with `runs.SMALL` and nothing else, made once; tests read it and leave it as it is."""
    out = tmp_path_factory.mktemp("plain")
    assert runs.run(out) == 0
    return out


@pytest.fixture(autouse=True)
def fresh_accelerate():
    _reset()  # tests of other folders leave a state too
    yield
    _reset()


def _reset():
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()
