"""What a training leaves behind: whole or not there, sound, and of no use to another model."""

import types

import pytest
import torch
from diffusers import AutoencoderKL

from sd3kit.errors import UserError
from sd3kit.loading.names import NANO
from sd3kit.recipe import autoencoder, checkpoints, flow, text, training


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "flow.pt"
    checkpoints.save_whole({"step": 1}, path)

    def dies(state, part):
        part.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_whole({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_files_take_their_places_when_all_are_there(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("old")
    (tmp_path / "README.md").write_text("card")

    def write(dies):
        with checkpoints.whole_files(tmp_path) as part:
            for name in ("vae", "tokenizer"):
                (part / name).mkdir()
                (part / name / "config.json").write_text("new")
                if dies:
                    raise KeyboardInterrupt

    def seen():
        return {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*.json")}

    with pytest.raises(KeyboardInterrupt):
        write(dies=True)
    assert seen() == {"vae/config.json": "old"}
    write(dies=False)
    assert seen() == {"vae/config.json": "new", "tokenizer/config.json": "new"}
    assert (tmp_path / "README.md").read_text() == "card"


def test_a_model_s_mark_is_the_same_in_each_precision_and_after_saving():
    torch.manual_seed(0)
    weights = [torch.randn(500), torch.randn(8, 8).to(memory_format=torch.contiguous_format).T * 1e-6]
    saved = [w.half() for w in weights]
    same = [weights, saved, [w.float() for w in saved], [w.bfloat16() for w in saved]]
    assert len({checkpoints.mark(each) for each in same}) == 1
    assert checkpoints.mark([weights[0] * 1.01, weights[1]]) != checkpoints.mark(weights)


def test_a_checkpoint_of_another_start_is_refused(tmp_path, capsys):
    torch.manual_seed(0)
    model, path = torch.nn.Linear(4, 4), tmp_path / "flow.pt"
    average = training.Average(list(model.parameters()), 0.9)
    parts, start = {"model": model, "average": average}, {"transformer": checkpoints.mark(model.parameters())}
    average.values[0].add_(1)  # it has learnt
    checkpoints.save_parts(parts, path, began=start | {"guidance": "7"})
    assert checkpoints.restore_parts(parts, path, start | {"guidance": "7"})
    before = model.weight.clone()
    model.weight.data.zero_()
    with pytest.raises(UserError, match=r"this model \(other: transformer, guidance\): give another --work"):
        checkpoints.restore_parts(parts, path, {"transformer": "another", "guidance": "3"})
    assert not model.weight.any(), "nothing was loaded"
    made = {"transformer": checkpoints.mark(average.values), "guidance": "7"}
    assert made["transformer"] != start["transformer"]
    assert checkpoints.restore_parts(parts, path, made), "its result may have replaced its start"
    assert torch.equal(model.weight, before) and not capsys.readouterr().out
    checkpoints.save_parts(parts, path)  # as before checkpoints said what they began from
    assert checkpoints.restore_parts(parts, path, start)
    assert "does not say what it began from" in capsys.readouterr().out
    checkpoints.save_parts(parts, path, began="a mark of one piece, as decoder.pt had")
    with pytest.raises(UserError):
        checkpoints.restore_parts(parts, path, {"transformer": "another"})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_average_does_not_follow_what_is_not_finite(bad):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, average = torch.optim.Adam([weight]), training.Average([weight], 0.9)
    guard = training.Guard(average, optimizer)
    assert not guard.watch(0.3) and not guard.follow(torch.tensor(0.5)) and average.steps == 1
    weight.grad = torch.full((3,), bad)
    optimizer.step()
    assert not weight.isfinite().any() and not guard.follow(torch.tensor(bad), look=False)  # as on a GPU, in between
    assert guard.look(torch.tensor(bad))
    assert weight.tolist() == average.values[0].tolist() == [1.0] * 3 and not optimizer.state
    again = training.Guard(average, optimizer)
    again.load_state_dict(guard.state_dict())
    assert again.slower == 0.5 and again.best == 0.3
    with pytest.raises(UserError, match="at whatever rate"):
        for _ in range(20):
            again.follow(torch.tensor(bad))


class Stop(Exception):
    pass


@pytest.mark.parametrize("case", ["a loss that rose once", "a gradient that was not finite once"])
def test_a_training_goes_back_once_and_keeps_what_is_sound(case, tmp_path, monkeypatch):
    """Of a model of six weights, with invented losses and gradients. The checkpoint of step 299 is looked at, and what
    goes on from it."""
    vae, read, rose = AutoencoderKL(**autoencoder.CONFIG), text.Text(NANO), case.startswith("a loss")
    monkeypatch.setattr(flow, "transformer", lambda: torch.nn.Linear(2, 2))

    def optimizers(model, *rates):
        found = [torch.optim.AdamW([p], lr=rate) for p, rate in zip(model.parameters(), rates, strict=True)]
        for optimizer in found:
            optimizer.param_groups[0]["initial_lr"] = 0.01
        return found

    monkeypatch.setattr(flow, "optimizers", optimizers)
    still = types.SimpleNamespace(at_once=8, renew=lambda times=1: None)
    monkeypatch.setattr(flow, "Pool", lambda *given, **more: still)
    steps = 0

    def passes(model, text, nothing, pools, counts, lengths):
        nonlocal steps
        loss = 2.0 if rose and 110 <= steps < 200 else 0.3
        gradient = float("nan") if not rose and steps == 195 else 0.0
        steps += 1
        if steps > 301:
            raise Stop
        return torch.full((sum(counts),), loss), [torch.full_like(p, gradient) for p in model.parameters()]

    monkeypatch.setattr(flow, "passes", passes)

    def stored():
        with pytest.raises(Stop):
            flow.train(None, vae, read, tmp_path, 10, 4)
        return torch.load(tmp_path / "flow.pt", weights_only=True)

    found = stored()
    assert found["budget"]["steps"] == 299 and found["guard"]["slower"] == 0.5
    assert all(value.isfinite().all() for value in (*found["model"].values(), *found["average"]["values"]))
    steps = 200
    assert stored()["guard"]["slower"] == 0.5, "what goes on does so at its own rates"
