"""What works on SD3 in the diffusers that this project is tested with. A row that changes is news for lesson 05."""

import diffusers.hooks
import matrix
import pytest
import torch

from sd3kit import records

STORED = records.read(matrix.STORED)


def test_every_feature_has_its_rows():
    assert [(r["row"]["feature"], r["row"]["qk_norm"]) for r in STORED] == [
        (name, qk_norm) for name in matrix.FEATURES for qk_norm in (None, "rms_norm")
    ]
    assert {r["stamp"]["command"] for r in STORED} == {"python tests/measuring/matrix.py"}


@pytest.mark.parametrize("stored", STORED, ids=lambda r: f"{r['row']['feature']}-{r['row']['qk_norm']}")
def test_a_feature_does_what_is_stored(stored):
    name = stored["row"]["feature"]
    if name.startswith("torchao"):
        pytest.importorskip("torchao")
    if name == "sea_cache" and not hasattr(diffusers.hooks, "SeaCacheConfig"):
        pytest.skip(f"diffusers {diffusers.__version__} has no SeaCache")
    if torch.cuda.is_available() and stored["verdict"] == "raises" and not stored["cuda"]:
        pytest.skip("stored on a machine without a GPU, where this needs one or raises for another reason")
    found = matrix.outcome(name, stored["row"]["qk_norm"])
    assert found["verdict"] == stored["verdict"], found


def test_a_feature_without_effect_is_not_said_to_work(monkeypatch):
    nothing = matrix.Feature(lambda model: lambda: False, 1e-4, matrix.small, matrix.run)
    monkeypatch.setitem(matrix.FEATURES, "nothing", nothing)
    assert matrix.outcome("nothing", None)["verdict"] == "no effect"


def test_an_old_answer_is_seen(monkeypatch):
    def keeps_the_first(model):
        forward, kept = model.forward, []
        model.forward = lambda *inputs, **named: kept[0] if kept else kept.append(forward(*inputs, **named)) or kept[0]
        return lambda: "reuse"

    monkeypatch.setitem(matrix.FEATURES, "old", matrix.Feature(keeps_the_first, 1e-4, matrix.small, matrix.run))
    assert matrix.outcome("old", None)["verdict"] == "changes the result"


def test_first_block_cache_stops_at_the_last_block_even_in_a_context():
    assert "NoneType" in matrix.outcome("first_block_cache_in_a_context", None)["detail"]


def test_context_parallelism_wants_a_plan_that_sd3_does_not_have():
    assert "cp_plan" in matrix.outcome("context_parallel", None)["detail"]
