"""Studies: rows are stored once, continued, spread, and say the same when they are measured again."""

import json
import os

import pytest
import warm

import sd3kit
import studies
from sd3kit import study
from sd3kit.dreambooth import subject
from studies import drawing, few, store, teaching, training
from studies.__main__ import STUDIES, main
from studies.store import Study


def counted(rows):
    calls = []

    def measure(row):
        calls.append(row)
        if row.get("dies"):
            raise KeyboardInterrupt
        return {"value": row["n"] ** 2}

    return Study("squares", rows, measure), calls


def test_rows_are_stored_and_not_measured_twice(tmp_path):
    one, calls = counted([{"n": 1}, {"n": 2}])
    store.run("squares", one, tmp_path)
    store.run("squares", one, tmp_path)
    assert len(calls) == 2
    stored = study.load("squares", tmp_path)
    assert [r["found"]["value"] for r in stored] == [1, 4]
    assert set(stored[0]) == {"row", "found", "weights", "stamp"}
    assert {"command", "date", "device", "versions"} <= set(stored[0]["stamp"])


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    cut, _ = counted([{"n": 1}, {"n": 2, "dies": True}])
    with pytest.raises(KeyboardInterrupt):
        store.run("squares", cut, tmp_path)
    whole, calls = counted([{"n": 1}, {"n": 2}])
    store.run("squares", whole, tmp_path)
    assert calls == [{"n": 2}]


def test_rows_of_other_weights_are_measured_again(tmp_path):
    one, calls = counted([{"n": 3}])
    store.run("squares", one, tmp_path)
    path = tmp_path / "squares.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "of another nano"}) + "\n")
    store.run("squares", one, tmp_path)
    assert len(calls) == 2 and len(study.load("squares", tmp_path)) == 1


def test_rows_are_kept_in_the_order_of_the_study(tmp_path):
    store.run("squares", counted([{"n": 2}])[0], tmp_path)
    store.run("squares", counted([{"n": 1}, {"n": 2}, {"n": 3}])[0], tmp_path)
    assert [r["row"]["n"] for r in study.load("squares", tmp_path)] == [1, 2, 3]


def test_two_processes_share_the_rows(tmp_path):
    script = (
        f"import os, pathlib, sys\nsys.path.append({os.path.dirname(next(iter(studies.__path__)))!r})\n"
        "from studies.store import Study, run\n"
        "rows = [{'n': n} for n in range(4)]\n"
        "run('squares', Study('', rows, lambda row: {'by': os.environ['RANK']}), pathlib.Path(sys.argv[1]))\n"
    )
    for done in warm.launch("-c", script, tmp_path):
        assert done.returncode == 0, done.stderr[-2000:]
    stored = study.load("squares", tmp_path)
    assert sorted((r["row"]["n"], r["found"]["by"]) for r in stored) == [(0, "0"), (1, "0"), (2, "1"), (3, "1")]


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    monkeypatch.setitem(STUDIES, "encoders", Study("", [{"n": 1}], lambda row: pytest.fail("measured")))
    assert main(["encoders", "--out", place]) == 2
    told = capsys.readouterr().err
    assert told.startswith("sd3kit: ") and told.count("\n") == 1


def test_what_is_not_stored_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m studies encoders"):
        study.load("encoders", tmp_path)


def test_an_unknown_study_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit):
        main(["nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def stored_rows(name):
    try:
        return study.load(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", STUDIES)
def test_stored_rows_are_complete_and_of_the_weights_at_hand(name):
    stored = stored_rows(name)
    assert [r["row"] for r in stored if r["row"] not in STUDIES[name].rows] == []
    assert all(any(r["row"] == row for r in stored) for row in STUDIES[name].rows)
    assert {r["weights"] for r in stored} == {store.weights(STUDIES[name].parts)}


def shares_agree(stored, measured, n):
    """Whether a share over fewer prompts is one that the stored share makes likely (four deviations)."""
    expected = stored["share"]
    return abs(measured["share"] - expected) <= 4 * max(expected * (1 - expected), 0.05) ** 0.5 / n**0.5


def stored_row(name, **row):
    return next(r["found"] for r in stored_rows(name) if r["row"] == row)


def test_encoders_measured_again_in_part():
    stored = stored_row("encoders", encoders="12")
    again = drawing.encoders({"encoders": "12"}, count=4)
    assert all(shares_agree(stored[name], again[name], again[name]["n"]) for name in stored)


def test_steps_measured_again_in_part():
    row = {"side": 128, "shift": 3.0, "steps": 14}
    stored, again = stored_row("steps", **row), drawing.steps(row, count=4)
    assert all(shares_agree(stored[name], again[name], 4) for name in ("background", "subject", "style"))
    assert again["each"] == pytest.approx(stored["each"][:4], rel=0.05, abs=2)  # the same prompts and seeds


def test_guidance_measured_again_in_part():
    stored = stored_row("guidance", **{"guidance scale": 7.0})
    assert drawing.guidance({"guidance scale": 7.0}, count=3)["each"] == pytest.approx(
        stored["each"][:3], rel=0.05, abs=2
    )


def test_decided_measured_again_in_part():
    stored, again = stored_row("decided", after=24), drawing.decided({"after": 24}, count=2)
    assert again["sigma"] == pytest.approx(stored["sigma"])
    assert all(shares_agree(stored[name], again[name], 2) for name in ("background", "subject", "text"))


def test_words_measured_again_in_part():
    row = {"method": "raw, mean of steps", "word": "the subject"}
    stored, again = stored_row("words", **row)["iou"], drawing.words(row, count=2)["iou"]
    assert again["low"] <= stored["high"] and again["high"] >= stored["low"]


def test_turbo_measured_again_in_part(turbo, judge, monkeypatch):
    monkeypatch.setattr(few, "ready", lambda model: (turbo, judge))
    row = {"model": "nano-turbo", "steps": 2, "guidance": 1.0}
    stored, again = stored_row("turbo", **row), few.turbo_row(row, count=3)
    for name in ("background", "subject", "style", "text", "sides", "count"):
        assert shares_agree(stored[name], again[name], again[name]["n"]), name
    assert turbo.scheduler.config.shift_terminal == 0.5, "as it was"


def test_ways_of_distilling_differ_in_target_and_path():
    losses, pipe = {}, sd3kit.load("nano", quiet=True)
    for way in few.WAYS[1:]:
        losses[way] = few.learn(pipe, way, steps=2, batch=1)
        assert pipe.get_list_adapters() == {"transformer": ["way"]}
        pipe.delete_adapters("way")
    guidance, teacher, own = losses.values()
    assert teacher[0] == pytest.approx(own[0], rel=1e-4) != pytest.approx(guidance[0], rel=1e-4)
    assert teacher[1] != pytest.approx(own[1], rel=1e-4)


@pytest.mark.night  # half a minute and more each
@pytest.mark.parametrize("name", ["samplers", "faults", "qk_norm"])
def test_a_training_study_gives_the_same_again(name):
    """One row, exactly: the same steps from the same seed. Rounding differs by machine, so not to the last digit."""
    measured = STUDIES[name]
    stored = next(r for r in stored_rows(name) if r["row"] == measured.rows[0])
    again = measured.measure(measured.rows[0])
    for key, value in stored["found"].items():
        assert again[key] == pytest.approx(value, rel=0.25), key


def test_the_mean_of_the_samplers_is_right():
    """Each sampler draws in 0..1, and lognorm(0, 1) and the uniform one have the mean that symmetry gives them."""
    for name, sampler in training.SAMPLERS.items():
        drawn = sampler(20_000)
        assert 0 <= drawn.min() and drawn.max() <= 1, name
    assert training.SAMPLERS["uniform"](20_000).mean() == pytest.approx(0.5, abs=0.01)
    assert training.SAMPLERS["lognorm(0, 1)"](20_000).mean() == pytest.approx(0.5, abs=0.01)
    assert training.SAMPLERS["lognorm(1, 0.6)"](20_000).mean() > 0.65


def test_dreambooth_measured_again_in_part(tmp_path):
    """The control again, with fewer pictures; and that what a training taught is in the pipeline that is measured."""
    row = {"change": "before", "seed": 0, "guidance": 7.0}
    stored, again = stored_row("dreambooth", **row), teaching.dreambooth(row, count=2)
    for name in ("our robot", "background", "others kept", "robots turned into it"):
        assert shares_agree(stored[name], again[name], again[name]["n"]), name
    assert again["drift"]["mean"] == 0
    taught = teaching.taught("base", 0, tmp_path, max_train_steps=2, train_batch_size=1, resolution=64)
    learnt = [value for name, value in taught.transformer.named_parameters() if "lora_B" in name]
    assert len(learnt) > 50 and any(value.abs().max() > 0 for value in learnt)


def test_shuffled_captions_leave_no_picture_its_own(tmp_path):
    mixed = teaching._pictures(tmp_path, shuffled=True, seed=1) / "metadata.jsonl"
    rows = [json.loads(line) for line in mixed.read_text().splitlines()]
    own = [json.loads(line) for line in (subject.PICTURES / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and {row["text"] for row in rows} == {row["text"] for row in own}
    assert all(
        row["file_name"] == mine["file_name"] and row["text"] != mine["text"]
        for row, mine in zip(rows, own, strict=True)
    )
