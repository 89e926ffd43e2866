"""Kills, full disks, two processes, NaN, damaged checkpoints: nothing made is lost."""

import json
import os
import types

import pytest
import torch
import warm
from runs import SMALL, environment, losses, one_sentence, run, words

from sd3kit import files
from sd3kit.dreambooth import DreamBoothError, Settings, reporting, saving
from sd3kit.dreambooth import train as training

KILLED = '''
import gc, json, os, random, signal, sys, time
from pathlib import Path
import torch
from sd3kit.dreambooth.__main__ import main
from sd3kit.dreambooth import train  # imported once; each run is a fork of this process
from sd3kit.dreambooth import model
from sd3kit.loading.pipeline import load
pipe = load("nano", device="cpu", quiet=True)  # read once; a fork has its own
model.load = train.load = lambda settings, accelerator, dtype, **more: type(pipe)(**pipe.components | {
    name: part for name, part in more.items() if name in pipe.components
})
gc.freeze()
arguments, out = json.loads(sys.argv[1]), sys.argv[2]

def fork(folder, before=lambda: None, resume=True):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        before()
        code, more = 1, ["--resume_from_checkpoint=latest"] if resume else []
        try:
            code = main([*arguments, f"--output_dir={folder}", *more])
        finally:
            os._exit(code)
    return child

def half_a_file():
    """The next time that a checkpoint's optimizer is written: half of it, then kill -9."""
    whole = torch.save
    def save(state, path, *args, **kwargs):
        whole(state, path, *args, **kwargs)
        if str(path).endswith("optimizer.bin"):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save

def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def updates():
    log = Path(out, "killed", "losses.jsonl")
    return len(log.read_text().splitlines()) if log.exists() else 0

assert wait(fork(f"{out}/unbroken", resume=False)) == 0
rng, codes, seen = random.Random(0), [], []
for i in range(10):
    child = fork(f"{out}/killed", half_a_file if i == 3 else lambda: None)
    if i != 3:  # at any moment: while it loads, or up to two updates on and a little later
        before, more = updates(), rng.choice((0, 1, 2))
        while updates() < before + more and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05 if more else 0.5))
        os.kill(child, signal.SIGKILL)
    codes.append(wait(child))
    whole = sorted(p for p in Path(out, "killed").glob("checkpoint-*"))
    seen.append({p.name: sorted(q.name for q in p.iterdir()) for p in whole})
codes.append(wait(fork(f"{out}/killed")))
print(json.dumps([codes, seen]))
'''


FEW = dict(lora_blocks="0", lora_layers="attn.to_q")  # what is set up and written in a moment


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_ten_kills_change_nothing(tmp_path):
    """kill -9 at ten moments, one of them while a checkpoint is written: the same losses and weights, bit for bit."""
    more = dict(
        max_train_steps=24, checkpointing_steps=2, checkpoints_total_limit=3, lora_dropout=0.2, random_flip=True
    )
    words_ = words(SMALL | FEW | more)
    done = warm.run("-c", KILLED, json.dumps(words_), tmp_path, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    codes, seen = json.loads(done.stdout.splitlines()[-1])
    assert codes == [-9] * 10 + [0], codes
    files = sorted(p.name for p in (tmp_path / "unbroken" / "checkpoint-24").iterdir())
    assert all(names == files for moment in seen for names in moment.values()), "a checkpoint was there in part"
    assert any(moment for moment in seen), "no kill came after a checkpoint"
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert (unbroken / "losses.jsonl").read_text() == (killed / "losses.jsonl").read_text()
    assert len(losses(killed)) == 24
    for name in ("pytorch_lora_weights.safetensors", "checkpoint-24/trained.safetensors"):
        assert (unbroken / name).read_bytes() == (killed / name).read_bytes()
    left = sorted(p.name for p in killed.iterdir() if "checkpoint" in p.name)
    assert left == ["checkpoint-20", "checkpoint-22", "checkpoint-24"]


def test_two_processes_equal_one_with_the_same_total_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3KIT_DEVICE", "cpu")  # as those of the launch: to compare with a GPU takes other margins
    more = FEW | dict(max_train_steps=3, checkpointing_steps=3, learning_rate=1e-3, random_flip=True)
    arguments = words(SMALL | more | {"output_dir": tmp_path / "two"})
    for done in warm.launch("sd3kit.dreambooth", *arguments, env=environment()):
        assert done.returncode == 0, done.stderr[-2000:]
    assert run(tmp_path / "one", **more, train_batch_size=2) == 0
    assert run(tmp_path / "accumulated", **more, gradient_accumulation_steps=2) == 0
    ranks = {name: len(list((tmp_path / name / "checkpoint-3").glob("random_states_*.pkl"))) for name in ("one", "two")}
    assert ranks == {"one": 1, "two": 2}  # there were two
    one, two, accumulated = (losses(tmp_path / name) for name in ("one", "two", "accumulated"))
    assert len(one) == 3 and one[0] != one[1]
    assert two == pytest.approx(one, rel=1e-4) and accumulated == pytest.approx(one, rel=1e-4)


def test_a_full_disk_keeps_what_was_saved(tmp_path, capsys):
    """A limit on the size of files stands for the full disk: the optimizer's state does not fit."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    more = dict(checkpointing_steps=1, rank=8)
    assert run(tmp_path, **(more | {"max_train_steps": 1})) == 0
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (tmp_path / "checkpoint-1" / "optimizer.bin").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2 + 40_000, hard))
    try:
        assert run(tmp_path, **more, resume_from_checkpoint="latest") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint could not be written" in one_sentence(capsys)
    assert [p.name for p in saving.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert run(tmp_path, **more, resume_from_checkpoint="latest") == 0
    assert [p.name for p in saving.checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    assert [p.name for p in tmp_path.glob(".*")] == [files.LOCK] and len(losses(tmp_path)) == 2


def test_a_loss_that_is_no_number_stops_the_training(tmp_path, capsys, monkeypatch):
    right, calls = training.flow_matching_loss, []

    def later_nan(*args):
        calls.append(1)
        return right(*args) * (float("nan") if len(calls) > 1 else 1)

    monkeypatch.setattr(training, "flow_matching_loss", later_nan)
    assert run(tmp_path, checkpointing_steps=1, max_train_steps=3) == 2
    assert "The loss is nan at step 2" in one_sentence(capsys)
    assert [p.name for p in saving.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not (tmp_path / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("steps", [2, 1])  # found by the checkpoint; by the result, where no checkpoint is due
def test_weights_that_are_no_numbers_are_not_saved(steps, tmp_path, capsys, monkeypatch):
    """A gradient that is NaN under a finite loss: the loss shows it only at the next step."""
    right = training.flow_matching_loss
    monkeypatch.setattr(training, "flow_matching_loss", lambda v, *more: right(v, *more) + (0 * v.sum()).sqrt())
    assert run(tmp_path, checkpointing_steps=1 if steps == 2 else 10, max_train_steps=steps) == 2
    assert "The trained weights hold NaN or infinity at step 1" in one_sentence(capsys)
    assert not list(tmp_path.glob("*checkpoint-*")) and not (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_a_full_device_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(torch.OutOfMemoryError), reporting.writing("A checkpoint", tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_damaged_checkpoint_is_answered(tmp_path, capsys):
    assert run(tmp_path, checkpointing_steps=1, max_train_steps=1, **FEW) == 0
    capsys.readouterr()
    log, progress = tmp_path / "losses.jsonl", tmp_path / "checkpoint-1" / "progress.json"
    whole = log.read_text(), progress.read_text()
    for path, phrase in ((log, "losses.jsonl is damaged"), (progress, "checkpoint-1 is damaged")):
        path.write_text('["step"]\n')
        assert run(tmp_path, resume_from_checkpoint="latest", **FEW) == 2
        assert phrase in one_sentence(capsys)
    log.write_text(whole[0])
    progress.write_text(whole[1])
    state = tmp_path / "checkpoint-1" / "optimizer.bin"
    state.write_bytes(state.read_bytes()[:1000])
    assert run(tmp_path, resume_from_checkpoint="checkpoint-1", **FEW) == 2
    assert "checkpoint-1 is damaged" in one_sentence(capsys)


def test_a_used_folder_keeps_its_checkpoints_until_another_branch_has_one(tmp_path, capsys):
    def names() -> list[str]:
        return [p.name for p in saving.checkpoints(tmp_path)]

    assert run(tmp_path, checkpointing_steps=1, max_train_steps=3, **FEW) == 0
    capsys.readouterr()
    for options, phrase in (
        ({}, "holds checkpoint-3: add --resume_from_checkpoint latest"),
        ({"train_batch_size": 2}, "was made with train_batch_size 1, not 2"),
        ({"gradient_accumulation_steps": 2}, "was made with gradient_accumulation_steps 1, not 2"),
        ({"seed": 5}, "was made with seed 0, not 5"),
    ):
        assert run(tmp_path, **FEW, **options, **({"resume_from_checkpoint": "latest"} if options else {})) == 2
        assert phrase in one_sentence(capsys)
    with pytest.raises(DreamBoothError, match="num_processes 1, not 2"):
        two = types.SimpleNamespace(num_processes=2)
        saving.read_progress(Settings(**SMALL), two, tmp_path / "checkpoint-1")
    assert names() == ["checkpoint-1", "checkpoint-2", "checkpoint-3"] and len(losses(tmp_path)) == 3

    more = FEW | dict(checkpointing_steps=1, checkpoints_total_limit=2, learning_rate=1e-5)
    assert run(tmp_path, **more, max_train_steps=1, resume_from_checkpoint="checkpoint-1") == 0
    assert names() == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]  # nothing new was written
    assert run(tmp_path, **more, max_train_steps=2, resume_from_checkpoint="checkpoint-1") == 0
    assert names() == ["checkpoint-1", "checkpoint-2"] and [p.name for p in tmp_path.glob(".*")] == [files.LOCK]
    rates = [json.loads(line)["lr"] for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert rates == [1e-4, 1e-5]  # a new rate counts at once


def test_checkpoints_of_another_program_are_left_alone(tmp_path, capsys):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "random_states_0.pkl").touch()  # as diffusers' script has it
    for resume in ({}, {"resume_from_checkpoint": "latest"}):
        assert run(tmp_path, **resume) == 2
        assert "holds checkpoint-7, which this command did not write" in one_sentence(capsys)
    assert run(tmp_path, resume_from_checkpoint="checkpoint-7") == 2
    assert "There is no whole checkpoint checkpoint-7" in one_sentence(capsys)
