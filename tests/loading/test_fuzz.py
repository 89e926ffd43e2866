"""Whatever a file holds, what reads it gives its content or one sentence: random bytes and JSON, some seconds of them.

The environment variable SD3KIT_FUZZ says how many examples each test tries (60), such as 20000 at night.
"""

import json
import os

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as some  # noqa: E402

from sd3kit import teach  # noqa: E402
from sd3kit.command import generate  # noqa: E402
from sd3kit.errors import UserError  # noqa: E402
from sd3kit.loading import parts  # noqa: E402
from sd3kit.loading.names import NANO  # noqa: E402

fuzz = hypothesis.settings(
    max_examples=int(os.environ.get("SD3KIT_FUZZ", "60")), deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck), database=None,
)  # fmt: skip
JSON = some.recursive(
    some.none() | some.booleans() | some.floats() | some.integers() | some.text(max_size=9),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
KEYS = some.sampled_from(sorted(json.loads((NANO / "model_index.json").read_text())))
INDEX = some.dictionaries(KEYS, JSON).map(lambda change: json.loads((NANO / "model_index.json").read_text()) | change)


def or_one_sentence(read):
    try:
        return read()
    except UserError as error:
        assert "\n" not in str(error) and str(error)
    return None


@fuzz
@hypothesis.given(some.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_files_of_json(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any.json"
    file.write_bytes(data)
    found = or_one_sentence(lambda: parts.read_json(file))
    assert found is None or isinstance(found, dict)
    stored = or_one_sentence(lambda: generate._stored(file))
    assert stored is None or isinstance(stored, dict)
    assert all(isinstance(row["file_name"], str) for row in generate._rows(file))


@fuzz
@hypothesis.given(INDEX | JSON)
def test_the_index_of_a_pipeline(tmp_path_factory, index):
    folder = tmp_path_factory.getbasetemp()
    (folder / "model_index.json").write_text(json.dumps(index))
    found = or_one_sentence(lambda: parts.index(folder))
    assert found is None or all(isinstance(word, str) for value in found.values() for word in value)


@fuzz
@hypothesis.given(some.integers(0, 400), some.binary(min_size=1, max_size=8), some.booleans())
def test_a_weights_file(tmp_path_factory, where, bytes_, short):
    """Bytes changed in the header and in the length; the numbers behind are no header."""
    folder = tmp_path_factory.getbasetemp() / "weights"
    folder.mkdir(exist_ok=True)
    whole = (NANO / "text_encoder" / "model.safetensors").read_bytes()
    changed = whole[:where] + bytes_ + whole[where + len(bytes_) :]
    (folder / "model.safetensors").write_bytes(changed[: 100 + where] if short else changed)
    or_one_sentence(lambda: parts.weight_files(folder, "model", None))


@fuzz
@hypothesis.given(JSON)
def test_a_notebook(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "notebooks"
    folder.mkdir(exist_ok=True)
    (folder / "a.ipynb").write_text(json.dumps({"cells": value, "metadata": {}}))
    or_one_sentence(lambda: teach.strip(folder, folder / "out"))
