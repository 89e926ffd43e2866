"""Fixtures that several tests share; nano is loaded once."""

import gc
import os
import random
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as sd3kit does
sys.path.append(str(Path(__file__).parents[1]))  # for `studies`; at the end, so that sd3kit is the installed one

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("SD3KIT_MODEL", None)
if os.environ.get("SD3KIT_DEVICE") == "pretend":
    import pretend_device  # noqa: F401  torch knows the device from here on


def pytest_collection_finish():
    """The libraries are never garbage: what frees memory need not look through them each time, which takes 0.3 s."""
    gc.freeze()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "as_committed" not in item.nodeid)  # lessons first, or one runs alone at the end
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))
        if item.get_closest_marker("shapes") and not os.environ.get("SD3KIT_TEST_SHAPES"):
            item.add_marker(pytest.mark.skip(reason="runs every lesson twice more: `make test-shapes`, nightly"))
        if item.get_closest_marker("night") and not os.environ.get("SD3KIT_TEST_NIGHT"):
            item.add_marker(pytest.mark.skip(reason="long: SD3KIT_TEST_NIGHT=1, nightly"))
        if item.get_closest_marker("hub") and not os.environ.get("SD3KIT_TEST_HUB"):
            item.add_marker(
                pytest.mark.skip(reason="needs the Hugging Face Hub: set SD3KIT_TEST_HUB=1 where there is one")
            )


@pytest.fixture(scope="session")
def device():
    """Where tests run that are about no device of their own: this machine's, or what SD3KIT_DEVICE says."""
    from sd3kit.loading.device import pick_device

    return pick_device()


@pytest.fixture(scope="session")
def pipe():
    import sd3kit

    pipe = sd3kit.load("nano", quiet=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def turbo():
    import sd3kit

    turbo = sd3kit.load("nano-turbo", quiet=True)
    turbo.set_progress_bar_config(disable=True)
    return turbo


@pytest.fixture(scope="session")
def judge():
    from sd3kit.recipe.judge import Judge

    return Judge()


@pytest.fixture(scope="session")
def art(judge):
    """The art as far as the package carries it: the judge's small templates, scaled up. Enough to test with."""

    class SmallArt:
        def __init__(self):
            from sd3kit.recipe.judge import TEMPLATES
            from sd3kit.recipe.scenes import STYLES

            sheet = Image.open(TEMPLATES).convert("RGBA")
            side, self.pixels, self.keys = sheet.width // len(STYLES), [], []
            for row, subject in enumerate(judge.subjects):
                for column, style in enumerate(STYLES):
                    box = (column * side, row * side, (column + 1) * side, (row + 1) * side)
                    icon = sheet.crop(box).resize((160, 160), Image.Resampling.BICUBIC).convert("RGBa")
                    self.pixels.append(np.frombuffer(icon.tobytes(), np.uint8).reshape(160, 160, 4))
                    self.keys.append((subject.icon, style))
            self.subjects = judge.subjects
            self.index = {key: i for i, key in enumerate(self.keys)}

        def __getitem__(self, key):
            return self.pixels[self.index[key]]

        def __len__(self):
            return len(self.keys)

    return SmallArt()


@pytest.fixture
def rng():
    return random.Random(0)
