"""Scenes with their latents and captions, kept where the model is, and drawn anew as training goes."""

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL

from . import scenes
from .art import CELL, SIZE, Art, cells, draw
from .text import Text, cut
from .training import own_random

CAPTIONS = 4  # of each scene
AT_ONCE, AT_ONCE_ON_GPU = 8, 64  # scenes that are drawn and encoded together
CLIP_SHORT, T5_SHORT = 40, 48  # tokens of the longest caption that is kept


class Batch(NamedTuple):
    """So many scenes: `latents` (N, 16, 16, 16), scaled; `clip` and `t5`, the ids of a caption (N, tokens), -1 for
    padding; `letters` (N, 8, 8), whether a token of the picture holds a letter of a sign."""

    latents: torch.Tensor
    clip: torch.Tensor
    t5: torch.Tensor
    letters: torch.Tensor


def random_caption(scene: scenes.Scene, rng: random.Random) -> str:
    """The scene in words that vary; style and background are not always named."""
    return scenes.caption(scene, rng, with_style=rng.random() < 0.9, with_colour=rng.random() < 0.85)


class Drawn(torch.utils.data.IterableDataset):
    """Scenes without end, a few at a time, as arrays: pictures, captions as ids, where letters are."""

    def __init__(
        self, art: Art, text: Text, subjects: list[scenes.Subject], kinds: tuple[str, ...], at_once: int, seed: int
    ):
        self.art, self.tokens, self.subjects, self.kinds = art, text.tokens, subjects, kinds
        self.at_once, self.seed = at_once, seed

    def __iter__(self) -> Iterator[tuple]:
        rng = own_random(self.seed)
        while True:
            new = [scenes.random_scene(rng, self.subjects, rng.choice(self.kinds)) for _ in range(self.at_once)]
            pictures = np.stack([draw(scene, self.art, rng) for scene in new]).round().astype(np.uint8)
            letters = torch.zeros(self.at_once, SIZE // CELL, SIZE // CELL, dtype=torch.bool)
            for i, scene in enumerate(new):
                for place in cells(scene.text):
                    letters[i][place] = True
            captions = [random_caption(scene, rng) for scene in new for _ in range(CAPTIONS)]
            clip, t5 = (
                ids.unflatten(0, (self.at_once, CAPTIONS)).short()
                for ids in self.tokens(captions, CLIP_SHORT, T5_SHORT)
            )
            yield torch.from_numpy(pictures).permute(0, 3, 1, 2), clip, t5, letters


class Pool:
    """It grows to `capacity` scenes, then new ones take the places of the oldest."""

    def __init__(
        self, art: Art, vae: AutoencoderKL, text: Text, subjects: list[scenes.Subject], kinds: tuple[str, ...],
        capacity: int, *, workers: int = 0, seed: int = 0,
    ):  # fmt: skip
        """Scenes of these subjects and kinds; a kind named twice comes twice as often. `workers` processes draw."""
        device, tokens = vae.device, SIZE // CELL
        self.at_once = AT_ONCE if device.type == "cpu" else AT_ONCE_ON_GPU
        drawn = Drawn(art, text, subjects, kinds, self.at_once, seed)
        pinned = device.type == "cuda"  # or each copy would wait for all that the GPU has to do
        self.drawn = iter(torch.utils.data.DataLoader(drawn, batch_size=None, num_workers=workers, pin_memory=pinned))
        self.vae, self.capacity, self.count = vae, capacity // self.at_once * self.at_once, 0
        self.filled = torch.zeros((), device=device)  # a CUDA graph of `sample` reads it, and sees it grow
        self.latents = torch.empty(self.capacity, 16, 16, 16, device=device)
        self.clip = torch.empty(self.capacity, CAPTIONS, CLIP_SHORT, dtype=torch.short, device=device)
        self.t5 = torch.empty(self.capacity, CAPTIONS, T5_SHORT, dtype=torch.short, device=device)
        self.letters = torch.empty(self.capacity, tokens, tokens, dtype=torch.bool, device=device)

    @torch.no_grad()
    def renew(self, times: int = 1) -> None:
        """Draw and encode so many times a few scenes."""
        for _ in range(times):
            pictures, *rest = (part.to(self.vae.device, non_blocking=True) for part in next(self.drawn))
            at = slice(self.count % self.capacity, self.count % self.capacity + self.at_once)
            latents = self.vae.encode(pictures.float() / 127.5 - 1).latent_dist.mode()
            self.latents[at] = latents * self.vae.config.scaling_factor
            self.clip[at], self.t5[at], self.letters[at] = rest
            self.count += self.at_once
            self.filled.fill_(min(self.count, self.capacity))

    def sample(self, count: int) -> Batch:
        """So many of the scenes, each with one of its captions, cut to the longest of them on a CPU.

        A GPU keeps one length: reading the longest would make it wait.
        """
        i = (torch.rand(count, device=self.latents.device) * self.filled).long()
        j = torch.randint(CAPTIONS, (count,), device=self.latents.device)
        ids = [each[i, j].long() for each in (self.clip, self.t5)]
        if self.latents.device.type == "cpu":
            ids = cut(ids)
        return Batch(self.latents[i], *ids, self.letters[i])
