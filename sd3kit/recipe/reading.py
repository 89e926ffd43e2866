"""The text encoders of nano learn to read, before the flow and apart from it. Then they stay as they are, as SD3's do.

- The two CLIPs learn as CLIP did (arXiv 2103.00020): in a batch, tell which caption belongs to which picture. The
  picture's side is a small convolutional tower on the latents, and is thrown away.
- The T5 has no web to read. It learns to name each token from the others where it is hidden (as T5 and BERT do), to
  name the tokens before and after, and, for signs, what each token writes into which cell of the picture. Without the
  last two, all tokens of a letter come out alike, and nothing can be spelled.
"""

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from ..errors import UserError
from . import scenes
from .art import CELL, SIZE, Art, cells
from .checkpoints import restore_parts, save_parts
from .pool import Pool, random_caption
from .text import CLIP_WIDTHS, JOINT, Text
from .training import Average, Budget, cosine, process

KINDS = ("single", "single", "sign", "pair", "count")
WRITTEN = "abcdefghijklmnopqrstuvwxyz0123456789"  # what a cell may hold; number 0 is nothing
ROWS, COLUMNS = (5, 6), SIZE // CELL
HIDDEN = 0.15  # how often a token of the T5 is hidden


class PictureTower(nn.Module):
    """Latents (N, 16, 16, 16) to one vector for each CLIP."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(16, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.SiLU(),
            nn.Conv2d(64, 96, 3, stride=2, padding=1), nn.GroupNorm(4, 96), nn.SiLU(),
            nn.Conv2d(96, 128, 3, stride=2, padding=1), nn.GroupNorm(4, 128), nn.SiLU(), nn.Flatten(),
            nn.Linear(128 * 16, 256), nn.SiLU(),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(256, width) for width in CLIP_WIDTHS)
        self.scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, latents: torch.Tensor) -> list[torch.Tensor]:
        hidden = self.body(latents)
        return [normalize(head(hidden), dim=-1) for head in self.heads]


class Pretext(nn.Module):
    """What the T5 is asked about each token; thrown away afterwards."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.words = nn.ModuleList(nn.Linear(JOINT, vocabulary) for _ in ("itself", "the one before", "the one after"))
        self.writes = nn.Linear(JOINT, len(ROWS) * COLUMNS * (len(WRITTEN) + 1))

    def forward(self, read: torch.Tensor, ids: torch.Tensor, written: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The loss on words and the loss on letters, from the T5's output (N, L, 192) for ids (N, L)."""
        read, targets = read[:, 1:-1], (ids[:, 1:-1], ids[:, :-2], ids[:, 2:])
        there = ids[:, 1:-1] != 0
        words = sum(
            cross_entropy(head(read[there]), wanted[there]) for head, wanted in zip(self.words, targets, strict=True)
        )
        logits = self.writes(read[there]).unflatten(-1, (len(ROWS) * COLUMNS, -1))
        letters = cross_entropy(logits.flatten(0, 1), written[:, 1:-1][there].flatten()) * len(ROWS) * COLUMNS
        return words, letters


def tokens_and_letters(text: Text, asked: list[scenes.Scene], prompts: list[str], length: int) -> tuple:
    """The T5's ids (N, length), and which letter each token writes into which of the 16 cells: (N, length, 16)."""
    found = text.tokenizers[2](
        prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt",
        return_offsets_mapping=True,
    )  # fmt: skip
    written = torch.zeros(len(prompts), length, len(ROWS) * COLUMNS, dtype=torch.long)
    for n, (scene, prompt) in enumerate(zip(asked, prompts, strict=True)):
        if scene.kind != "sign":
            continue
        begin = prompt.index("says ") + len("says ") + ('says "' in prompt)
        token_at = {c: t for t, (a, b) in enumerate(found.offset_mapping[n].tolist()) for c in range(a, b)}
        for (row, column), i in cells(scene.text).items():
            if (token := token_at.get(begin + i)) is not None:
                written[n, token, ROWS.index(row) * COLUMNS + column] = 1 + WRITTEN.index(scene.text[i])
    return found.input_ids, written


def train(
    art: Art,
    vae: AutoencoderKL,
    work: Path,
    minutes: float,
    *,
    device: str = "cpu",
    clip_rate: float = 2e-3,
    t5_rate: float = 5e-3,
    clip_batch: int = 128,
    t5_batch: int = 48,
) -> Text:
    """Train for `minutes` on all the subjects, so that waves of the flow need no new words; continues an interrupted
    run, and returns at once where the minutes are spent. What it learns is kept in `work`/text.pt."""
    rng = random.Random(11)
    torch.manual_seed(11)
    text = Text(work).to(device)
    model = nn.ModuleDict({"text": text, "tower": PictureTower(), "pretext": Pretext(len(text.tokenizers[2]))}).to(
        device
    )
    average, budget = Average(list(text.parameters()), 0.99), Budget(minutes, "text encoders")
    optimizer = torch.optim.AdamW(groups(model, clip_rate, t5_rate), betas=(0.9, 0.98), weight_decay=0.05)
    kept = {"model": model, "average": average, "budget": budget, "optimizer": optimizer}
    checkpoint = work / "text.pt"
    if restore_parts(kept, checkpoint):
        rng.seed(budget.steps)
        torch.manual_seed(budget.steps)
    if budget.spent < minutes * 60:
        if process()[1] > 1:
            raise UserError("the text encoders have minutes left: finish them with one process first.")
        if (work / "flow.pt").exists():
            raise UserError(
                f"{work / 'flow.pt'} learnt with text encoders of {budget.spent / 60:.3g} minutes: give no more "
                "as --text-minutes, or another --work."
            )
        pool = Pool(
            art, vae.to(device).eval().requires_grad_(False), text, scenes.SUBJECTS, KINDS, 12_000, seed=budget.steps
        )
        pool.renew(96)
        for done in budget:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * min(1.0, (budget.steps + 1) / 100) * cosine(done, 0.3, 0.02)
            losses = {"clip": contrast(model, pool, clip_batch)}
            losses |= dict(zip(("words", "letters"), read(model, scenes.SUBJECTS, t5_batch, rng), strict=True))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update()
            budget.notes = {name: f"{loss.item():.3f}" for name, loss in losses.items()}
            pool.renew()
            if budget.steps % 200 == 199:
                save_parts(kept, checkpoint)
        save_parts(kept, checkpoint)
    average.swap()
    return text.eval().requires_grad_(False)


def groups(model: nn.ModuleDict, clip_rate: float, t5_rate: float) -> list[dict]:
    """Parameters by learning rate: the CLIPs with their tower, the T5 with its pretext, and its table of distances.

    The few numbers of that table have far to go, and must not decay.
    """
    found: dict[str, list] = {"clip": [], "t5": [], "distances": []}
    for name, parameter in model.named_parameters():
        of_t5 = name.startswith(("text.text_encoder_3", "pretext"))
        found["distances" if "relative_attention_bias" in name else "t5" if of_t5 else "clip"].append(parameter)
    rates = {"clip": clip_rate, "t5": t5_rate, "distances": 10 * t5_rate}
    decays = {"distances": {"weight_decay": 0.0}}
    return [{"params": p, "lr": rates[n], "initial_lr": rates[n]} | decays.get(n, {}) for n, p in found.items()]


def contrast(model: nn.ModuleDict, pool: Pool, batch: int) -> torch.Tensor:
    """CLIP's loss, the mean of both encoders and both directions."""
    text, tower, chosen = model["text"], model["tower"], pool.sample(batch)
    scale, same = tower.scale.exp().clamp(max=50), torch.arange(batch, device=chosen.latents.device)
    loss = torch.zeros((), device=chosen.latents.device)
    encoders = (text.text_encoder, text.text_encoder_2)
    for seen, encoder, tokenizer in zip(tower(chosen.latents), encoders, text.tokenizers, strict=False):
        ids = torch.where(chosen.clip < 0, tokenizer.pad_token_id, chosen.clip)
        said = normalize(encoder(ids).text_embeds, dim=-1)
        logits = scale * seen @ said.T
        loss = loss + (cross_entropy(logits, same) + cross_entropy(logits.T, same)) / 4
    return loss


def read(
    model: nn.ModuleDict, subjects: list[scenes.Subject], batch: int, rng: random.Random
) -> tuple[torch.Tensor, ...]:
    """The T5's two losses, on captions of any length of padding: the pipeline pads to 256, and nothing masks it."""
    length = rng.choices((32, 40, 77, 256), (0.7, 0.2, 0.07, 0.03))[0]
    asked = [
        scenes.random_scene(rng, subjects, rng.choice((*KINDS, "sign", "sign", "sign")))
        for _ in range(batch if length < 77 else batch // 8)
    ]
    prompts = [random_caption(scene, rng) for scene in asked]
    ids, written = tokens_and_letters(model["text"], asked, prompts, length)
    device = next(model.parameters()).device
    ids, written = ids.to(device), written.to(device)
    hidden = (torch.rand(ids.shape, device=device) < HIDDEN) & (ids != 0) & (written == 0).all(-1)
    unknown = model["text"].tokenizers[2].unk_token_id
    output = model["text"].text_encoder_3(ids.masked_fill(hidden, unknown))[0]
    return model["pretext"](output, ids, written)
