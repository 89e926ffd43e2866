"""The recipe in small: it learns, it continues where it stopped, and checkpoints are whole or not there."""

import contextlib
import functools
import io
import json
import random
import tarfile

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sd3kit.errors import UserError
from sd3kit.loading.names import NANO
from sd3kit.recipe import __main__ as command
from sd3kit.recipe import art as art_module
from sd3kit.recipe import autoencoder, evaluate, flow, pool, reading, scenes, text, training, turbo
from sd3kit.recipe.judge import Judge


def test_the_average_follows_and_swaps_back():
    weight = torch.nn.Parameter(torch.zeros(1))
    average = training.Average([weight], 0.9)
    for _ in range(200):
        weight.data.fill_(1.0)
        average.update()
    weight.data.fill_(5.0)
    average.swap()
    assert weight.item() == pytest.approx(1.0, abs=1e-3)
    average.swap()
    assert weight.item() == 5.0


def test_the_learning_rate_falls_only_at_the_end():
    assert training.cosine(0.0, 0.6, 0.02) == training.cosine(0.6, 0.6, 0.02) == 1
    assert training.cosine(1.0, 0.6, 0.02) == pytest.approx(0.02)
    assert 0.02 < training.cosine(0.8, 0.6, 0.02) < 1


@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 0.9999), (torch.float32, 0.999)])
def test_muon_on_stacks_takes_torchs_steps(dtype, near):
    """To bfloat16's precision, also with a state that torch's left and with another rate; torch reads its state."""
    torch.manual_seed(0)
    shapes = [(32, 64), (64, 32), (48, 48), (32, 64), (48, 48)]
    start, pushes = [torch.randn(shape) for shape in shapes], [[torch.randn(s) for s in shapes] for _ in range(4)]
    torchs = dict(lr=0.02, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    ends = []
    for kinds in ((torch.optim.Muon, torch.optim.Muon), (torch.optim.Muon, training.Muon), (training.Muon,) * 2):
        weights, state = [torch.nn.Parameter(x.clone()) for x in start], None
        for kind, gradients in zip(kinds, (pushes[:2], pushes[2:]), strict=True):
            muon = kind(weights, **torchs) if kind is torch.optim.Muon else kind(weights, 0.02, dtype)
            if state:
                muon.load_state_dict(state)
                muon.param_groups[0]["lr"] = 0.01
            for push in gradients:
                for weight, gradient in zip(weights, push, strict=True):
                    weight.grad = gradient.clone()
                muon.step()
            state = muon.state_dict()
        ends.append([(weight.detach() - x).flatten() for weight, x in zip(weights, start, strict=True)])
    for other in ends[1:]:
        for one, two in zip(ends[0], other, strict=True):
            assert torch.cosine_similarity(one, two, dim=0) > near
            assert two.norm() == pytest.approx(one.norm(), rel=0.01)
    torch.optim.Muon(weights, **torchs).load_state_dict(state)
    stack = torch.randn(3, 64, 32)  # together as on a GPU, or one at a time as on a CPU
    how = (3.4445, -4.775, 2.0315), 4, 1e-7
    together, apart = training.orthogonal(stack, *how), training.orthogonal(stack[1:2], *how)
    torch.testing.assert_close(together[1:2], apart)
    assert 0.5 < torch.linalg.svdvals(together).min() and torch.linalg.svdvals(together).max() < 1.3


class Seen(TorchDispatchMode):
    """Notes each operation on a tensor of the CPU while it lasts."""

    def __init__(self):
        super().__init__()
        self.on_cpu = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = operation(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, given)) if isinstance(x, torch.Tensor)]
        self.on_cpu += [str(operation) for x in tensors if x.device.type == "cpu"]
        return given


def test_what_a_gpu_replays_neither_waits_nor_copies(monkeypatch, pipe):
    """On tensors without numbers, of which none can be read: a CUDA graph holds only what the GPU does alone."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # none on these tensors
    with torch.device("meta"):
        vae, read = AutoencoderKL(**autoencoder.CONFIG), text.Text.of(pipe)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            encoder = getattr(read, name)
            setattr(read, name, type(encoder)(encoder.config).requires_grad_(False))
        model = SD3Transformer2DModel.from_config(flow.transformer().config | {"num_layers": 1})
    pools = [pool.Pool(None, vae, read, [], (), 128) for _ in flow.PARTS]
    nothing = [torch.zeros(1, 3, dtype=torch.long, device="meta") for _ in range(2)]
    with Seen() as seen:
        found, gradients = flow.passes(model, read, nothing, pools, (6, 2), (0, 0))
    assert found.shape == (8,) and not seen.on_cpu
    assert [g.shape for g in gradients] == [p.shape for p in model.parameters()]


@pytest.mark.gpu
def test_a_replayed_function_reads_and_draws_anew():
    given = torch.zeros(2, device="cuda")
    replayed = training.Replayed(lambda n: (given.repeat(n), torch.rand(2, device="cuda")))
    twice, first = (x.clone() for x in replayed(2))
    given.fill_(5)
    for n in (2, 1):
        same, other = replayed(n)
        assert same.tolist() == [5.0] * 2 * n and not torch.equal(first, other)
    assert twice.tolist() == [0.0] * 4 and len(replayed.graphs) == 2


def half_of_a_training(rank: int, folder: str) -> None:
    """One of two processes: its gradient is its rank, 0 or 1."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = torch.nn.Linear(3, 2, bias=False)
    model.weight.grad = torch.full((2, 3), float(rank))
    training.average_gradients(model)
    assert training.process() == (rank, 2)
    torch.save([model.weight.grad, training.same(5.0 + rank)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_one_model(tmp_path):
    torch.multiprocessing.start_processes(half_of_a_training, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in (0, 1):
        gradient, told = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(gradient, torch.full((2, 3), 0.5)) and told == 5.0
    assert training.process() == (0, 1) and training.same(3.5) == 3.5, "alone"


def test_pca_code_reconstructs_patches(art, rng):
    pictures = art_module.to_tensor([autoencoder.random_picture(art, rng) for _ in range(64)])
    mean, projection = autoencoder.fit_pca(pictures)
    patches = autoencoder._patches(pictures).reshape(-1, 192) - mean
    code = patches @ projection
    back = code @ torch.linalg.lstsq(code, patches).solution
    assert (patches - back).square().mean() < 0.05 * patches.square().mean()


@pytest.fixture
def vae(tmp_path):
    AutoencoderKL(**autoencoder.CONFIG).save_pretrained(tmp_path / "vae")
    return AutoencoderKL.from_pretrained(tmp_path / "vae")


@pytest.fixture
def few_scenes(monkeypatch):
    """Pools that begin with a few scenes, in place of hundreds."""
    monkeypatch.setattr(pool.Pool, "renew", lambda self, times=1, renew=pool.Pool.renew: renew(self, min(times, 2)))


@pytest.mark.usefixtures("few_scenes")
def test_the_recipe_learns_continues_and_saves_a_pipeline(art, vae, device, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "PARTS", (flow.Part(("single",), 4), flow.Part(("sign",), 4)))
    read = text.Text(tmp_path)

    def run(minutes):
        flow.export(flow.train(art, vae, read, tmp_path, minutes, 4, device=device), read, vae, tmp_path / "out")
        return torch.load(tmp_path / "flow.pt", weights_only=True)

    first = run(0.02)["budget"]
    again = run(first["spent"] / 60 + 0.02)["budget"]  # a slow machine spends more than it is given
    assert again["steps"] > first["steps"] > 0 and again["spent"] > first["spent"]
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "out")
    assert pipe("a fox", num_inference_steps=1, max_sequence_length=16).images[0].size == (128, 128)


def test_a_training_can_start_from_a_finished_pipeline(art, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(flow, "PARTS", (flow.Part(("single",), 4),))
    monkeypatch.setattr(command, "Art", lambda folder: art)
    here = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    minutes = ["--flow-minutes", "0.02"]
    assert command.main(["train", *here, "--start", str(NANO), "--subjects", "4", *minutes]) == 0
    old, new = (StableDiffusion3Pipeline.from_pretrained(folder) for folder in (NANO, tmp_path / "out"))
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        for one, other in zip(getattr(old, name).parameters(), getattr(new, name).parameters(), strict=True):
            torch.testing.assert_close(one, other)
    # a step or two away from where it started, and far from new weights
    one, other = (pipe.transformer.transformer_blocks[0].attn.to_q.weight for pipe in (old, new))
    assert 0 < (one - other).norm() < 0.5 * one.norm()


def test_a_start_that_is_no_pipeline_is_refused(tmp_path, capsys):
    assert command.main(["train", "--work", str(tmp_path), "--start", str(tmp_path)]) == 2
    assert "no pipeline's folder" in capsys.readouterr().err


@pytest.mark.usefixtures("few_scenes")
def test_the_text_encoders_learn_continue_and_are_not_trained_twice(art, vae, device, tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "SUBJECTS", scenes.SUBJECTS[:4])

    def run(minutes):
        encoders = reading.train(art, vae, tmp_path, minutes, device=device, clip_batch=8, t5_batch=8)
        return encoders, torch.load(tmp_path / "text.pt", weights_only=True)

    seeds = []
    drawn = lambda *given, seed, **more: seeds.append(seed) or pool.Pool(*given, seed=seed, **more)  # noqa: E731
    monkeypatch.setattr(reading, "Pool", drawn)
    _, first = run(0.02)
    encoders, again = run(first["budget"]["spent"] / 60 + 0.02)
    assert again["budget"]["steps"] > first["budget"]["steps"] > 0
    assert not any(p.requires_grad for p in encoders.parameters())
    same, at_rest = run(0.02)
    assert at_rest["budget"]["steps"] == again["budget"]["steps"]
    for one, other in zip(encoders.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert seeds == [0, first["budget"]["steps"]], "each run draws pictures of its own"
    (tmp_path / "flow.pt").touch()  # a flow has learnt with these encoders
    run(0.02)
    with pytest.raises(UserError, match="give no more as --text-minutes"):
        run(again["budget"]["spent"] / 60 + 0.02)


def test_each_letter_of_a_sign_is_told_its_cell(tmp_path):
    """The T5's lesson in spelling agrees with what the sign draws."""
    scene = scenes.Scene("sign", (scenes.SUBJECTS[0],), "3d", "red", "hello world")
    read = text.Text(tmp_path)
    ids, written = reading.tokens_and_letters(read, [scene], [scenes.caption(scene)], 40)
    lines = [[" "] * 8, [" "] * 8]
    for token, cell in written[0].nonzero().tolist():
        letter = reading.WRITTEN[written[0, token, cell] - 1]
        assert read.tokenizers[2].convert_ids_to_tokens(int(ids[0, token])) == letter
        lines[cell // 8][cell % 8] = letter
    assert ["".join(line) for line in lines] == [" hello  ", " world  "]
    assert {(5 + c // 8, c % 8) for _, c in written[0].nonzero().tolist()} == set(art_module.cells("hello world"))


def test_the_autoencoder_learns_and_continues(art, device, tmp_path, monkeypatch):
    """With sixteen pictures that come again, in place of the hundreds that it draws."""
    drawn = [autoencoder.random_picture(art, random.Random(n)) for n in range(16)]
    monkeypatch.setattr(autoencoder, "random_picture", lambda art, rng: rng.choice(drawn))
    monkeypatch.setattr(autoencoder, "finish", functools.partial(autoencoder.finish, count=16))
    autoencoder.train(art, tmp_path, 0.02, device=device, batch=4)
    first = torch.load(tmp_path / "vae.pt", weights_only=True)
    vae = autoencoder.train(art, tmp_path, first["budget"]["spent"] / 60 + 0.02, device=device, batch=4)
    again = torch.load(tmp_path / "vae.pt", weights_only=True)
    assert again["budget"]["steps"] > first["budget"]["steps"] > 0 and torch.equal(again["pca"][0], first["pca"][0])
    stored = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert stored.config.scaling_factor == vae.config.scaling_factor > 0


def test_the_decoder_learns_on_from_what_the_pipeline_draws_again(art, device, tmp_path, monkeypatch, capsys):
    """Each redrawn latent is near that of its own picture; the encoder, and with it every latent, stays."""
    drawn = autoencoder.random_picture(art, random.Random(0))
    monkeypatch.setattr(autoencoder, "random_picture", lambda art, rng: drawn)
    pipe = StableDiffusion3Pipeline.from_pretrained(NANO).to(device)
    vae = pipe.vae
    pictures, latents = autoencoder.redrawn(pipe, 240, art, random.Random(0), 4)
    assert latents.shape == (4, 16, 16, 16) and pictures.shape == (4, 3, 128, 128) and pictures.min() >= -1
    with torch.no_grad():
        apart = (latents[:, None] - vae.encode(pictures).latent_dist.mode()).square().mean((2, 3, 4))
    assert apart.argmin(1).tolist() == [0, 1, 2, 3] and apart.diagonal().max() < 0.5 * apart.median()
    before = {name: weight.cpu().clone() for name, weight in vae.state_dict().items()}
    redrawn, loss, losses = autoencoder.redrawn, autoencoder.picture_loss, []

    def stopped(*pictures):
        losses.append(loss(*pictures))
        if len(losses) == 4:
            raise KeyboardInterrupt
        return losses[-1]

    monkeypatch.setattr(autoencoder, "redrawn", lambda *given: redrawn(*given, 2))
    monkeypatch.setattr(autoencoder, "picture_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        autoencoder.polish(pipe, 240, art, tmp_path, 1, batch=1, every=2)
    first = torch.load(tmp_path / "decoder.pt", weights_only=True)["budget"]
    vae.load_state_dict(before)
    minutes = first["spent"] / 60 + 0.01
    autoencoder.polish(pipe, 240, art, tmp_path, minutes, batch=1, every=2)
    again = torch.load(tmp_path / "decoder.pt", weights_only=True)["budget"]
    assert again["steps"] > first["steps"] == 2
    changed = {name.split(".")[0] for name, weight in vae.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"decoder"}
    # run again on what it made, in the precision in which that is stored, it does nothing, and says so
    polished = vae.half().float().state_dict()
    made = {name: weight.clone() for name, weight in polished.items()}
    pipe.to(device)
    capsys.readouterr()
    autoencoder.polish(pipe, 240, art, tmp_path, minutes, batch=1, every=2)
    assert torch.load(tmp_path / "decoder.pt", weights_only=True)["budget"] == again
    assert "minutes are done" in capsys.readouterr().out
    assert all(torch.equal(weight.half(), made[name].half()) for name, weight in vae.state_dict().items())
    vae.decoder.conv_out.weight.data.mul_(1.01)
    pipe.to(device)
    with pytest.raises(UserError, match=r"\(other: decoder\): give another --work"):
        autoencoder.polish(pipe, 240, art, tmp_path, minutes, batch=1, every=2)


def test_a_source_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    for package, _ in art_module.SOURCES.values():
        name, _, version = package.rpartition("@")
        (tmp_path / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz").write_bytes(b"another file")
    with pytest.raises(art_module.ArtError, match="not the pinned"):
        art_module.fetch(tmp_path)


def test_without_npm_the_recipe_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert command.main(["train", "--work", str(tmp_path)]) == 2
    assert "npm is needed" in capsys.readouterr().err


def test_the_model_card_shows_the_stored_record():
    card = command.CARD.read_text(encoding="utf-8")
    shown = card.partition(evaluate.CARD_START)[2].partition(evaluate.CARD_END)[0].strip()
    assert shown == evaluate.markdown(json.loads(command.RECORD.read_text(encoding="utf-8")))


def test_evaluate_measures_every_figure(pipe, art, monkeypatch):
    timed = functools.partial(evaluate.seconds, calls=1, num_inference_steps=2)
    monkeypatch.setattr(evaluate, "seconds", timed)
    monkeypatch.setattr(evaluate, "SCALES", (1.0, 4.5))
    record = evaluate.evaluate(pipe, Judge(24), count=4, art=art, num_inference_steps=2)
    assert len(record["figures"]) == 10 and list(record["guidance"]) == ["1", "4.5"]
    for figures in record["figures"].values():
        assert all(0 <= f["low"] <= f["share"] <= f["high"] <= 1 for f in figures.values())
    assert set(record["floors"]) >= set(evaluate.KINDS) and record["psnr"] > 20
    for kind in evaluate.KINDS:
        found = record["floors"][kind]
        assert found["psnr"] > 25 and found["autoencoder's copies"]["background"]["share"] == 1
    table = evaluate.table(record)
    assert "single, held out" in table and "seconds a picture" in table and "real renders" in table


def test_turbo_s_levels_are_those_that_the_pipeline_steps_through(pipe):
    for steps in (1, 2, 4):
        scheduler = turbo.scheduler(pipe, steps)
        scheduler.set_timesteps(steps)
        assert steps == 1 or scheduler.sigmas[-2] == pytest.approx(turbo.LAST)
        levels = turbo.levels(pipe, steps, 7)
        torch.testing.assert_close(scheduler.sigmas, torch.cat([levels[:, 0], levels[-1:, -1]]))
        torch.testing.assert_close(levels[1:, 0], levels[:-1, -1])


def test_turbo_learns_continues_and_loads_in_plain_diffusers(tmp_path, monkeypatch):
    watched = []
    monkeypatch.setattr(turbo.Guard, "watch", lambda guard, loss, *_: watched.append(loss))

    def run(minutes, change=1.0, **more):
        pipe = StableDiffusion3Pipeline.from_pretrained(NANO)
        pipe.transformer.proj_out.weight.data.mul_(change)
        turbo.export(turbo.train(pipe, tmp_path, minutes, subjects=8, batch=2, **more), tmp_path / "lora")
        return torch.load(tmp_path / "turbo.pt", weights_only=True)

    first = run(0.01)
    first["budget"]["steps"] = 49  # the next step is looked at by the guard, and must be no fraction of a loss
    torch.save(first, tmp_path / "turbo.pt")
    again = run(first["budget"]["spent"] / 60 + 0.01)
    assert again["budget"]["steps"] > 49 and len(watched) == 1 and watched[0] > 0.01
    for change, more, what in ((1.01, {}, "transformer"), (1.0, {"guidance": 3.0}, "guidance")):
        with pytest.raises(UserError, match=rf"\(other: {what}\): give another --work"):
            run(0.01, change, **more)
    lora = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert lora.stat().st_size < 3e6
    plain = StableDiffusion3Pipeline.from_pretrained(NANO)
    drawn = {"num_inference_steps": 1, "guidance_scale": 1.0, "max_sequence_length": 16, "output_type": "latent"}
    before, after = [], []
    for found in (before, after):
        found.append(plain("a fox", generator=torch.Generator().manual_seed(0), **drawn).images)
        if found is before:
            plain.load_lora_weights(lora.parent, weight_name=lora.name)
    assert not torch.equal(before[0], after[0])


def test_packed_art_is_what_the_sources_hold(tmp_path, monkeypatch):
    """Of three sources with icons of their own and one in common, the packed file keeps what rendering needs."""
    for style, size in zip(art_module.SOURCES, (16, 32, 128), strict=True):
        own = {name: {"body": f'<path d="{style} {name}"/>'} for name in ("fox", style, "old-man", "cat-face")}
        icons = {"width": size, "icons": own, "aliases": {"wolf": {"parent": "fox"}}}
        stored = json.dumps(icons).encode()
        with tarfile.open(tmp_path / f"{style}.tgz", "w:gz") as archive:
            member = tarfile.TarInfo("package/icons.json")
            member.size = len(stored)
            archive.addfile(member, io.BytesIO(stored))
    sources = {style: tmp_path / f"{style}.tgz" for style in art_module.SOURCES}
    monkeypatch.setattr(art_module, "fetch", lambda folder: sources)
    assert command.main(["pack", str(tmp_path / "out"), "--work", str(tmp_path)]) == 0
    monkeypatch.setattr(art_module, "fetch", lambda folder: pytest.fail("the packed file is enough"))
    packed = art_module.vectors(tmp_path / "out")
    assert list(packed["3d"]["icons"]) == ["fox", "cat-face"] and packed["noto"]["width"] == 128
    assert 'viewBox="0 0 32 16"' in art_module._svg(packed["flat"], "fox")
