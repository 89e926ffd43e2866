"""Measuring, the recipes and `fit`: what a reader relies on when choosing a setting by these figures."""

import argparse
import json

import numpy as np
import pytest
import torch

from sd3kit import records
from sd3kit.command import measure as measure_command
from sd3kit.loading.names import NANO
from sd3kit.measuring import account, bench, protocol
from sd3kit.measuring.recipes import ENCODERS, RECIPES
from sd3kit.measuring.speedups import SPEEDUPS, BlockCache

PROMPT = "a fox on a blue background, flat"


# ---- the protocol ---------------------------------------------------------------------------------------------------


def test_warm_up_is_apart_and_calls_are_counted():
    seen = []
    record = protocol.timed(seen.append, n=4, warmup=2)
    assert seen == [0, 1, 0, 1, 2, 3]
    assert record["low"] <= record["median"] <= record["high"] and record["n"] == 4 and record["first"] is not None


@pytest.mark.parametrize(("n", "warmup"), [(0, 1), (1, -1)])
def test_timing_refuses_no_calls(n, warmup):
    with pytest.raises(ValueError, match="n >= 1"):
        protocol.timed(print, n=n, warmup=warmup)


def test_peak_sees_what_was_freed_again():
    def call():
        a = torch.zeros(25_000_000)  # 100 MB, gone before the end
        return float(a[0])

    layer = torch.nn.Linear(1000, 1000, bias=False)
    found = protocol.peak(call, [layer])
    assert found["result"] == 0.0
    assert 104e6 <= found["device_peak"] < 106e6, "4 MB of weights and 100 MB on top"
    assert found["host_peak"] > 100e6


def test_counting_agrees_with_arithmetic():
    layers = torch.nn.Sequential(torch.nn.Linear(30, 50, bias=False), torch.nn.Linear(50, 20, bias=False))
    x = torch.zeros(7, 30)
    counted = protocol.count(lambda: (layers(x), layers(x)), [layers])
    assert counted == {"operations": 2 * 2 * 7 * (30 * 50 + 50 * 20), "bytes": 2 * 4 * (30 * 50 + 50 * 20)}


def test_attention_is_counted():
    q = torch.zeros(1, 2, 16, 8)
    counted = protocol.count(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert counted["operations"] == 2 * 2 * (2 * 16 * 16 * 8)


def test_the_floor_is_the_higher_limit():
    limits = {"rate": 100.0, "bandwidth": 10.0}
    assert protocol.floor({"operations": 1000, "bytes": 1}, limits) == 10.0
    assert protocol.floor({"operations": 1, "bytes": 1000}, limits) == 100.0


def test_a_matrix_product_is_not_faster_than_the_floor():
    limits = protocol.machine("cpu", torch.float32)
    a = torch.randn(512, 512)
    counted = protocol.count(lambda: a @ a)
    record = protocol.timed(lambda i: a @ a, n=20, warmup=5)
    assert record["median"] > 0.5 * protocol.floor(counted, limits), (
        "the rate was measured too low, or the count is wrong"
    )


# ---- a study: resumes, goes on ---------------------------------------------------------------------------------------


def test_an_out_of_memory_is_a_result_and_the_run_goes_on(tmp_path):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore words")

    def broken():
        raise ValueError("no stream here")

    def full_on_cpu():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    path = tmp_path / "out.jsonl"
    rows = {"a": full, "b": broken, "c": full_on_cpu, "d": lambda: {"median": 1.0}}
    found = records.study(rows, path, {"model": "x"}, "make it")
    assert "Tried to allocate" in found[0]["out_of_memory"] and "raises" not in found[0]
    assert found[1]["raises"] == "ValueError: no stream here"
    assert "out_of_memory" in found[2]
    assert found[3]["median"] == 1.0 and found[3]["stamp"]["command"] == "make it"
    assert [r["row"] for r in records.read(path)] == list("abcd")


def test_a_run_that_was_cut_short_resumes(tmp_path):
    path, calls = tmp_path / "out.jsonl", []

    def row(name):
        if name == "b" and "b" not in calls:
            calls.append("b")
            raise KeyboardInterrupt
        calls.append(name)
        return {"median": len(calls)}

    rows = {name: lambda name=name: row(name) for name in "abc"}
    with pytest.raises(KeyboardInterrupt):
        records.study(rows, path, {"steps": 2}, "")
    path.write_text(path.read_text() + '{"row": "b", "steps')  # and the machine stopped while writing
    found = records.study(rows, path, {"steps": 2}, "")
    assert calls == ["a", "b", "b", "c"], "a is not measured twice"
    assert [r["row"] for r in found] == list("abc")
    records.study(rows, path, {"steps": 3}, "")
    assert len(records.read(path)) == 6, "other steps are another measurement"


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"row": 1}\n{"row"\n{"row": 3}\n')
    with pytest.raises(ValueError, match="Line 2"):
        records.read(path)


def test_stored_records_are_those_of_the_newest_run_on_the_whole_memory(tmp_path):
    shared = dict(model="nano", weights="a", dtype="float32", size=128, steps=20, calls=10, cap_gb=None)
    shared |= dict(device="cpu", machine="here", threads=2, versions={"torch": "2"})
    changes = [{"machine": "there"}, {}, {"cap_gb": 4}, {"model": "medium"}, {}]
    lines = [json.dumps({"row": i} | shared | change) for i, change in enumerate(changes)]
    (tmp_path / "speed.jsonl").write_text("\n".join(lines))
    assert [r["row"] for r in records.stored("speed", "nano", tmp_path)] == [1, 4]
    assert records.stored("memory", "nano", tmp_path) == []


# ---- accounting and fit ---------------------------------------------------------------------------------------------


def test_stored_bytes_are_recomputed():
    stored = {r["row"]: r for r in records.read(records.RESULTS / "bytes.jsonl") if r["model"] == "medium"}
    assert set(stored) == set(RECIPES)
    for name in ("model_offload_without_t5", "without_t5"):  # without the T5: quick to build
        again = account.peaks("medium", name)
        off = 0 if stored[name]["versions"]["torch"] == bench.versions()["torch"] else 1e-6  # others round a little
        assert {key: stored[name][key] for key in again} == {
            key: pytest.approx(value, rel=off, abs=0) if isinstance(value, int) else value
            for key, value in again.items()
        }


def test_the_accounting_explains_the_announcements_peaks():
    stored = {r["row"]: r for r in records.read(records.RESULTS / "bytes.jsonl") if r["model"] == "medium"}
    published = {r["row"]: r for r in records.read(records.RESULTS / "published.jsonl")}
    for name, tolerance in [("model_offload", 0.01), ("model_offload_without_t5", 0.03), ("default", 0.07)]:
        assert stored[name]["device"] / account.GIB == pytest.approx(published[name]["printed_gb"], rel=tolerance)


def test_smaller_weights_and_fewer_parts_need_less():
    stored = {r["row"]: r["device"] for r in records.read(records.RESULTS / "bytes.jsonl") if r["model"] == "medium"}
    order = ["sequential_offload", "model_offload_without_t5", "model_offload", "t5_nf4", "t5_int8", "default"]
    peaks = [stored[name] for name in order]
    assert peaks == sorted(peaks)
    assert stored["vae_tiling"] < stored["default"] == stored["vae_slicing"]


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
        account.peaks("medium", "magic")
    with pytest.raises(ValueError, match="no model"):
        account.peaks("nano", "default")


def cuda_records(**rows):
    """Records of a CUDA machine by recipe: (seconds, GiB)."""
    base = {"model": "medium", "size": 1024, "device": "cuda", "machine": "some GPU", "host_peak": 0}
    return [
        base | {"row": name, "median": seconds, "device_peak": gib * account.GIB}
        for name, (seconds, gib) in rows.items()
    ]


def test_fit_names_the_fastest_that_fits():
    own = cuda_records(
        default=(2.0, 18.0), model_offload=(9.0, 12.0), t5_nf4=(2.5, 13.0), sequential_offload=(40.0, 1.5)
    )
    assert account.fit(24, 64, records=own).recipe == "default"
    assert account.fit(16, 64, records=own).recipe == "t5_nf4"
    assert account.fit(12.5, 64, records=own).recipe == "model_offload"
    assert account.fit(4, 64, records=own).recipe == "sequential_offload"
    assert account.fit(16, 64, records=own).source == "measured on some GPU"


def test_fit_leaves_out_what_failed_where_it_was_measured():
    own = cuda_records(default=(2.0, 18.0), model_offload=(9.0, 12.0))
    own.append({k: own[0][k] for k in ("model", "size", "device", "machine")} | {"row": "t5_nf4", "raises": "X: y"})
    found = account.fit(16, 64, records=own)
    assert found.recipe == "model_offload" and "t5_nf4" not in found.untimed


def test_fit_minds_the_hosts_memory():
    """A free Colab T4: 15 GiB on the GPU, 12.7 of RAM, into which the float16 T5 does not fit on its way."""
    colab = account.fit(15, 12.7)
    assert colab.ram_gb <= 12.7 and colab.gpu_gb <= 15
    assert RECIPES[colab.recipe].without or RECIPES[colab.recipe].straight
    own = cuda_records(model_offload=(9.0, 12.0), without_t5=(20.0, 7.0))
    assert account.fit(13, 64, records=own).recipe == "model_offload"
    assert account.fit(13, 12.7, records=own).recipe == "without_t5"


def test_fit_refuses_in_one_sentence():
    with pytest.raises(ValueError, match="No recipe fits SD3 medium into 1 GiB") as error:
        account.fit(1, 64)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    for gpu, ram in [(0, 8), (8, -1), (float("nan"), 8), ("8", 8), (True, 8)]:
        with pytest.raises(ValueError, match="positive number"):
            account.fit(gpu, ram)
    with pytest.raises(ValueError, match="No bytes are stored"):
        account.fit(24, 64, model="huge")


# ---- the recipes on a processor --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """A bench as the command makes it: two steps, one call."""
    parser = argparse.ArgumentParser()
    measure_command.add_parser(parser.add_subparsers(dest="command"))
    options = parser.parse_args(["measure", "memory", "--model", "nano", "--steps", "2", "--calls", "1"])
    made = bench.Bench(options, "nano", str(NANO), "cpu")
    made.reference()
    return made


# What must come out, as the root mean square distance to the default's picture in levels of 255 after two steps.
EXACT = (
    "precomputed_prompt",
    "group_offload_block",
    "group_offload_leaf",
    "group_offload_disk",
    "sharded",
    "vae_slicing",
)
NEAR = {"t5_int8": 2, "t5_nf4": 5, "torchao_int8": 5, "torchao_float8": 10, "layerwise_casting": 10, "vae_tiling": 20}


@pytest.mark.parametrize("name", [*EXACT, *NEAR])
def test_a_recipe_that_runs_on_a_processor_draws_the_defaults_picture(runner, name):
    if name in ("t5_int8", "t5_nf4"):
        pytest.importorskip("bitsandbytes")
    if name.startswith("torchao"):
        pytest.importorskip("torchao")
    pipe, inputs = runner.make(RECIPES[name])
    picture = runner.draw(pipe, 0, inputs)
    far = bench.distance([picture], runner.reference()[0])
    assert far <= (0.5 if name in EXACT else NEAR[name])
    stored = protocol.stored_bytes(*bench._modules(pipe))
    whole = protocol.stored_bytes(*bench._modules(runner.make(RECIPES["default"])[0]))
    if RECIPES[name].bits or name == "precomputed_prompt":
        assert stored < 0.99 * whole, "it must store less"
        assert far > 0 or name in ("t5_int8", "precomputed_prompt"), "fewer bits leave a trace"


def test_encoding_beforehand_is_timed_and_counts_for_the_peak(runner):
    record = runner.row("precomputed_prompt")
    assert record["encoding"] > 0
    encoders = [getattr(runner.make(RECIPES["default"])[0], part) for part in ENCODERS]
    assert record["device_peak"] >= protocol.stored_bytes(*encoders)
    assert "encoding" not in runner.row("without_t5")


def test_the_t5_in_eight_bits_keeps_its_wo_layers(runner):
    pytest.importorskip("bitsandbytes")
    pipe, _ = runner.make(RECIPES["t5_int8"])
    kinds = {
        n.rpartition(".")[2]: m.weight.dtype for n, m in pipe.text_encoder_3.named_modules() if hasattr(m, "weight")
    }
    assert kinds["q"] == torch.int8 and kinds["wo"] == torch.float32
    scales = 4 * sum(m.out_features for m in pipe.text_encoder_3.modules() if m.__class__.__name__ == "Linear8bitLt")
    tensors = sum(t.untyped_storage().nbytes() for t in {*pipe.text_encoder_3.parameters()})
    before = protocol.stored_bytes(pipe.text_encoder_3)
    runner.draw(pipe, 0)  # the first run moves the scales elsewhere
    assert before == protocol.stored_bytes(pipe.text_encoder_3) == tensors + scales


def test_tiling_at_the_models_own_size_does_nothing(runner):
    pipe, _ = runner.make(RECIPES["default"])
    pipe.vae.enable_tiling()
    assert bench.distance([runner.draw(pipe, 0)], runner.reference()[0]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and they work")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model_offload", "requires accelerator"),
        ("sequential_offload", "requires accelerator"),
        ("group_offload_stream", "streams"),
        ("encoders_offload_stream", "streams"),
        ("transformer_nf4", "GPU"),
    ],
)
def test_what_needs_an_accelerator_says_so(runner, name, words):
    with pytest.raises((RuntimeError, ValueError), match=words):
        runner.make(RECIPES[name])


# ---- the speed-ups ---------------------------------------------------------------------------------------------------


def test_half_guidance_stays_near_and_does_less(runner):
    pipe, _ = runner.make(RECIPES["default"])
    batches = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    runner.draw(pipe, 0, **SPEEDUPS["half_guidance"](pipe), num_inference_steps=4)
    assert batches == [2, 2, 1, 1]


def test_the_block_cache_is_exact_at_zero_and_skips_above(runner):
    for threshold, skips in ((0.0, False), (10.0, True)):
        pipe, _ = runner.make(RECIPES["default"])
        cache = BlockCache(pipe.transformer.transformer_blocks, threshold)
        pipe.transformer.transformer_blocks = torch.nn.ModuleList([cache])
        far = bench.distance([runner.draw(pipe, 0)], runner.reference()[0])
        assert (cache.skipped > 0) == skips and (far > 0) == skips


def test_broadcast_attention_is_left_out_in_some_steps_and_forgotten_after_a_picture(runner):
    pipe, _ = runner.make(RECIPES["default"])
    plain = runner.draw(pipe, 0, num_inference_steps=8)
    extra, calls = SPEEDUPS["attention_broadcast"](pipe), []
    pipe.transformer.transformer_blocks[1].attn.to_q.register_forward_pre_hook(lambda *_: calls.append(1))
    first, second = (runner.draw(pipe, 0, num_inference_steps=8, **extra) for _ in range(2))
    assert len(calls) in range(8, 15) and len(calls) % 2 == 0, "the same steps were left out of both pictures"
    assert bench.distance([first], [second]) == 0 < bench.distance([first], [plain]) < 60


def test_fused_qkv_is_exact_only_without_qk_norm():
    """diffusers 0.42.1; an update that mends it fails this test, and lesson 05 is to be changed."""
    from diffusers import SD3Transformer2DModel

    inputs = torch.randn(1, 16, 8, 8), torch.randn(1, 5, 32), torch.randn(1, 32), torch.tensor([500.0])
    for qk_norm, exact in ((None, True), ("rms_norm", False)):
        torch.manual_seed(0)
        model = SD3Transformer2DModel(
            sample_size=8, num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            caption_projection_dim=32, pooled_projection_dim=32, pos_embed_max_size=8, qk_norm=qk_norm,
        ).eval()  # fmt: skip
        with torch.no_grad():
            plain = model(*inputs).sample
            model.fuse_qkv_projections()
            assert torch.allclose(model(*inputs).sample, plain, atol=1e-5) == exact


# ---- the command -----------------------------------------------------------------------------------------------------


def call(arguments):
    parser = argparse.ArgumentParser()
    measure_command.add_parser(parser.add_subparsers(dest="command"))
    return bench.run(parser.parse_args(["measure", *arguments]))


def test_a_row_is_kept_where_eager_after_it_does_not_fit(runner, monkeypatch):
    moments = iter([2.0, torch.OutOfMemoryError("full")])

    def eager():
        moment = next(moments)
        if isinstance(moment, Exception):
            raise moment
        return moment

    monkeypatch.setattr(runner, "options", argparse.Namespace(**vars(runner.options) | {"study": "speed"}))
    monkeypatch.setattr(runner, "reference", lambda: None)
    monkeypatch.setattr(runner, "_eager", eager)
    monkeypatch.setattr(runner, "_row", lambda name: {"median": 1.0})
    assert runner.row("compiled") == {"median": 1.0, "eager": [2.0]}
    assert bench.of_eager({"median": 1.0, "eager": [2.0, 4.0]}) == (1 / 3, 0.25, 0.5)


def test_the_command_measures_and_resumes(tmp_path, capsys):
    path = tmp_path / "speed.jsonl"
    arguments = ["speed", "--rows", "eager", "cuda_graphs", "--steps", "1", "--calls", "2", "--warmup", "1"]
    assert call([*arguments, "--out", str(path)]) == 0
    eager, graphs = records.read(path)
    assert eager["n"] == 2 and eager["distance"] == 0 and eager["model"] == "nano" and eager["steps"] == 1
    assert eager["floor"] < eager["median"] < 60 and eager["device_peak"] > eager["stored_bytes"] > 40e6
    assert len(eager["eager"]) == 2 and 0.2 < bench.of_eager(eager)[0] < 5, "eager beside itself is the control"
    assert set(eager["right"]) == {"share", "low", "high", "n"} and eager["stamp"]["command"].startswith(
        "sd3kit measure"
    )
    if not torch.cuda.is_available():
        assert "CUDA" in graphs["raises"]
    before = path.read_text()
    assert call([*arguments, "--out", str(path)]) == 0
    assert path.read_text() == before, "nothing was measured twice"
    assert "floor" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["memory", "--rows", "magic"], "no row 'magic'"),
        (["memory", "--steps", "0"], "1 or more"),
        (["bytes", "--model", "nano"], "are accounted for medium"),
        (["memory", "--size", "100"], "divisible by 16"),
        (["speed", "--out", "no/such/folder/x.jsonl"], "no folder"),
        pytest.param(
            ["memory", "--cap-gb", "4"],
            "needs a CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here"),
        ),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments, words):
    with pytest.raises(bench.StudyError, match=words) as error:
        call(arguments)
    assert "\n" not in str(error.value)


def test_distance_is_in_levels():
    black, gray = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 10, np.uint8)
    assert bench.distance([gray], [black]) == 10.0


def test_stored_records_are_whole():
    for path in records.RESULTS.glob("*.jsonl"):
        for record in records.read(path):
            assert record.get("row") and json.dumps(record)
