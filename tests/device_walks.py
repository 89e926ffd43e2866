"""On a pretended GPU: planted faults, each of which must be found, and walks through the package, which must pass.

`test_devices.py` starts this file, or `SD3KIT_DEVICE=pretend pytest tests/device_walks.py`.
"""

import os
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from PIL import Image

from sd3kit import explore
from sd3kit.lesson import attention, show
from sd3kit.loading.names import NANO
from sd3kit.recipe import autoencoder, evaluate, flow, pool, reading, scenes, text
from sd3kit.recipe.judge import Judge
from sd3kit.study import overlap
from studies import drawing, training

QUICK = {"num_inference_steps": 2, "width": 64, "height": 64}
PROMPT = "a fox on a blue background"
MIXED = "Expected all tensors to be on the same device"


@pytest.fixture
def x(device):
    return torch.ones(3, 4, device=device)


# ---- planted faults

FAULTS = {
    "a mask of the CPU": (lambda x: x.masked_fill(torch.ones(4, dtype=torch.bool), 0.0), MIXED),
    "a mask of the CPU in where": (lambda x: torch.where(torch.ones(4, dtype=torch.bool), x, 0.0), MIXED),
    "a mask of the CPU in attention": (
        lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(3, 3)),
        MIXED,
    ),
    "indices of the CPU for an embedding": (
        lambda x: torch.nn.functional.embedding(torch.tensor([0, 2]), x),
        MIXED,
    ),
    "indices of the device for a tensor of the CPU": (
        lambda x: torch.ones(3)[torch.tensor([0, 2], device=x.device)],
        MIXED,
    ),
    "a new tensor beside one like it": (lambda x: torch.full_like(x, 2.0) + torch.full((3, 4), 2.0), MIXED),
    "noise that was drawn on the CPU": (lambda x: torch.lerp(x, torch.randn(3, 4), 0.5), MIXED),
    "joined with a tensor of the CPU": (lambda x: torch.cat([x, torch.ones(1, 4)]), MIXED),
    "stacked with a tensor of the CPU": (lambda x: torch.stack([torch.ones(3, 4), x]), MIXED),
    "a layer that was not moved": (lambda x: torch.nn.Linear(4, 2)(x), MIXED),
    "assigned through a mask from the CPU": (lambda x: x.__setitem__(x[:, 0] > 0, torch.ones(3, 4)), MIXED),
    "changed in place by a tensor of the CPU": (lambda x: x.mul_(torch.ones(4)), MIXED),
    "a generator of the CPU": (
        lambda x: torch.randn(2, device=x.device, generator=torch.Generator()),
        "device type for generator",
    ),
    "a generator of the CPU, in place": (lambda x: x.normal_(generator=torch.Generator()), "device type for generator"),
    "numpy": (lambda x: x.numpy(), "Use Tensor.cpu"),
    "numpy by its own call": (lambda x: np.asarray(x), "Use Tensor.cpu"),
    "numpy after a step that forgets": (lambda x: x.detach().float().clamp(0, 1).numpy(), "Use Tensor.cpu"),
    "float64": (lambda x: x.double(), "Apple's GPUs"),
    "numbers of numpy, which are float64": (lambda x: torch.as_tensor(np.ones(3), device=x.device), "Apple's GPUs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, x):
    act, words = FAULTS[fault]
    with pytest.raises((RuntimeError, TypeError), match=words):
        act(x)


def test_an_autoencoder_that_is_given_a_picture_of_the_cpu_is_found(pipe):
    with pytest.raises(RuntimeError, match=MIXED):
        pipe.vae.encode(torch.zeros(1, 3, 64, 64))


RIGHT = {
    "a number of the CPU": lambda x: x + torch.tensor(1.0),
    "indices and masks of the CPU": lambda x: x[torch.tensor([0, 2])][torch.tensor([True, False])],
    "copied to the CPU": lambda x: torch.from_numpy(x.cpu().numpy()) + 1,
    "copied from the CPU": lambda x: torch.zeros(4).to(x) + x.copy_(torch.ones(3, 4)),
    "assigned to a part": lambda x: x.__setitem__(0, torch.zeros(4)),
    "read as numbers": lambda x: [x.sum().item(), x.tolist(), bool(x.all()), float(x.mean())],
    "made by torch.tensor": lambda x: torch.tensor([[x[0, 0]]], device=x.device) * x,
    "drawn on the CPU and moved": lambda x: x + torch.randn(4, generator=torch.Generator()).to(x.device),
}


@pytest.mark.parametrize("way", RIGHT)
def test_what_a_gpu_allows_is_allowed(way, x):
    RIGHT[way](x)


def test_a_network_learns_on_it(device):
    torch.manual_seed(0)
    with torch.device(device):
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 1))
    given, losses = torch.randn(8, 4).to(device), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(20):
        loss = (model(given) - given.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert model[0].weight.grad.device.type == device and losses[-1] < 0.9 * losses[0]


# ---- walks


def test_it_draws_what_the_cpu_draws(pipe):
    own = StableDiffusion3Pipeline.from_pretrained(NANO)
    drawn, wanted = (
        each(PROMPT, generator=torch.Generator().manual_seed(1), max_sequence_length=16, **QUICK).images[0]
        for each in (pipe, own)
    )
    assert pipe.transformer.device.type == "pretend" and own.transformer.device.type == "cpu"
    assert np.abs(np.asarray(drawn, float) - np.asarray(wanted, float)).max() <= 1


def test_maps(pipe):
    found = attention.maps(pipe, PROMPT, ["fox", "blue"], **{"steps": 2, "width": 64, "height": 64})
    assert found["raw"].device.type == found["concept"].device.type == "cpu"


def test_explore(pipe):
    seen = []
    explore.text_to_image(pipe, PROMPT, steps=2, size=64, watch=seen.append)
    explore.image_to_image(pipe, Image.new("RGB", (64, 64), "red"), PROMPT, steps=3, size=64)
    explore.encoders(pipe, PROMPT, steps=1, size=64)
    explore.schedule(pipe, PROMPT, steps=1, size=64)
    assert len(seen) == 2 and seen[0].latents.shape == (1, 16, 8, 8)


def test_evaluate(pipe, art):
    assert set(evaluate.floors(Judge(8), art, pipe.vae, 2)) >= set(evaluate.KINDS)
    pictures = torch.zeros(2, 3, 64, 64)
    assert autoencoder.psnr(pipe.vae, pictures).device == pictures.device
    show.to_image(autoencoder.copied(pipe.vae, pictures.to(pipe.device))[0])
    assert evaluate.pictures(pipe, [PROMPT], **QUICK)[0].size == (64, 64)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The recipe's autoencoder and texts, few subjects, and batches and pools as small as they can be."""
    monkeypatch.setattr(flow, "PARTS", (flow.Part(("single", "sign"), 1),))
    monkeypatch.setattr(flow, "SPREAD", 2)
    monkeypatch.setattr(scenes, "SUBJECTS", scenes.SUBJECTS[:4])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # one process draws, as on a GPU
    monkeypatch.setattr(pool.Pool, "renew", lambda self, times=1, renew=pool.Pool.renew: renew(self, 1))
    monkeypatch.setattr(pool, "AT_ONCE_ON_GPU", 4)
    for tokenizer in NANO.glob("tokenizer*"):  # which are trained where they are not
        shutil.copytree(tokenizer, tmp_path / tokenizer.name)
    return AutoencoderKL(**autoencoder.CONFIG), text.Text(tmp_path)


def test_recipe_flow(art, small, device, tmp_path):
    vae, read = small
    flow.train(art, vae, read, tmp_path, 1e-6, 4, device=device)
    model = flow.train(art, vae, read, tmp_path, 1e-3, 4, device=device)  # goes on from the checkpoint
    flow.export(model, read, vae, tmp_path / "out")
    assert StableDiffusion3Pipeline.from_pretrained(tmp_path / "out").transformer.device.type == "cpu"


def test_recipe_reading(art, small, device, tmp_path):
    reading.train(art, small[0], tmp_path, 1e-6, device=device, clip_batch=2, t5_batch=8)


def test_recipe_autoencoder(art, device, tmp_path, monkeypatch):
    """Without what would take its time: pictures to begin with, and the measurement of the scaling factor."""
    noise = np.random.default_rng(0).random((128, 128, 3), np.float32) * 255
    monkeypatch.setattr(autoencoder, "random_picture", lambda art, rng: noise)
    monkeypatch.setattr(autoencoder, "finish", lambda vae, art, out: vae)
    autoencoder.train(art, tmp_path, 1e-6, device=device, batch=2)


def test_recipe_polish(art, device, tmp_path, monkeypatch):
    noise, redrawn = np.zeros((128, 128, 3), np.float32), autoencoder.redrawn
    monkeypatch.setattr(autoencoder, "random_picture", lambda art, rng: noise)
    monkeypatch.setattr(autoencoder, "redrawn", lambda *given: redrawn(*given, 2))
    pipe = StableDiffusion3Pipeline.from_pretrained(NANO).to(device)
    autoencoder.polish(pipe, 4, art, tmp_path, 1e-6, batch=1)


def test_studies(pipe, monkeypatch):
    monkeypatch.setattr(training, "tools", lambda: (pipe, None))
    monkeypatch.setattr(training, "BATCH", 4)
    network = training.seeded({"seed": 0})
    for fault in training.FAULTS:
        training.train(network, fault=fault, steps=1)
    assert training.distance(network, 1) > 0
    assert training.qk_norm({"seed": 0, "qk_norm": "rms_norm", "rate": 1e-3}, steps=1)["largest logit"] > 0
    assert len(drawing.draw_encoded(pipe, [PROMPT], "1", **QUICK)) == 1
    assert overlap(torch.rand(8, 8, device=pipe.device), np.ones((128, 128), bool)) > 0


def test_dreambooth(device, tmp_path, monkeypatch):
    """A step, and one more from its checkpoint: pictures, noise levels, the encoders' LoRA, what is kept."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from sd3kit.dreambooth import Settings, subject
    from sd3kit.dreambooth.train import train

    monkeypatch.setattr(PartialState, "default_device", property(lambda self: torch.device(device)))
    settings = dict(
        pretrained_model_name_or_path="nano", instance_data_dir=str(subject.PICTURES), caption_column="text",
        instance_prompt="a sks robot", resolution=64, max_sequence_length=12, train_batch_size=1, seed=0,
        report_to="none", output_dir=str(tmp_path), train_text_encoder=True, checkpointing_steps=1,
    )  # fmt: skip
    try:
        train(Settings(**settings, max_train_steps=1))
        train(Settings(**settings, max_train_steps=2, resume_from_checkpoint="latest"))
        assert PartialState().device.type == device
    finally:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        GradientState._reset_state()
