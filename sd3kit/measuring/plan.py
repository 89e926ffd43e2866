"""What a recipe is: the few lines that build a pipeline, and what the accounting must know of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe and what it keeps where.

    Attributes:
        build: (model, dtype, device) to a pipeline, or to a pipeline and {prompt: inputs}.
        keeps: what is on the device at one time: "all", "part" (of the pipeline), "block", "leaf" (a layer), "stage"
            (the text encoders, then the rest), or "rest" (the rest always, the text encoders layer by layer).
        moves: how it gets there: "" (once, before), "stream" (beside the computing), "copy" (the computing waits), or
            "load" (from the disk).
        bits: stored bits of the linear weights of a part, scales included; 16 where it is not named.
        straight: the parts that are loaded straight onto the device, not by way of the processor's memory.
        every_linear: no linear layer is left out of the fewer bits (bitsandbytes leaves the T5's `wo` in float32).
        skips: layers with one of these in their name keep their 16 bits.
        without: the parts that are left out.
        tiles: the autoencoder decodes in this many tiles along a side.
    """

    build: Callable[..., Any]
    keeps: str = "all"
    moves: str = ""
    bits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    straight: tuple[str, ...] = ()
    every_linear: bool = False
    skips: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    tiles: int = 1

    @property
    def loses(self) -> str:
        """What becomes of the picture: "" where it stays the same, and the tiles' seams at most may shift a tone."""
        if self.without:
            return "another picture: the T5 is left out, so long prompts and words in the picture suffer"
        few = min(self.bits.values(), default=16)
        return f"nearly the same picture: weights in {few:.0f} bits" if few < 16 else ""


RECIPES: dict[str, Recipe] = {}


def recipe(**facts: Any) -> Callable:
    def register(build: Callable) -> Callable:
        RECIPES[build.__name__] = Recipe(build, **facts)
        return build

    return register
