"""Whatever a file holds, what reads it gives its content or one sentence: random bytes and JSON, some seconds of them.

The environment variable SD3KIT_FUZZ says how many examples each test tries (60), such as 20000 at night.
"""

import io
import json
import os
import shutil
import types

import pytest
from PIL import Image, PngImagePlugin

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as some  # noqa: E402

from notebooks import strip  # noqa: E402
from sd3kit import explore, pictures, records  # noqa: E402
from sd3kit.dreambooth import Settings, data, settings, subject  # noqa: E402
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
    or_one_sentence(lambda: parts.look(folder))


@fuzz
@hypothesis.given(JSON)
def test_a_notebook(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "notebooks"
    folder.mkdir(exist_ok=True)
    (folder / "a.ipynb").write_text(json.dumps({"cells": value, "metadata": {}}))
    or_one_sentence(lambda: strip.strip(folder, folder / "out"))


def png(text: str) -> bytes:
    stored, written = PngImagePlugin.PngInfo(), io.BytesIO()
    stored.add_text("sd3kit", text)
    Image.new("RGB", (8, 8)).save(written, "PNG", pnginfo=stored)
    return written.getvalue()


WHOLE = png('{"prompt": "a fox", "seed": 3}')
SETTING = some.sampled_from(["prompt", "seed", "steps", "guidance", "shift", "size", "strength", "scales", "keep", "x"])


def or_a_value_error(read):
    try:
        return read()
    except ValueError as error:
        assert "\n" not in str(error) and str(error).endswith(".")
    return None


@fuzz
@hypothesis.given(some.dictionaries(SETTING, JSON).map(json.dumps) | JSON.map(json.dumps) | some.text(max_size=50))
def test_settings_in_a_png(text):
    found = or_a_value_error(lambda: explore.from_png(png(text)))
    assert found is None or isinstance(found, dict)


@fuzz
@hypothesis.given(some.lists(some.tuples(some.integers(0, len(WHOLE)), some.binary(max_size=4)), max_size=4))
def test_a_png_of_changed_bytes(changes):
    changed = WHOLE
    for where, bytes_ in changes:
        changed = changed[:where] + bytes_ + changed[where + len(bytes_) :]
    for read in (explore.from_png, pictures.open_picture):
        or_a_value_error(lambda read=read: read(changed))


NAMES = some.sampled_from(["a.png", "b.png", "", "../a.png", "x" * 300])
LINE = JSON | some.fixed_dictionaries({"file_name": NAMES | JSON, "text": some.text(max_size=9) | JSON})
TABLE = some.lists(LINE.map(json.dumps) | some.text(max_size=20), max_size=4).map("\n".join).map(str.encode)


@pytest.fixture(scope="module")
def two_pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    for name in ("a.png", "b.png"):
        shutil.copy(subject.PICTURES / "standing.png", folder / name)
    return folder


@fuzz
@hypothesis.given(some.sampled_from(["metadata.jsonl", "metadata.csv", "a.txt"]), TABLE | some.binary(max_size=99))
def test_captions(two_pictures, name, content):
    for old in ("metadata.jsonl", "metadata.csv", "a.txt", "b.txt"):
        (two_pictures / old).unlink(missing_ok=True)
    (two_pictures / name).write_bytes(content)
    (two_pictures / "b.txt").write_text("two")
    given = Settings(instance_prompt="a dog", caption_column=None if name == "a.txt" else "text")
    pairs = or_one_sentence(lambda: data._folder_pairs(two_pictures, given))
    assert pairs is None or [(path.name, type(caption)) for path, caption in pairs] == [("a.png", str), ("b.png", str)]


OPTION = some.sampled_from([*settings.kinds(), "none"])
WORD = some.sampled_from(["1", "x", "nan", "true", "", "1e400", "-3"]) | some.text(max_size=9)


@fuzz
@hypothesis.given(some.lists(some.tuples(OPTION, WORD).map("--{0[0]}={0[1]}".format) | WORD).map("\n".join))
def test_a_file_of_options(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "options"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = or_one_sentence(lambda: settings.parse([f"@{file}"]))
    assert found is None or isinstance(found, Settings)


@fuzz
@hypothesis.given(
    some.binary(max_size=99) | some.lists(LINE.map(json.dumps), max_size=3).map("\n".join).map(str.encode)
)
def test_a_file_of_records(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    file.write_bytes(content)
    found = or_one_sentence(lambda: records.read(file))
    assert found is None or all(isinstance(record, dict) and "row" in record for record in found)


@fuzz
@hypothesis.given(JSON.map(json.dumps).map(str.encode) | some.binary(max_size=50))
def test_the_progress_of_a_checkpoint(tmp_path_factory, content):
    from sd3kit.dreambooth import saving

    folder = tmp_path_factory.getbasetemp()
    (folder / "progress.json").write_bytes(content)
    alone = types.SimpleNamespace(num_processes=1)
    found = or_one_sentence(lambda: saving.read_progress(Settings(seed=0), alone, folder))
    assert found is None or all(isinstance(value, int) for value in found.values())
