"""The measurement of seats: kernels that draw at once, and the table of the teachers' page."""

import json
import re
import signal
from pathlib import Path

import pytest

from sd3kit import records
from studies import seats


@pytest.mark.night  # two kernels with libraries of their own
def test_two_learners_draw_at_once(tmp_path, capsys):
    out = tmp_path / "seats.jsonl"
    assert seats.main(["--learners", "2", "--pictures", "1", "--model", "nano", "--out", str(out)]) == 0
    [record] = [json.loads(line) for line in out.read_text().splitlines()]
    assert record["learners"] == record["n"] == 2
    assert 0 < record["low"] <= record["seconds"] <= record["high"]
    assert 10**8 < record["bytes"] <= record["bytes_high"] < 10**10
    assert record["stamp"]["command"] == "python -m studies.seats --pictures 1 --threads 1 --model nano"
    assert re.search(r"\| 2 \| [\d.]+ \(.*\), n = 2 \| [\d.]+ GiB \|", capsys.readouterr().out)


def test_a_row_is_of_its_model_and_versions(tmp_path, monkeypatch, capsys):
    measured, out = [], tmp_path / "seats.jsonl"
    figures = {"learners": 1, "seconds": 1.0, "low": 1.0, "high": 1.0, "n": 1, "bytes": 2**30}
    monkeypatch.setattr(seats, "seats", lambda n, **given: measured.append(given["model"]) or figures)
    for model in ("nano", "nano-turbo", "nano-turbo"):
        monkeypatch.setenv("SD3KIT_MODEL", model)
        assert seats.main(["--learners", "1", "--out", str(out)]) == 0
    assert measured == ["nano", "nano-turbo"]
    monkeypatch.setattr(records, "versions", lambda *names: dict.fromkeys(names, "another"))
    assert seats.main(["--learners", "1", "--out", str(out)]) == 0
    assert measured == ["nano", "nano-turbo", "nano-turbo"]
    assert [r["model"] for r in records.read(out)] == measured
    assert records.read(out)[-1]["stamp"]["command"].endswith("--model nano-turbo")


@pytest.mark.night  # nbclient can wait for ever for an answer that a busy machine lost
def test_a_kernel_that_is_killed_or_fails_is_noticed():
    with seats.learner(threads=1) as run:
        assert run("print(1 + 1)") == "2\n"
        with pytest.raises(RuntimeError, match="kernel failed: ZeroDivisionError"):
            run("1 / 0")
        with pytest.raises(RuntimeError, match="kernel was killed"):
            run(f"import os; os.kill(os.getpid(), {int(getattr(signal, 'SIGKILL', signal.SIGTERM))})")


def test_the_teachers_page_shows_the_stored_record():
    page = (Path(__file__).parents[1] / "TEACHING.md").read_text(encoding="utf-8")
    assert seats.report(records.read(records.RESULTS / "seats.jsonl")) in page
