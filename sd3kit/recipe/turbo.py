"""nano-turbo: a LoRA by which nano draws in four steps without guidance what it draws in 28 guided ones.

Distillation of steps on the student's own path. From where the student stands, at one of its few noise levels, the
teacher goes on by small guided Euler steps to the student's next level; the straight line between the two is the
velocity that the student has to predict in one pass. Then the student takes that step itself, so that it learns where
it really goes, errors and all. Progressive distillation (Salimans and Ho, arXiv 2202.00512) takes the teacher's own
path instead and halves the steps in rounds; guidance goes in as in Meng et al. (arXiv 2210.03142).
"""

import itertools
import random
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from . import scenes
from .checkpoints import mark, restore_parts, save_parts, whole_files
from .pool import random_caption
from .text import Text, cut
from .training import Average, Budget, Guard, cosine

RANK = 16
LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
COUNTS = (4, 4, 4, 4, 2, 1)  # the student's steps, as often as they are practised
GUIDANCE = 7.0  # the teacher's
SUBSTEPS = 8  # of the teacher, over the whole path; by the judge, they draw as well as 28
LAST = 0.5  # the noise level of the student's last step
FULL_FROM = 0.8  # of the time; until then the text is padded to the longest of the batch, as in most of nano's training
KINDS = ("single",) * 4 + ("sign",) * 3 + ("pair", "count", "split")


def scheduler(pipe: StableDiffusion3Pipeline, steps: int = 4, last: float | None = LAST):
    """diffusers' scheduler with the student's noise levels.

    As SD3 sets it, the last of few steps starts at a level near 0, where nothing is left to do: of four steps one is
    lost. `shift_terminal` lets it start at `last`. One step starts at 1, and cannot be stretched: NaN.
    """
    terminal = None if steps == 1 else last
    return type(pipe.scheduler).from_config(pipe.scheduler.config, shift_terminal=terminal)


def levels(pipe: StableDiffusion3Pipeline, steps: int, between: int) -> torch.Tensor:
    """The noise levels (steps, between + 1) of each of the student's steps, with the teacher's between them."""
    own = scheduler(pipe, steps)
    own.set_timesteps(steps)
    plain = own.sigmas / (own.shift - (own.shift - 1) * own.sigmas)
    plain = torch.stack([torch.linspace(a, b, between + 1) for a, b in itertools.pairwise(plain.tolist())])
    return own.shift * plain / (1 + (own.shift - 1) * plain)


@torch.no_grad()
def teach(velocity, x: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
    """Where the teacher's guided steps lead from x (N, 16, h, w) along the noise levels of `path`."""
    for here, there in itertools.pairwise(path):
        x = x + (there - here) * velocity(x, here)
    return x


def train(pipe: StableDiffusion3Pipeline, work: Path, minutes: float, *, subjects: int, batch: int = 8,
          rate: float = 2e-3, guidance: float = GUIDANCE, seed: int = 0) -> StableDiffusion3Pipeline:  # fmt: skip
    """Train the adapter "turbo" on the pipeline's transformer for `minutes`; continues from `work`/turbo.pt.

    UserError: that was begun for another transformer or guidance.
    """
    rng, device, model = random.Random(seed), pipe.device, pipe.transformer
    torch.manual_seed(seed)
    text, began = Text.of(pipe), {"transformer": mark(model.parameters()), "guidance": f"{guidance:g}"}
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS)), adapter_name="turbo")
    weights = [p for p in model.parameters() if p.requires_grad]
    adapter = torch.nn.ParameterList(weights)
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    average, budget = Average(weights, 0.99), Budget(minutes, "turbo")
    guard = Guard(average, optimizer)
    kept = {"adapter": adapter, "average": average, "budget": budget, "optimizer": optimizer, "guard": guard}
    if restore_parts(kept, work / "turbo.pt", began):
        rng.seed(budget.steps)
        torch.manual_seed(budget.steps)
    known, smooth, at = scenes.SUBJECTS[:subjects], 0.0, None
    for done in budget:
        for group in optimizer.param_groups:
            group["lr"] = rate * guard.slower * min(1.0, (budget.steps + 1) / 50) * cosine(done, 0.3, 0.05)
        if at is None:
            asked = [scenes.random_scene(rng, known, rng.choice(KINDS)) for _ in range(batch)]
            ids = text.tokens([random_caption(scene, rng) for scene in asked] + [""] * batch, 77, 40)
            if done < FULL_FROM:
                ids = cut(ids)
            with torch.no_grad():
                both = text.encode(*(each.to(device) for each in ids), torch.ones(2 * batch, 3, device=device))
            captions = [each[:batch] for each in both]
            steps = rng.choice(COUNTS)
            paths, at = levels(pipe, steps, SUBSTEPS // steps).to(device), 0
            x = torch.randn(batch, 16, 16, 16, device=device)

        def guided(x, sigma, both=both):
            model.disable_adapters()
            said = model(x.repeat(2, 1, 1, 1), *both, sigma.expand(2 * batch) * 1000, return_dict=False)[0]
            model.enable_adapters()
            caption, empty = said.chunk(2)
            return torch.lerp(empty, caption, guidance)

        path = paths[at]
        wanted = (teach(guided, x, path) - x) / (path[-1] - path[0])
        velocity = model(x, *captions, path[0].expand(batch) * 1000, return_dict=False)[0]
        # by the length of the step: with its square, as an error of the picture has it, the first ones, which decide
        # what is drawn, would count for nothing
        loss = (velocity - wanted).square().mean() * (path[0] - path[-1])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if guard.follow(norm):
            smooth, at = 0.0, None
            continue
        x, at = (x + (path[-1] - path[0]) * velocity).detach(), at + 1
        at = None if at == len(paths) else at
        smooth += (loss.item() - smooth) * (0.02 if smooth else 1.0)  # a run that goes on has read none yet
        budget.notes = {"loss": f"{smooth:.4f}"}
        if budget.steps % 50 == 49:
            if guard.watch(smooth):
                smooth = 0.0
            save_parts(kept, work / "turbo.pt", began=began)
    save_parts(kept, work / "turbo.pt", began=began)
    average.swap()
    return pipe


def export(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    """Save the adapter as diffusers loads it, in float16, and the scheduler that it wants."""
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="turbo")
    with whole_files(folder) as part:
        pipe.save_lora_weights(part, transformer_lora_layers={name: value.half() for name, value in layers.items()})
        scheduler(pipe).save_pretrained(part / "scheduler")
