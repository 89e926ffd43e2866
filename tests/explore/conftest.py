"""What the tests of explorers share."""

import copy

import pytest
import torch


@pytest.fixture
def with_lora(pipe):
    """The pipeline with two adapters on a transformer of its own, "dog" and "ink", whose effect is large."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig

    other = StableDiffusion3Pipeline(**pipe.components | {"transformer": copy.deepcopy(pipe.transformer)})
    other.set_progress_bar_config(disable=True)
    other.own_settings = pipe.own_settings
    torch.manual_seed(0)
    for name in ("dog", "ink"):
        other.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name=name)
    for name, weight in other.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return other
