"""The three text encoders: the function and its explorer."""

from typing import Any

import torch
from PIL import Image

from .controls import control
from .drawn import Drawn
from .explorer import Explorer
from .text import text_to_image

NAMES = {"1": "CLIP L/14", "2": "OpenCLIP bigG/14", "3": "T5"}


def without(pipe, embeds: torch.Tensor, pooled: torch.Tensor, encoders: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt's embeddings with the parts of the encoders that are not named (1, 2, 3) set to zero."""
    one, two = pipe.text_encoder.config, pipe.text_encoder_2.config
    embeds, pooled = embeds.clone(), pooled.clone()
    if "1" not in encoders:
        embeds[:, :77, : one.hidden_size] = 0
        pooled[:, : one.projection_dim] = 0
    if "2" not in encoders:
        embeds[:, :77, one.hidden_size : one.hidden_size + two.hidden_size] = 0
        pooled[:, one.projection_dim :] = 0
    if "3" not in encoders:
        embeds[:, 77:] = 0
    return embeds, pooled


def encoders(pipe, prompt: str, keep: str = "123", **settings: Any) -> Drawn:
    """Draw with some of the text encoders: what the others say of the prompt is set to zero.

    The negative prompt keeps all three, so guidance moves from the same place.

    Args:
        keep: the encoders that speak: 1 is CLIP L/14, 2 OpenCLIP bigG/14, 3 the T5; "" is none.
        **settings, and what is raised: as in `text_to_image`.
    """
    if not isinstance(keep, str) or set(keep) - set(NAMES):
        raise ValueError(f'Keep some of "123", not {keep!r}.')

    def call(own, arguments: dict) -> Image.Image:
        def encode(**asked):
            embeds, empty, pooled, empty_pooled = pipe.encode_prompt(**asked)
            embeds, pooled = without(pipe, embeds, pooled, keep)
            return embeds, empty, pooled, empty_pooled

        own.encode_prompt = encode
        return own(prompt, **arguments).images[0]

    return text_to_image(pipe, prompt, call=call, more={"keep": "".join(sorted(set(keep)))}, **settings)


class Encoders(Explorer):
    """The three text encoders, each of which can be switched off."""

    title = "Text encoders"

    def own(self):
        for n, name in NAMES.items():
            self.inputs[f"encoder {n}"] = control("Checkbox", name, value=True, indent=False)

    def draw(self, **settings):
        keep = "".join(n for n in NAMES if settings.pop(f"encoder {n}"))
        return encoders(self.pipe, keep=keep, **settings)
