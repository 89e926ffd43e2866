"""kill -9 at ten random moments for each thing that writes: what is there is whole, and the next run finishes it."""

import json
import os

import pytest
import warm
from kills import THINGS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.parametrize("thing", THINGS)
def test_ten_kills_leave_everything_whole(thing, tmp_path):
    done = warm.run("kills", thing, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    codes, seen = json.loads(done.stdout.splitlines()[-1])
    assert codes[-1] == 0 and codes.count(-9) > 2 and seen[-1] > 0
