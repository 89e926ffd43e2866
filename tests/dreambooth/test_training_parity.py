"""The comparison of losses with diffusers' script, on a stand-in that does what the script does, and on wrong ones."""

import pytest
from runs import one_sentence

from sd3kit import records
from sd3kit.dreambooth import parity

SCRIPT = """
import sys, torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel
torch.manual_seed(0)
model = SD3Transformer2DModel(
    sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
    caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=8,
)
x0 = torch.randn(2, 16, 8, 8)
noise = torch.randn_like(x0)
t = torch.tensor([300.0, 800.0])
sigma = (t / 1000).view(-1, 1, 1, 1)
x, words, pooled = (1 - sigma) * x0 + sigma * noise, torch.randn(2, 4, 16), torch.randn(2, 16)
said = model(hidden_states=x, timestep=t, encoder_hidden_states=words, pooled_projections=pooled, return_dict=False)[0]
error = said - (noise - x0)
if "--precondition_outputs=1" in sys.argv:
    error = sigma * error
Accelerator(cpu=True).backward(error.square().mean())
"""


@pytest.mark.parametrize(
    ("change", "code"), [(("", ""), 0), (("noise - x0)", "noise + x0)"), 1), (("sigma * error", "error"), 1)]
)
def test_a_script_with_another_loss_is_told(change, code, tmp_path, capsys):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace(*change) if change[0] else SCRIPT)
    assert parity.main([str(script), f"--out={tmp_path / 'parity.jsonl'}"]) == code
    rows = records.read(tmp_path / "parity.jsonl")
    assert [row["row"][-1] for row in rows] == ["0", "1"] and rows[0]["updates"][0]["noisy latents off by"] < 1e-5
    assert rows[0]["updates"][0]["ours"] > rows[1]["updates"][0]["ours"] > 0  # sigma squared is below 1
    assert "the script's loss and ours" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "phrase"),
    [("raise SystemExit('no data')", "did not run"), ("import nowhere", "did not run"), ("", "no update")],
)
def test_a_script_that_does_not_train_gets_one_sentence(text, phrase, tmp_path, capsys):
    (tmp_path / "script.py").write_text(text)
    assert parity.main([str(tmp_path / "script.py"), f"--out={tmp_path / 'parity.jsonl'}"]) == 2
    assert phrase in one_sentence(capsys)


def test_the_stored_comparison_is_of_equal_losses():
    rows = records.read(records.RESULTS / "parity.jsonl")
    assert [row["row"][-1] for row in rows] == ["0", "1"]
    pairs = [pair for row in rows for pair in row["updates"]]
    assert len(pairs) >= 6 and all(pair["ours"] == pytest.approx(pair["theirs"], rel=1e-4) for pair in pairs)
