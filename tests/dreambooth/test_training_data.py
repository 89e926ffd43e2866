"""Pictures and captions: what is read, scaled, passed over and refused."""

import io
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import PICTURES, SMALL, losses, one_sentence, run

from sd3kit.dreambooth import DreamBoothError, Settings, data, subject
from sd3kit.errors import UserError
from sd3kit.loading.names import NANO


def test_the_stored_pictures_are_what_the_script_draws(tmp_path):
    subject.main(tmp_path)
    stored = sorted(p.name for p in Path(PICTURES).iterdir())
    assert stored == sorted(p.name for p in tmp_path.iterdir()) and len(stored) == 9
    for name in stored:
        if name.endswith(".png"):
            ours, theirs = (np.asarray(Image.open(f / name), np.int16) for f in (tmp_path, Path(PICTURES)))
            assert np.abs(ours - theirs).max() <= 8  # Pillow's versions may round an edge otherwise


def test_the_subject_varies_and_its_captions_say_how(tmp_path):
    """Pose, size and background differ, each picture is sharp at any size, and T5 reads every caption whole."""
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in (Path(PICTURES) / "metadata.jsonl").read_text().splitlines()]
    assert len({row["text"] for row in rows}) == 8 and len({scene[2] for scene in subject.SCENES.values()}) == 5
    tokenizer = AutoTokenizer.from_pretrained(NANO / "tokenizer_3")
    assert max(len(tokenizer(row["text"]).input_ids) for row in rows) <= 20  # as many as lesson 06 gives it
    alone = {name: np.asarray(subject.robot(**scene[1])) for name, scene in subject.SCENES.items() if name != "small"}
    tall = {pose: int(np.ptp(np.flatnonzero(pixels[..., 3].any(1)))) for pose, pixels in alone.items()}
    plain = alone.pop("standing").astype(int)
    assert all((np.abs(pixels - plain).max(-1) > 60).sum() > 300 for pixels in alone.values())
    assert tall["sitting"] < tall["waving"]
    subject.main(tmp_path, side=512)
    large, small = (Image.open(folder / "waving.png") for folder in (tmp_path, Path(PICTURES)))
    scaled = np.asarray(large.resize((128, 128), Image.Resampling.BOX), np.int16)
    assert large.size == (512, 512) and np.abs(scaled - np.asarray(small)).mean() < 3  # the same picture
    edges = [np.abs(np.diff(np.asarray(i.convert("L"), np.int16))).max() for i in (large, small.resize((512, 512)))]
    assert edges[0] > 2 * edges[1]  # and not scaled up


def test_the_judge_tells_the_robot_from_what_nano_knows(art):
    judge = subject.judge()
    assert all(subject.is_robot(judge, Image.open(p)) for p in Path(PICTURES).glob("*.png"))
    known = []
    for icon in ("robot", "frog", "octopus", "ghost", "star"):
        alone = Image.frombytes("RGBa", (160, 160), art[icon, "flat"].tobytes()).convert("RGBA").resize((110, 110))
        picture = Image.new("RGBA", (128, 128), "white")
        picture.alpha_composite(alone, (9, 9))
        known.append(subject.is_robot(judge, picture.convert("RGB")))
    assert known == [False] * 5
    assert judge.subject(subject.picture("leaning", "blue"))[0] == subject.NAME
    assert not subject.is_robot(judge, Image.new("RGB", (128, 128), "white"))


def test_latents_stay_with_their_captions(pipe):
    """Cached or not, in any order: the latent that comes with a caption is that of the caption's own picture."""
    options = Settings(**(SMALL | {"center_crop": True}))
    rows = data.instance_rows(options)
    samples = data.Samples([rows], options, 0, (16, 8, 8))
    samples.cache(pipe.vae)
    own = {row.caption: samples.cached[0][i][0] for i, row in enumerate(rows)}
    assert len(own) == 8
    for n in range(12):
        (part,) = samples[n]
        assert torch.equal(part["mean"], own[part["caption"]])
        pixels = data.to_pixels(next(r for r in rows if r.caption == part["caption"]).open(64), options, None)
        found = pipe.vae.encode(pixels[None].to(pipe.device)).latent_dist.mean[0].cpu()
        assert torch.allclose(found, part["mean"], atol=1e-4)
    assert sorted(samples.row(0, n) for n in range(8)) == list(range(8))


def test_pictures_that_are_always_the_same_are_encoded_once(tmp_path, pipe, plain):
    """Square ones that are not mirrored; a crop or a flip at random must be encoded anew."""
    Image.new("RGB", (90, 60)).save(tmp_path / "wide.png")
    square, wide = (dict(instance_data_dir=str(folder), caption_column=None) for folder in (PICTURES, tmp_path))
    for more, fixed in (
        (square, True),
        (square | {"random_flip": True}, False),
        (wide, False),
        (wide | {"center_crop": True}, True),
    ):
        options = Settings(**(SMALL | more))
        assert data.Samples([data.instance_rows(options)], options, 0, (16, 8, 8)).fixed() == fixed, more
    calls = []
    vae = types.SimpleNamespace(
        encode=lambda pixels: calls.append(1) or pipe.vae.encode(pixels), device=pipe.vae.device, dtype=None
    )
    options = Settings(**(SMALL | square | {"repeats": 3}))
    samples = data.Samples([data.instance_rows(options)], options, 0, (16, 8, 8))
    samples.cache(vae)
    assert len(calls) == 8 and len(samples.cached[0]) == 24  # a picture that counts three times is encoded once
    anew = tmp_path / "anew"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Samples, "fixed", lambda self: False)
        assert run(anew) == 0
    assert losses(plain) == pytest.approx(losses(anew), rel=1e-4)


def test_captions_of_text_files(tmp_path):
    for name in ("one", "two"):
        shutil.copy(f"{PICTURES}/small.png", tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n")
    (tmp_path / "one.txt").rename(tmp_path / "one.TXT")  # as some tools of Windows write it
    options = Settings(**(SMALL | {"instance_data_dir": str(tmp_path), "caption_column": None, "repeats": 2}))
    assert [row.caption for row in data.instance_rows(options)] == ["caption one"] * 2 + ["caption two"] * 2
    (tmp_path / "two.txt").unlink()
    with pytest.raises(DreamBoothError, match=r"two\.png has no caption"):
        data.instance_rows(options)
    (tmp_path / "two.txt").write_bytes("Grün".encode("latin-1"))
    with pytest.raises(DreamBoothError, match=r"two\.txt cannot be read: save it as text in UTF-8\.$"):
        data.instance_rows(options)


def test_a_folder_that_may_not_be_listed_is_one_sentence(tmp_path, monkeypatch, capsys):
    def refused(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refused)
    assert run(tmp_path / "out", instance_data_dir=tmp_path, caption_column=None) == 2
    assert "cannot be read (Permission denied)" in one_sentence(capsys)


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """With a stand-in for the package `datasets`, which is not a dependency."""

    class Table(dict):
        column_names = ("photo", "words", "number")

        def __len__(self):
            return 2

        def cast_column(self, column, kind):
            assert kind == "files" and column != "number"
            return self

    Image.new("L", (80, 80)).save(tmp_path / "gray.png")
    Image.new("RGBA", (80, 80), (0, 0, 0, 0)).save(clear := io.BytesIO(), "PNG")
    stored = [{"bytes": clear.getvalue(), "path": "clear.png"}, {"bytes": None, "path": str(tmp_path / "gray.png")}]
    table = Table(photo=stored, words=["one", ""])
    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = lambda name, config, cache_dir: {"train": table}
    stand_in.Image = lambda decode: "files" if decode is False else None
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    more = dict(instance_data_dir=None, dataset_name="someone/dogs", image_column="photo", caption_column="words")
    rows = data.instance_rows(Settings(**(SMALL | more)))
    assert [row.caption for row in rows] == ["one", "a sks robot"] and rows[1].open(64).mode == "RGB"
    assert rows[0].open(64).getpixel((0, 0)) == (255, 255, 255)  # on white, as a folder's pictures are

    def no_permission(*_, **__):
        raise PermissionError(13, "Permission denied", "/somewhere/datasets")

    with monkeypatch.context() as patch:
        patch.setattr(stand_in, "load_dataset", no_permission)
        with pytest.raises(DreamBoothError, match=r"no permission for /somewhere/datasets.*HF_HOME"):
            data.instance_rows(Settings(**(SMALL | more)))
    for column, phrase in (("picture", "has no column picture"), ("number", "holds no pictures")):
        with pytest.raises(DreamBoothError, match=phrase):
            data.instance_rows(Settings(**(SMALL | more | {"image_column": column})))
    for damaged in ({"bytes": clear.getvalue()[:60], "path": None}, None):
        stored[1] = damaged
        with pytest.raises(UserError, match="1 of someone/dogs cannot be read"):
            data.instance_rows(Settings(**(SMALL | more)))
