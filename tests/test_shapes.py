"""Every lesson on small random models with the structure of SD3 Medium and 3.5 Medium: `make test-shapes`.

What will run on a GPU with the real weights is proved here as far as it can be without them: no QK-norm in the one, a
second attention and QK-norm in the other, a VAE with a shift factor, and text encoders that know nothing.
"""

import lessons
import nbformat
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from sd3kit.loading import configs

SMALL = dict(
    sample_size=16, num_layers=6, num_attention_heads=3, attention_head_dim=64, caption_projection_dim=192,
    pos_embed_max_size=32,
)  # fmt: skip


@pytest.fixture(scope="module", params=["medium", "3.5-medium"])
def model(request, tmp_path_factory, pipe):
    """The folder of a pipeline with random weights; tokenizers are nano's."""
    torch.manual_seed(0)
    config = configs.TRANSFORMER[request.param] | SMALL
    config |= {name: pipe.transformer.config[name] for name in ("joint_attention_dim", "pooled_projection_dim")}
    if "dual_attention_layers" in config:
        config["dual_attention_layers"] = (0, 1, 2)
    vae = dict(pipe.vae.config) | {name: configs.VAE[name] for name in ("scaling_factor", "shift_factor")}
    encoders = {
        name: type(getattr(pipe, name))(getattr(pipe, name).config)
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    }
    tokenizers = {name: getattr(pipe, name) for name in ("tokenizer", "tokenizer_2", "tokenizer_3")}
    folder = tmp_path_factory.mktemp(request.param.replace(".", "-"))
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**config), vae=AutoencoderKL.from_config(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=configs.SHIFT), **encoders, **tokenizers,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.shapes
@pytest.mark.parametrize("path", lessons.LESSONS, ids=lambda path: path.stem)
def test_runs_on_the_structure_of_the_real_models(path, model, tmp_path, monkeypatch):
    monkeypatch.setenv("SD3KIT_MODEL", str(model))
    lessons.run(nbformat.read(path, as_version=4), tmp_path, timeout=600)
