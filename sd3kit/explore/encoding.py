"""The three text encoders: the function and its explorer."""

from typing import Any

import torch
from PIL import Image

from .drawing import draw, filled
from .drawn import Drawn
from .explorer import Explorer

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
        **settings: as in `text_to_image`.

    Raises:
        ValueError: another `keep`, or as in `text_to_image`. Stopped: as in `text_to_image`.
    """
    if not isinstance(keep, str) or set(keep) - set(NAMES):
        raise ValueError(f'Keep some of "123", not {keep!r}.')
    full = filled(pipe, prompt, settings, keep="".join(sorted(set(keep))))

    @torch.no_grad()
    def call(own, arguments: dict) -> Image.Image:
        named = {name: arguments[name] for name in ("negative_prompt", "max_sequence_length")}
        embeds, empty, pooled, empty_pooled = own.encode_prompt(prompt, None, None, **named)
        embeds, pooled = without(own, embeds, pooled, keep)
        return own(
            prompt_embeds=embeds,
            negative_prompt_embeds=empty,
            pooled_prompt_embeds=pooled,
            negative_pooled_prompt_embeds=empty_pooled,
            **arguments | {"negative_prompt": None},
        ).images[0]

    return draw(pipe, full, call, settings)


class Encoders(Explorer):
    """The three text encoders, each of which can be switched off."""

    title = "Text encoders"

    def own(self):
        boxes = {
            f"encoder {n}": self.ui.control("Checkbox", name, value=True, indent=False) for n, name in NAMES.items()
        }
        self.inputs |= boxes
        return list(boxes.values())

    def draw(self, settings, watch, stop):
        keep = "".join(n for n in NAMES if settings.pop(f"encoder {n}"))
        return encoders(self.pipe, keep=keep, watch=watch, stop=stop, **settings)
