"""LoRA: the function, its explorer, and what files of other trainers are."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from PIL import Image

from .controls import control
from .drawing import number
from .drawn import Drawn
from .explorer import Explorer
from .text import text_to_image

RENAME = 'begin its keys with "transformer." in place of {!r} and give load_lora_weights the dictionary.'
# How the keys of a LoRA file begin, whose layout that is, and what to do with it; the first that fits counts.
LAYOUTS = (
    (("transformer.", "text_encoder"), "diffusers", "load it with pipe.load_lora_weights(file)."),
    (("diffusion_model.transformer_blocks",), "ComfyUI over diffusers' names", RENAME.format("diffusion_model.")),
    (("base_model.model.",), "peft's own save_pretrained", RENAME.format("base_model.model.")),
    (("transformer_blocks.",), "a bare transformer", "call pipe.transformer.load_lora_adapter(file, prefix=None)."),
    (
        ("lora_unet_", "lora_te", "lycoris_", "diffusion_model.joint_blocks"),
        "kohya's sd-scripts or ComfyUI, over the names of Stability's own code",
        "diffusers loads nothing from it and raises no error, as its q, k and v are one matrix; use it in ComfyUI, or "
        "ask for a file in diffusers' layout.",
    ),
)


def lora_layout(file_or_keys: str | os.PathLike | Iterable[str]) -> str:
    """Whose layout a LoRA's keys have, and what to do with it, in one sentence.

    diffusers loads what it does not know as no adapter at all, without an error.

    Raises:
        ValueError: not a safetensors file. OSError: it cannot be read.
    """
    if isinstance(file_or_keys, str | os.PathLike):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file_or_keys, "pt") as file:
                keys = list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{file_or_keys} is no safetensors file, or a damaged one: get it again.") from error
    else:
        keys = list(file_or_keys)
    if not any("lora" in key for key in keys):
        return "These are no keys of a LoRA: it may be a whole model, or another kind of adapter."
    for starts, whose, what in LAYOUTS:
        if any(key.startswith(starts) for key in keys):
            return f"The layout of {whose}: {what}"
    return f"An unknown layout, with keys such as {keys[0]!r}: ask its maker for a file in diffusers' layout."


def adapters(pipe) -> list[str]:
    """The names of the LoRA adapters that are loaded, in order."""
    return sorted({name for names in pipe.get_list_adapters().values() for name in names})


def lora(pipe, prompt: str, scales: Mapping[str, float], **settings: Any) -> Drawn:
    """Draw with LoRA adapters at scales of one's choice; 0 is without.

    Args:
        scales: a scale, -2 to 2, for each adapter to use.
        **settings, and what is raised: as in `text_to_image`; also ValueError where no adapter is loaded, one is fused
            or unknown, or a scale is out of range.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not adapters(pipe):
        raise ValueError("No LoRA is loaded: sd3kit.explore.lora_layout(file) says how to load which file.")
    scales = {name: number(f"the scale of {name}", scale, -2, 2) for name, scale in scales.items()}

    def call(own, arguments: dict) -> Image.Image:
        parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        layers = [layer for part in parts for layer in part.modules() if isinstance(layer, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            raise ValueError("The LoRA is fused into the weights and has no scale: call pipe.unfuse_lora() first.")
        if any(layer.disable_adapters for layer in layers):
            raise ValueError("The LoRA is switched off and would change nothing: call pipe.enable_lora() first.")
        before = [(layer, dict(layer.scaling), list(layer.active_adapters)) for layer in layers]
        try:
            pipe.set_adapters(list(scales), list(scales.values()))
            return own(prompt, **arguments).images[0]
        finally:
            for layer, scaling, active in before:
                layer.scaling.update(scaling)
                layer.set_adapter(active)

    return text_to_image(pipe, prompt, call=call, more={"scales": scales}, **settings)


class Lora(Explorer):
    """LoRA: a scale for each adapter that is loaded."""

    title = "LoRA"

    def own(self):
        for name in adapters(self.pipe):
            self.inputs[f"scale of {name}"] = control("FloatSlider", name, value=1.0, min=-2.0, max=2.0, step=0.1)

    def draw(self, **settings):
        names = [name for name in settings if name.startswith("scale of ")]
        scales = {name.removeprefix("scale of "): settings.pop(name) for name in names}
        return lora(self.pipe, scales=scales, **settings)
