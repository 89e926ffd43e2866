"""The check with people's eyes: the model card says what the stored reader named."""

import json

from sd3kit.loading.names import NANO
from studies import eyes


def test_the_model_card_says_what_the_stored_reader_named(judge, tmp_path):
    """The judge's own shares need the pictures, and are left out here."""
    rows = [eyes.row(scene) for scene in eyes.asked(judge)]
    seen = dict.fromkeys(("subject", "style", "background", "text"), True)
    (tmp_path / "asked.json").write_text(json.dumps([row | {"judge": seen} for row in rows]))
    found = {name: shares["reader"] for name, shares in eyes.compare(tmp_path).items()}
    card = " ".join((NANO / "README.md").read_text(encoding="utf-8").split())
    assert "subject of {share:.0%} (95% interval {low:.0%} to {high:.0%})".format(**found["subject"]) in card
    assert "style of {share:.0%} ({low:.0%} to {high:.0%})".format(**found["style"]) in card
    assert found["background"]["share"] == found["text"]["share"] == 1 and found["text"]["n"] == 16
    whole = found["not damaged"]
    assert f"called {round(whole['n'] * (1 - whole['share']))} of the {whole['n']} damaged" in card
