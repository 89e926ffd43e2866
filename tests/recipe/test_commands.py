"""The recipe's command line: what is wrong is said before the work, and each command asks for what its model knows."""

import json
import lzma
import shutil
import sys

import numpy as np
import pytest
from diffusers import AutoencoderKL, SD3Transformer2DModel

from sd3kit.loading.names import NANO
from sd3kit.recipe import __main__ as command
from sd3kit.recipe import art as art_module
from sd3kit.recipe import autoencoder, evaluate, flow, scenes, turbo
from sd3kit.recipe.judge import TEMPLATES, save_templates


def refused(capsys, *line) -> str:
    assert command.main([str(word) for word in line]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after the bars of what was loaded
    assert last.startswith("sd3kit: ")
    return last


@pytest.fixture
def quick(art, monkeypatch):
    """A training of the flow that draws few pictures and takes a step or two."""
    monkeypatch.setattr(flow, "PARTS", (flow.Part(("single",), 4),))
    monkeypatch.setattr(command, "Art", lambda folder: art)
    monkeypatch.setattr(autoencoder, "train", lambda *given, **more: pytest.fail("it begins anew"))


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_is_for_one_start_alone(tmp_path, capsys):
    work, out, other = (tmp_path / name for name in ("work", "out", "other"))
    shutil.copytree(NANO, other)
    model = SD3Transformer2DModel.from_pretrained(other / "transformer")
    model.proj_out.weight.data.mul_(1.01)
    model.save_pretrained(other / "transformer")
    line = ["train", "--work", work, "--out", out, "--subjects", "4", "--flow-minutes", "0.02", "--device", "cpu"]
    assert command.main([*map(str, line), "--start", str(NANO)]) == 0
    before = (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert "(other: transformer): give another --work" in refused(capsys, *line, "--start", other)
    assert "give its --start, or another --work" in refused(capsys, *line)
    assert command.main([*map(str, line), "--start", str(out)]) == 0  # what it made: the same training goes on
    assert "minutes are done" in capsys.readouterr().out
    assert (out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.fixture
def beside(art, tmp_path):
    """A pipeline's folder, empty, with the templates of four subjects beside it."""
    (tmp_path / "model_index.json").write_text("{}")
    save_templates(art, 4, tmp_path / TEMPLATES.name)
    return tmp_path


class Asked(Exception):
    def __init__(self, subjects):
        self.subjects = subjects


@pytest.mark.parametrize(
    "line",
    ["evaluate --model {} --no-floors", "sheets --model {} {}/out", "turbo --model {} --work {}/work --out {}/out",
     "polish --out {} --work {}/work"],
)  # fmt: skip
def test_each_command_knows_the_subjects_of_its_pipeline(line, beside, monkeypatch):
    def asked(subjects):
        raise Asked(subjects)

    monkeypatch.setattr(command, "load", lambda *given, **more: None)
    monkeypatch.setattr(command, "Art", lambda folder: None)
    monkeypatch.setattr(evaluate, "evaluate", lambda pipe, judge, **more: asked(len(judge.subjects)))
    monkeypatch.setattr(evaluate, "showcase", lambda pipe: None)
    monkeypatch.setattr(evaluate, "best_median_worst", lambda pipe, judge: asked(len(judge.subjects)))
    monkeypatch.setattr(turbo, "train", lambda *given, subjects, **more: asked(subjects))
    monkeypatch.setattr(autoencoder, "polish", lambda pipe, subjects, *given: asked(subjects))
    for expected in (4, 240):
        with pytest.raises(Asked) as found:
            command.main([word.format(beside) for word in line.split()])
        assert found.value.subjects == expected
        (beside / TEMPLATES.name).unlink(missing_ok=True)


def test_of_the_fewest_subjects_each_kind_has_something_held_out(rng, monkeypatch, capsys):
    monkeypatch.setattr(command, "train", lambda options: pytest.fail("it began"))
    assert "--subjects must be 4 to" in refused(capsys, "train", "--subjects", 3)
    for kind in evaluate.KINDS:
        assert scenes.is_held_out(scenes.random_scene(rng, scenes.SUBJECTS[:4], kind, held_out=True, spell=0))


@pytest.mark.parametrize("out", ["nano", "copy"])
def test_nano_s_own_folder_stays_without_templates_however_it_is_named(out, art, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "NANO", tmp_path / "nano")
    monkeypatch.setattr(command, "HERE", tmp_path / "recipe")
    monkeypatch.setattr(command, "Art", lambda folder: art)
    monkeypatch.setattr(flow, "train", lambda *given, **more: None)
    monkeypatch.setattr(flow, "export", lambda *given: None)
    for name in ("nano", "copy", "recipe"):
        (tmp_path / name).mkdir()
    assert command.main(["train", "--work", "w", "--out", out, "--start", str(NANO), "--subjects", "4"]) == 0
    found = {path.parent.name for path in tmp_path.glob("[!w]*/*")}
    assert found == {"recipe" if out == "nano" else "copy"}


def test_a_decoder_that_is_not_yet_whole_replaces_nothing(art, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(NANO, out)
    monkeypatch.setattr(command, "Art", lambda folder: art)
    monkeypatch.setattr(autoencoder, "polish", lambda pipe, *given: pipe.vae)
    save = AutoencoderKL.save_pretrained

    def killed(self, folder, **more):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    before = {path.name: path.read_bytes() for path in (out / "vae").iterdir()}
    line = ["polish", "--out", str(out), "--work", str(tmp_path / "work"), "--device", "cpu"]
    for how, code in ((killed, 130), (save, 0)):
        monkeypatch.setattr(AutoencoderKL, "save_pretrained", how)
        assert command.main(line) == code
        assert {path.name: path.read_bytes() for path in (out / "vae").iterdir()} == before


def test_a_record_is_kept_only_where_card_and_record_can_be_written(tmp_path, monkeypatch, capsys):
    card, record, drawn = tmp_path / "README.md", tmp_path / "evaluation.json", []
    stored = json.loads(command.RECORD.read_text(encoding="utf-8"))
    monkeypatch.setattr(command, "CARD", card)
    monkeypatch.setattr(command, "RECORD", record)
    monkeypatch.setattr(command, "load", lambda model: drawn.append(model))
    monkeypatch.setattr(evaluate, "evaluate", lambda *given, **more: stored)
    line = ("evaluate", "--store", "--no-floors", "--count", 2)
    for text in ("a card", f"{evaluate.CARD_END}\n{evaluate.CARD_START}", evaluate.CARD_START):
        card.write_text(text)
        assert "lacks the lines" in refused(capsys, *line)
        assert card.read_text() == text
    card.write_text(f"above\n{evaluate.CARD_START}\nold\n{evaluate.CARD_END}\nbelow\n")
    record.mkdir()
    assert "cannot be written" in refused(capsys, *line) and not drawn
    record.rmdir()
    assert command.main([*map(str, line)]) == 0 and drawn == ["nano"]
    assert json.loads(record.read_text())["command"].endswith("evaluate --count 2 --no-floors")
    assert card.read_text().startswith("above\n") and card.read_text().endswith("\nbelow\n")
    assert card.read_text().count("--no-floors") == 1 and "old" not in card.read_text()


def test_what_is_missing_or_wrong_is_said_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load", lambda *given, **more: pytest.fail("a model was loaded"))
    assert "--guidance must be 1 to 20, not nan" in refused(capsys, "turbo", "--guidance", "nan", "--work", tmp_path)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setattr(art_module, "fetch", lambda folder: pytest.fail("before anything is fetched"))
    assert "pip install resvg-py" in refused(capsys, "train", "--work", tmp_path / "work", "--out", tmp_path / "out")


def test_rendered_art_serves_as_long_as_its_pins(tmp_path, monkeypatch, capsys):
    keys = np.array([(subject.icon, style) for subject in scenes.SUBJECTS for style in scenes.STYLES])
    shown, cache = {"pixels": np.zeros((len(keys), 1, 1, 4), np.uint8), "keys": keys}, tmp_path / "icons.npz"
    monkeypatch.setattr(art_module, "vectors", lambda folder: pytest.fail("rendered anew"))
    for more in ({}, {"pins": art_module.pins()}):  # files that do not name their pins are of the first
        np.savez(cache, **shown, **more)
        assert len(art_module.Art(tmp_path)) == len(keys)
    monkeypatch.setattr(art_module, "vectors", lambda folder: (_ for _ in ()).throw(art_module.ArtError("anew")))
    package, integrity = art_module.SOURCES["noto"]
    monkeypatch.setitem(art_module.SOURCES, "noto", (package, integrity[::-1]))
    for more in ({}, {"pins": art_module.FIRST}):
        np.savez(cache, **shown, **more)
        with pytest.raises(art_module.ArtError, match="anew"):
            art_module.Art(tmp_path)
    assert cache.exists()


@pytest.mark.parametrize("case", ["cut", "changed", "of other pins"])
def test_packed_art_that_is_damaged_or_old_is_refused(case, tmp_path):
    packed = tmp_path / art_module.PACKED
    data = lzma.compress(json.dumps({"3d": {"icons": {}}, "pins": art_module.pins()}).encode())
    packed.write_bytes(data)
    assert list(art_module.vectors(tmp_path)) == ["3d"]
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
    other = lzma.compress(json.dumps({"3d": {}, "pins": "other"}).encode())
    packed.write_bytes({"cut": data[:-20], "changed": changed, "of other pins": other}[case])
    with pytest.raises(art_module.ArtError, match="damaged, or of other art"):
        art_module.vectors(tmp_path)


def test_the_help_says_what_is_replaced(capsys):
    for line in ("train", "polish", "turbo"):
        with pytest.raises(SystemExit):
            command.main([line, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "the package's own, which it replaces" in said and "checkpoints" in said
    assert all(name in command.__doc__ for name in ("train", "polish", "turbo", "pack", "evaluate", "sheets"))
