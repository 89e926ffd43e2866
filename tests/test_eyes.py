"""The check with people's eyes: the model card says what the stored reader named."""

import json

import pytest
from PIL import Image

from sd3kit.loading.names import NANO
from sd3kit.recipe import digest
from studies import eyes


def test_the_model_card_says_what_the_stored_reader_named(judge, tmp_path):
    """The judge's own shares need the pictures, and are left out here."""
    rows = [eyes.row(scene) for scene in eyes.asked(judge)]
    seen = dict.fromkeys(("subject", "style", "background", "text"), True)
    of = json.loads(eyes.ANSWERS.read_text(encoding="utf-8"))["weights"]
    (tmp_path / "asked.json").write_text(json.dumps({"weights": of, "rows": [row | {"judge": seen} for row in rows]}))
    found = {name: shares["reader"] for name, shares in eyes.compare(tmp_path).items()}
    card = " ".join((NANO / "README.md").read_text(encoding="utf-8").split())
    assert "subject of {share:.0%} (95% interval {low:.0%} to {high:.0%})".format(**found["subject"]) in card
    assert "style of {share:.0%} ({low:.0%} to {high:.0%})".format(**found["style"]) in card
    assert found["background"]["share"] == found["text"]["share"] == 1 and found["text"]["n"] == 16
    whole = found["not damaged"]
    assert f"called {round(whole['n'] * (1 - whole['share']))} of the {whole['n']} damaged" in card


def test_answers_are_compared_with_pictures_of_the_same_weights_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eyes, "load", lambda model: None)
    monkeypatch.setattr(eyes.evaluate, "pictures", lambda pipe, asked, **_: [Image.new("RGB", (128, 128))] * len(asked))
    assert eyes.main(["draw", str(tmp_path / "new" / "folder")]) == 0
    drawn = json.loads((tmp_path / "new" / "folder" / "asked.json").read_text())
    assert drawn["weights"] == digest.weights() and digest.weights() in capsys.readouterr().out
    answers = {"weights": "others", "rows": [row | {"i": i, "damaged": False} for i, row in enumerate(drawn["rows"])]}
    monkeypatch.setattr(eyes, "ANSWERS", tmp_path / "eyes.json")
    eyes.ANSWERS.write_text(json.dumps(answers))
    assert eyes.main(["compare", str(tmp_path / "new" / "folder")]) == 2
    said = capsys.readouterr().err
    assert "the answers" in said and "of others" in said and said.count("\n") == 1
    eyes.ANSWERS.write_text(json.dumps(answers | {"weights": drawn["weights"]}))
    assert eyes.main(["compare", str(tmp_path / "new" / "folder")]) == 0
    assert "subject reader 100%" in capsys.readouterr().out


@pytest.mark.parametrize(("what", "place", "words"), [("draw", "file", "a file is where"), ("compare", "none", "draw")])
def test_a_wrong_folder_is_told_at_once(tmp_path, monkeypatch, capsys, what, place, words):
    monkeypatch.setattr(eyes, "load", lambda model: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    assert eyes.main([what, str(tmp_path / place)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
