"""Accounted bytes and `fit`: what a reader relies on when choosing a setting by these figures."""

import functools

import pytest
import torch

from sd3kit import records
from sd3kit.measuring import account, fit
from sd3kit.measuring.recipes import RECIPES
from studies import accounting
from studies.bench import versions


@functools.cache
def accounted(model):
    return {r["row"]: r for r in records.read(records.RESULTS / "bytes.jsonl") if r["model"] == model}


def test_stored_bytes_are_recomputed():
    stored = accounted("medium")
    assert set(stored) == set(RECIPES)
    for name in ("model_offload_without_t5",):  # without the T5: quick to build
        again = accounting.peaks("medium", name)
        off = 0 if stored[name]["versions"]["torch"] == versions()["torch"] else 1e-6  # others round a little
        assert {key: stored[name][key] for key in again} == {
            key: pytest.approx(value, rel=off, abs=0) if isinstance(value, int) else value
            for key, value in again.items()
        }


def test_a_recipe_that_fails_is_a_line_of_the_table(tmp_path, monkeypatch, capsys):
    def peaks(model, recipe, size):
        if recipe == "default":
            raise ValueError("no such part")
        return {"device": 2**30, "host": 2**30}

    monkeypatch.setattr(accounting, "peaks", peaks)
    monkeypatch.setattr(accounting, "RECIPES", ["default", "model_offload"])
    for _ in range(2):  # then as it is stored
        assert accounting.main(["--model", "medium", "--out", str(tmp_path / "x.jsonl")]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2 and "no such part" in lines[0] and "GPU   1.00 GiB" in lines[1]


def test_the_accounting_explains_the_announcements_peaks():
    stored = accounted("medium")
    published = {r["row"]: r for r in records.read(records.RESULTS / "published.jsonl")}
    for name, tolerance in [("model_offload", 0.01), ("model_offload_without_t5", 0.02), ("default", 0.01)]:
        assert stored[name]["device"] / account.GIB == pytest.approx(published[name]["printed_gb"], rel=tolerance)


def test_the_accounting_explains_every_measured_peak_and_every_stored_byte():
    """What `fit` adds for its inaccuracy is `ACCURACY`."""
    stored, measured = accounted("medium"), records.stored("memory", "medium")
    assert len(measured) >= 8
    for r in measured:
        assert stored[r["row"]]["device"] == pytest.approx(r["device_peak"], rel=fit.ACCURACY - 1), r["row"]
        if r["row"] != "precomputed_prompt":  # its text encoders are gone when it is counted
            plan = RECIPES[r["row"]]
            parts = [part for part in account.PARTS if part not in plan.without]
            held = sum(
                account.weights("medium", part, plan.bits.get(part, 16), plan.every_linear, plan.skips)
                for part in parts
            )
            assert held == pytest.approx(r["stored_bytes"], rel=0.002), r["row"]


def test_decoding_sets_the_peak_of_quantised_rows_and_loading_does_not():
    """What the measured peaks have above the stored bytes is the decoder's share, the same in all of them."""
    measured = {r["row"]: r for r in records.stored("memory", "medium")}
    decoder = account.activations("medium", "vae")
    for name in ("default", "t5_int8", "all_nf4", "torchao_float8"):
        assert measured[name]["device_peak"] - measured[name]["stored_bytes"] == pytest.approx(decoder, rel=0.02)
        assert accounted("medium")[name]["loading"] < accounted("medium")[name]["device"]


def test_smaller_weights_and_fewer_parts_need_less():
    stored = {name: row["device"] for name, row in accounted("medium").items()}
    order = ["sequential_offload", "model_offload_without_t5", "model_offload", "t5_nf4", "t5_int8", "default"]
    peaks = [stored[name] for name in order]
    assert peaks == sorted(peaks)
    assert stored["vae_tiling"] < stored["default"]


def test_layers_that_a_recipe_skips_keep_their_bits():
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.Linear(10, 10, bias=False)
            self.to_q = torch.nn.Linear(10, 10, bias=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(account, "_part", lambda model, part: Small())
        assert account.weights("medium", "transformer", 8) == 200
        assert account.weights("medium", "transformer", 8, skips=("norm",)) == 300


def test_layerwise_casting_skips_what_diffusers_skips():
    from diffusers import SD3Transformer2DModel
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN

    named = {*DEFAULT_SKIP_MODULES_PATTERN, *SD3Transformer2DModel._skip_layerwise_casting_patterns}
    assert {name for name in named if "^" not in name} == set(RECIPES["layerwise_casting"].skips)


def test_accounting_refuses_unknown_names():
    with pytest.raises(ValueError, match="no recipe"):
        accounting.peaks("medium", "magic")
    with pytest.raises(ValueError, match="no model"):
        accounting.peaks("nano", "default")


# ---- fit ----------------------------------------------------------------------------------------------------------


# What one would tell a friend: (GiB on the GPU, of RAM), the recipe, and words of its reason.
FRIENDS = [
    ("medium", 6, 32, "encoders_offload_stream_tiled", "the same picture, but for traces of the decoder's tiles"),
    ("medium", 8, 32, "encoders_offload_stream", "the same picture; moves 25 GiB"),
    ("medium", 12, 32, "encoders_offload_stream", "1.5 times the default's time"),
    ("medium", 16, 32, "encoders_offload_stream", "Quicker: t5_int8, nearly the same picture: weights in 8 bits"),
    ("medium", 24, 32, "default", "the same picture; 1.24 s a picture"),
    ("medium", 15, 12.7, "prompt_apart", "Quicker: all_nf4, nearly the same picture"),  # a free Colab T4
    ("medium", 8, 16, "all_nf4_wo_tiled", "nearly the same picture: weights in 4 bits"),
    ("medium", 12, 16, "all_nf4", "1.2 times the default's time"),
    ("medium", 6, 16, "model_offload_without_t5", "another picture: the T5 is left out"),
    ("medium", 3, 32, "group_offload_stream", "Quicker: encoders_stream_nf4_tiled"),
    ("3.5-large", 24, 64, "encoders_offload_stream", "time not measured yet"),
    ("3.5-large", 12, 32, "all_nf4_wo", "weights in 4 bits"),
    ("3.5-large", 8, 32, "encoders_stream_nf4", "weights in 4 bits"),
    ("3.5-large", 48, 64, "default", "the same picture"),
    ("3.5-medium", 24, 32, "default", "the same picture"),
    ("3.5-medium", 8, 32, "encoders_offload_stream", "the same picture"),
]


@pytest.mark.parametrize(("model", "gpu", "ram", "recipe", "words"), FRIENDS)
def test_fit_says_what_one_would_tell_a_friend(model, gpu, ram, recipe, words):
    found = fit.fit(gpu, ram, model)
    assert found.recipe == recipe and words in str(found)
    assert found.gpu_gb <= gpu and found.ram_gb <= ram
    assert ("measured on" in found.source) == (found.seconds is not None)


def cuda_records(**rows):
    """Records of a CUDA machine by recipe: (seconds, GiB)."""
    base = {"model": "medium", "size": 1024, "device": "cuda", "machine": "some GPU", "host_peak": 0}
    return [
        base | {"row": name, "median": seconds, "device_peak": gib * account.GIB}
        for name, (seconds, gib) in rows.items()
    ]


def test_fit_takes_the_picture_first_then_measured_times():
    own = cuda_records(
        default=(2.0, 18.0), model_offload=(9.0, 12.0), t5_nf4=(2.5, 13.0), encoders_offload_stream=(9.5, 6.0)
    )
    assert fit.fit(24, 64, records=own).recipe == "default"
    assert fit.fit(16, 64, records=own).recipe == "model_offload", "the same picture, and quicker than streams there"
    assert "t5_nf4" in fit.fit(16, 64, records=own).quicker
    assert fit.fit(11, 64, records=own).recipe == "encoders_offload_stream"
    assert fit.fit(16, 64, records=own).source == "measured on some GPU"


def test_fit_leaves_out_what_failed_where_it_was_measured():
    own = cuda_records(default=(2.0, 18.0), model_offload=(9.0, 12.0))
    shared = {k: own[0][k] for k in ("model", "size", "device", "machine")}
    assert fit.fit(11, 64, records=own).recipe == "encoders_offload_stream"
    own.append(shared | {"row": "encoders_offload_stream", "raises": "X: y"})
    assert fit.fit(11, 64, records=own).recipe == "encoders_offload_stream_tiled"


def test_fit_minds_the_hosts_memory():
    """A free Colab T4: 15 GiB on the GPU, 12.7 of RAM, into which the float16 T5 does not fit on its way."""
    colab = fit.fit(15, 12.7)
    assert "text_encoder_3" in RECIPES[colab.recipe].straight
    own = cuda_records(model_offload=(9.0, 12.0), without_t5=(20.0, 7.0))
    assert fit.fit(12.2, 64, records=own).recipe == "model_offload"
    assert fit.fit(12.2, 12.7, records=own).recipe != "model_offload"


def test_fit_refuses_in_one_sentence():
    with pytest.raises(ValueError, match=r"No recipe fits SD3 medium into 0\.5 GiB") as error:
        fit.fit(0.5, 64)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    for gpu, ram in [(0, 8), (8, -1), (float("nan"), 8), ("8", 8), (True, 8)]:
        with pytest.raises(ValueError, match="positive number"):
            fit.fit(gpu, ram)
    with pytest.raises(ValueError, match="No bytes are stored"):
        fit.fit(24, 64, model="huge")
