"""Pictures and captions: what is read, scaled, passed over and refused."""

import io
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import PICTURES, SMALL

from sd3kit.dreambooth import DreamBoothError, Settings, data, subject


def test_the_stored_pictures_are_what_the_script_draws(tmp_path):
    subject.main(tmp_path)
    stored = sorted(p.name for p in Path(PICTURES).iterdir())
    assert stored == sorted(p.name for p in tmp_path.iterdir()) and len(stored) == 6
    for name in stored:
        if name.endswith(".png"):
            ours, theirs = (np.asarray(Image.open(f / name), np.int16) for f in (tmp_path, Path(PICTURES)))
            assert np.abs(ours - theirs).max() <= 8  # Pillow's versions may round an edge otherwise


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
    assert not subject.is_robot(judge, Image.new("RGB", (128, 128), "white"))


def test_latents_stay_with_their_captions(pipe):
    """Cached or not, in any order: the latent that comes with a caption is that of the caption's own picture."""
    options = Settings(**(SMALL | {"center_crop": True}))
    rows = data.instance_rows(options)
    samples = data.Samples([rows], options, 0, (16, 8, 8))
    samples.cache(pipe.vae)
    own = {row.caption: samples.cached[0][i][0] for i, row in enumerate(rows)}
    assert len(own) == 5
    for n in range(12):
        (part,) = samples[n]
        assert torch.equal(part["mean"], own[part["caption"]])
        pixels = data.to_pixels(next(r for r in rows if r.caption == part["caption"]).open(), options, None)
        assert torch.allclose(pipe.vae.encode(pixels[None]).latent_dist.mean[0], part["mean"], atol=1e-4)
    assert sorted(samples.row(0, n) for n in range(5)) == [0, 1, 2, 3, 4]


def test_captions_of_text_files(tmp_path):
    for name in ("one", "two"):
        shutil.copy(f"{PICTURES}/pink.png", tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"caption {name}\n")
    options = Settings(**(SMALL | {"instance_data_dir": str(tmp_path), "caption_column": None, "repeats": 2}))
    assert [row.caption for row in data.instance_rows(options)] == ["caption one"] * 2 + ["caption two"] * 2
    (tmp_path / "two.txt").unlink()
    with pytest.raises(DreamBoothError, match=r"two\.png has no caption"):
        data.instance_rows(options)
    (tmp_path / "two.txt").write_bytes("Grün".encode("latin-1"))
    with pytest.raises(DreamBoothError, match=r"two\.txt cannot be read: save it as text in UTF-8\.$"):
        data.instance_rows(options)


def test_a_picture_may_be_larger_turned_and_transparent(tmp_path):
    image = Image.new("RGBA", (300, 200), (0, 0, 0, 0))
    image.save(tmp_path / "clear.png")
    assert data.open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (300, 200)).save(tmp_path / "turned.jpg", exif=exif)
    turned = data.open_picture(tmp_path / "turned.jpg")
    assert turned.size == (200, 300)
    pixels = data.to_pixels(turned, Settings(**(SMALL | {"random_flip": True})), data.generator(0, "crop", 0))
    assert pixels.shape == (3, 64, 64) and pixels.min() >= -1 and pixels.max() <= 1


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
    assert [row.caption for row in rows] == ["one", "a sks robot"] and rows[1].open().mode == "RGB"
    assert rows[0].open().getpixel((0, 0)) == (255, 255, 255)  # on white, as a folder's pictures are
    for column, phrase in (("picture", "has no column picture"), ("number", "holds no pictures")):
        with pytest.raises(DreamBoothError, match=phrase):
            data.instance_rows(Settings(**(SMALL | more | {"image_column": column})))
    for damaged in ({"bytes": clear.getvalue()[:60], "path": None}, None):
        stored[1] = damaged
        with pytest.raises(DreamBoothError, match="1 of someone/dogs cannot be read"):
            data.instance_rows(Settings(**(SMALL | more)))
