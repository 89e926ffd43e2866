"""Scenes with their latents, drawn and encoded as training goes."""

import random

import torch
from diffusers import AutoencoderKL

from . import scenes
from .art import Art, draw, to_tensor
from .autoencoder import NOISE


class Pool:
    """It grows to `capacity`, then the new scenes take the places of old ones."""

    def __init__(
        self, art: Art, vae: AutoencoderKL, subjects: list[scenes.Subject], kinds: tuple[str, ...], capacity: int
    ):
        """Scenes of these subjects and kinds; a kind named twice comes twice as often."""
        self.art, self.vae, self.subjects, self.kinds, self.capacity = art, vae, subjects, kinds, capacity
        self.scenes: list[scenes.Scene] = []
        self.latents: list[torch.Tensor] = []

    @torch.no_grad()
    def renew(self, count: int, rng: random.Random) -> None:
        new = [scenes.random_scene(rng, self.subjects, rng.choice(self.kinds)) for _ in range(count)]
        pictures = to_tensor([draw(scene, self.art, rng) for scene in new])
        encoded = self.vae.encode(pictures.to(self.vae.device)).latent_dist.mean * self.vae.config.scaling_factor
        for scene, latent in zip(new, encoded, strict=True):
            if len(self.scenes) < self.capacity:
                self.scenes.append(scene)
                self.latents.append(latent)
            else:
                i = rng.randrange(self.capacity)
                self.scenes[i], self.latents[i] = scene, latent

    def sample(self, count: int, rng: random.Random) -> tuple[list[scenes.Scene], torch.Tensor]:
        """So many scenes, and their latents (count, 16, 16, 16) with the noise of the posterior."""
        chosen = [rng.randrange(len(self.scenes)) for _ in range(count)]
        latents = torch.stack([self.latents[i] for i in chosen])
        noise = NOISE * self.vae.config.scaling_factor * torch.randn_like(latents)
        return [self.scenes[i] for i in chosen], latents + noise


def random_caption(scene: scenes.Scene, rng: random.Random, *, styled: bool = True) -> str:
    """The scene in words that vary; the style, which `styled` can forbid, and the background are not always named."""
    with_style, with_colour = rng.random() < 0.9, rng.random() < 0.85
    return scenes.caption(scene, rng, with_style=with_style and styled, with_colour=with_colour)
