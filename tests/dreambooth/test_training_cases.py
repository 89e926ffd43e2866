"""What people give a training, and what must come out: a table of cases for anybody to extend, most without a model."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from runs import PICTURES, SMALL, environment, one_sentence, run, words

from sd3kit import files
from sd3kit.dreambooth import DreamBoothError, Settings, checks, data, settings
from sd3kit.dreambooth import model as what_learns
from sd3kit.errors import UserError
from sd3kit.loading.names import NANO

NUMBERS = {name: kind for name, (kind, _) in settings.kinds().items() if kind in (int, float)}
ABSURD = {float: ("nan", "inf", "-inf", "-1e30", "1e30"), int: ("-1000000000000", "1000000000000", str(10**400))}


def refused(options: dict) -> str:
    with pytest.raises(UserError) as caught:
        checks.check(settings.parse(words(SMALL | options)))
    return str(caught.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_cannot_be_meant_is_refused(name, tmp_path):
    for value in ABSURD[NUMBERS[name]]:
        sentence = refused({name: value, "output_dir": tmp_path / "out"})
        assert f"--{name} must be at least" in sentence and len(sentence) < 200 and sentence.endswith(".")


def test_an_option_of_the_wrong_kind_is_refused_where_settings_are_made_in_python(tmp_path):
    for value in (float("nan"), float("inf"), True, "1", None, 10**400):
        with pytest.raises(DreamBoothError, match="logit_mean must be"):
            checks.check(Settings(**(SMALL | {"logit_mean": value, "output_dir": str(tmp_path)})))


OPTIONS = [  # options, a part of the sentence
    ({"train_batch_size": 10**9}, "--train_batch_size must be at least 1 and at most 1,000, not 1000000000."),
    ({"repeats": 10**9}, "--repeats must be at least 1 and at most 1,000"),
    ({"output_dir": ""}, "--output_dir is empty"),
    ({"output_dir": " "}, "--output_dir is empty"),
    ({"output_dir": "x" * 300}, "too long"),
    ({"output_dir": f"{PICTURES}/small.png"}, "a file is where its folder should be"),
    ({"output_dir": f"{PICTURES}/small.png/out"}, "a file is where its folder should be"),
    ({"output_dir": "/proc/out"}, "cannot be written"),
    ({"instance_data_dir": "x" * 300}, "There is no folder"),
    ({"instance_data_dir": f"{PICTURES}/small.png"}, "There is no folder"),
    ({"instance_prompt": "a \udcff robot"}, "--instance_prompt holds bytes that are no text"),
    ({"validation_prompt": "a \udcff robot"}, "--validation_prompt holds bytes that are no text"),
    ({"resume_from_checkpoint": "x" * 300}, "There is no whole checkpoint"),
    (
        {"with_prior_preservation": True, "class_data_dir": PICTURES + "/", "class_prompt": "a robot"},
        "are one folder",
    ),
]


@pytest.mark.parametrize(("options", "phrase"), OPTIONS)
def test_an_option_is_refused_before_anything_is_written(options, phrase, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert phrase in refused({"output_dir": tmp_path / "out"} | options)
    assert not list(tmp_path.iterdir())


def picture(kind: str, path: Path) -> Path:
    """A picture whose middle means half gray, or whose left half is transparent red on black."""
    ramp = np.linspace(0, 1, 64)[None].repeat(64, 0)
    if kind == "16 bits":
        Image.fromarray((ramp * 65535).astype(np.uint16)).save(path)
    elif kind == "float tiff":
        path = path.with_suffix(".tiff")
        Image.fromarray(ramp.astype(np.float32)).save(path)
    elif kind == "cmyk":
        path = path.with_suffix(".jpg")
        Image.fromarray((ramp * 255).astype(np.uint8)).convert("RGB").convert("CMYK").save(path, quality=95)
    elif kind == "palette":
        Image.fromarray((ramp * 255).astype(np.uint8)).quantize(64).save(path)
    elif kind == "animated":
        path = path.with_suffix(".gif")
        frames = [Image.fromarray(((ramp if n == 0 else 0 * ramp) * 255).astype(np.uint8)) for n in range(2)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray((ramp * 255).astype(np.uint8)).convert("RGB").rotate(90).save(path, exif=exif)
    elif kind == "alpha":
        gray = (ramp * 255).astype(np.uint8)
        clear = np.where(gray < 90, 0, 255).astype(np.uint8)
        Image.merge("RGBA", [Image.fromarray(x) for x in (gray, gray, gray, clear)]).save(path)
    elif kind == "tRNS":
        info = PngImagePlugin.PngInfo()
        Image.fromarray((ramp * 255).astype(np.uint8)).save(path, transparency=0, pnginfo=info)
    return path


@pytest.mark.parametrize("kind", ["16 bits", "float tiff", "cmyk", "palette", "animated", "turned", "alpha", "tRNS"])
def test_a_picture_means_what_it_shows(kind, tmp_path):
    row = np.asarray(data.read(picture(kind, tmp_path / "a.png"), 64))[32].astype(int)
    wanted = np.linspace(0, 255, 64)[:, None].repeat(3, 1)
    if kind == "alpha":
        wanted[wanted < 90] = 255  # on white
    if kind == "tRNS":
        wanted[:1] = 255
    assert np.abs(row[1:-1] - wanted[1:-1]).max() <= 8 and np.abs(row - wanted)[0].max() <= 12


LONG = "longer edge"
SHAPES = [((1, 60_000), LONG), ((60_000, 1), LONG), ((1, 4_000_000), LONG), ((9000, 9000), "pixels")]


@pytest.mark.parametrize(("size", "phrase"), SHAPES)
def test_a_picture_that_would_fill_the_memory_is_refused_at_once(size, phrase, tmp_path, capsys):
    Image.new("1", size).save(tmp_path / "a.png")
    start = time.perf_counter()
    assert run(tmp_path / "out", instance_data_dir=tmp_path, caption_column=None) == 2
    assert phrase in one_sentence(capsys) and time.perf_counter() - start < 10
    assert not (tmp_path / "out").exists()


BOM = b"\xef\xbb\xbf"
A, B = b'{"file_name": "a.png", "text": "one"}', b'{"file_name": "b.png", "text": "two"}'
CAPTIONS = [  # the files beside a.png and b.png; the two captions, or a part of the sentence
    ({"a.txt": BOM + b"one\n\n", "b.txt": b"two\r\n"}, ["one", "two"]),
    ({"metadata.jsonl": BOM + A + b"\n\n" + B + b"\n\n"}, ["one", "two"]),
    ({"metadata.csv": BOM + b"file_name,text\r\na.png,one\r\n\r\nb.png,two\r\n\r\n"}, ["one", "two"]),
    ({"metadata.jsonl": A + b"\n" + B.replace(b'"two"', b"null")}, ["one", "a sks robot"]),
    ({"metadata.jsonl": A.replace(b'"one"', b'["x", "y"]') + b"\n" + B}, "a.png in"),
    ({"metadata.jsonl": A.replace(b'"one"', b"5") + b"\n" + B}, "not one text"),
    ({"metadata.jsonl": A + b"\n5"}, "cannot be read"),
    ({"metadata.jsonl": b'[[["one"'}, "cannot be read"),
    ({"metadata.jsonl": b"[" * 100_000}, "cannot be read"),
    ({"metadata.jsonl": b"\xff\xfe"}, "cannot be read"),
    ({"metadata.csv": b"file_name,text\na.png\n"}, "b.png has no caption"),
    ({"metadata.csv": b"file_name,words\na.png,one\n"}, "has no column 'text'"),
    ({"metadata.jsonl": A.replace(b"a.png", b"sub/a.png")}, "do not match"),
    ({"a.txt": BOM + b"one", "b.txt": "two".encode("utf-16")}, "save it as text in UTF-8"),
    ({}, "--caption_column needs"),
]


@pytest.mark.parametrize(("given", "wanted"), CAPTIONS)
def test_captions(given, wanted, tmp_path):
    for name in "ab":
        shutil.copy(f"{PICTURES}/small.png", tmp_path / f"{name}.png")
    for name, content in given.items():
        (tmp_path / name).write_bytes(content)
    column = None if "b.txt" in given else "text"
    options = Settings(**(SMALL | {"instance_data_dir": str(tmp_path), "caption_column": column}))
    if isinstance(wanted, list):
        assert [row.caption for row in data.instance_rows(options)] == wanted
    else:
        with pytest.raises(DreamBoothError, match=wanted) as caught:
            data.instance_rows(options)
        assert str(caught.value).endswith(".")


def noted(folder) -> str:
    return data.passed_over(Settings(**(SMALL | {"instance_data_dir": str(folder)})))


def test_what_a_folder_holds_beside_pictures_is_counted_and_named(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "sub/e.png", "B.GIF", "c.tiff"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    for name in ("d.heic", ".DS_Store", "a.txt"):
        (tmp_path / name).write_text("x")
    assert [p.name for p in data.picture_files(tmp_path)] == ["B.GIF", "a.png", "c.tiff"]
    assert noted(tmp_path).startswith(f"Passed over in {tmp_path}: 2 (d.heic, sub/). Used are")
    assert noted(PICTURES) == ""
    for n in range(20):
        (tmp_path / f"{n:02}.heic").touch()
    assert ": 22 (00.heic, 01.heic," in noted(tmp_path) and ", ...)" in noted(tmp_path)


def test_a_second_training_into_a_folder_is_told_so_at_once(tmp_path, capsys):
    with files.lock(tmp_path / "out"):
        done = subprocess.run(
            [sys.executable, "-m", "sd3kit.dreambooth", *words(SMALL | {"output_dir": tmp_path / "out"})],
            env=environment(), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2 and "another command is writing into" in done.stderr
    assert "torchvision" not in done.stderr  # that is noted by a library when torch is there: it did not come so far
    assert [p.name for p in (tmp_path / "out").iterdir()] == [files.LOCK]
    assert run(tmp_path / "out", max_train_steps=1) == 0  # the lock went with its holder


def test_a_torchao_that_peft_cannot_use_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    def old():
        raise ImportError("Found version 0.10.0, but only versions above 0.16.0 are supported")

    monkeypatch.setattr(what_learns, "is_torchao_available", old)
    assert run(tmp_path / "out") == 2
    assert "pip install -U torchao" in one_sentence(capsys)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_weights_are_no_numbers_is_not_trained(tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(NANO, tmp_path / "nano")
    stored = next((tmp_path / "nano" / "transformer").glob("*.safetensors"))
    weights = load_file(stored)
    weights["pos_embed.proj.weight"].fill_(float("nan"))
    save_file(weights, stored, metadata={"format": "pt"})
    assert run(tmp_path / "out", pretrained_model_name_or_path=tmp_path / "nano") == 2
    sentence = one_sentence(capsys)
    assert "NaN" in sentence and "--learning_rate" not in sentence
    assert not list(tmp_path.glob("out/*.safetensors"))
