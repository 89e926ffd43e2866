"""Intervals, stamps, and rows in files: a study resumes, goes on, and loses nothing."""

import json

import pytest
import torch

from sd3kit import records
from sd3kit.errors import UserError


def test_wilson_agrees_with_published_values():
    # Newcombe 1998, table I, method 3 (score without continuity correction): 81/263, 15/148, 0/20, 1/29
    for right, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert records.wilson(right, total) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("right", "total"), [(1, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_what_is_no_share(right, total):
    with pytest.raises(ValueError, match="share"):
        records.wilson(right, total)


def test_a_stamp_says_where_and_how():
    stamp = records.stamp("make test")
    assert stamp["command"] == "make test"
    assert set(stamp) >= {"date", "device", "cores", "versions", "python"}
    assert stamp["versions"]["torch"] != "not installed"


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
    found = records.study(list(rows), lambda row: rows[row](), path, {"model": "x"}, "make it")
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

    with pytest.raises(KeyboardInterrupt):
        records.study("abc", row, path, {"steps": 2}, "")
    path.write_text(path.read_text() + '{"row": "b", "steps')  # and the machine stopped while writing
    found = records.study("abc", row, path, {"steps": 2}, "")
    assert calls == ["a", "b", "b", "c"], "a is not measured twice"
    assert [r["row"] for r in found] == list("abc")
    records.study("abc", row, path, {"steps": 3}, "")
    assert len(records.read(path)) == 6, "other steps are another measurement"


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"row": 1}\n{"row"\n{"row": 3}\n')
    with pytest.raises(UserError, match=r"Line 2 of .* is no record"):
        records.read(path)


def test_stored_records_are_those_of_the_newest_run_on_the_whole_memory(tmp_path):
    shared = dict(model="nano", weights="a", dtype="float32", size=128, steps=20, calls=10, cap_gb=None)
    shared |= dict(device="cpu", machine="here", threads=2, versions={"torch": "2"})
    changes = [{"machine": "there"}, {}, {"cap_gb": 4}, {"model": "medium"}, {}]
    lines = [json.dumps({"row": i} | shared | change) for i, change in enumerate(changes)]
    (tmp_path / "speed.jsonl").write_text("\n".join(lines))
    assert [r["row"] for r in records.stored("speed", "nano", tmp_path)] == [1, 4]
    assert records.stored("memory", "nano", tmp_path) == []


def test_an_error_ends_a_study_that_is_no_trial_and_what_was_measured_stays(tmp_path):
    def measure(row):
        return {"half": 1 / row}

    with pytest.raises(ZeroDivisionError):
        records.study([1, 0, 2], measure, tmp_path / "out.jsonl", {}, "", tries=False)
    assert [r["row"] for r in records.read(tmp_path / "out.jsonl")] == [1]


@pytest.mark.parametrize("name", ["", "no/such/folder/x.jsonl", "folder", "file/x.jsonl", "n" * 300])
def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    measured = []
    with pytest.raises(UserError) as error:
        records.study(["a"], measured.append, name, {}, "")
    assert not measured and "\n" not in str(error.value) and str(error.value).endswith(".")


def test_stored_records_are_whole():
    for path in records.RESULTS.glob("*.jsonl"):
        for record in records.read(path):
            assert record.get("row") and json.dumps(record)


def test_the_gpus_records_are_there_with_their_stamps():
    for study, count in (("memory", 8), ("speed", 3)):
        rows = records.stored(study, "medium")
        assert len(rows) >= count and {r["machine"] for r in rows} == {"NVIDIA H200"}
        assert all(r["stamp"]["device"] == "NVIDIA H200" and r["weights"] == "random" for r in rows)
