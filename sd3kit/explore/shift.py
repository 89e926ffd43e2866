"""Shift and sigma schedule: the functions and their explorer."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..lesson import show
from .drawing import LIMITS, Step, latent_to_rgb, number, scheduler_of, shift_of
from .drawn import Drawn
from .explorer import Explorer
from .text import text_to_image


def sigmas(pipe, steps: int, shift: float) -> torch.Tensor:
    """The noise levels (steps + 1,) from near 1 down to 0, as the pipeline's scheduler sets them."""
    steps = number("steps", steps, *LIMITS["steps"])
    scheduler = scheduler_of(pipe, number("shift", shift, *LIMITS["shift"]), steps)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.cpu()


def schedule(pipe, prompt: str, *, watch: Callable[[Step], Any] | None = None, **settings: Any) -> Drawn:
    """Draw with a shift, and keep what the picture looked like at each step.

    Args:
        watch, **settings, and what is raised: as in `text_to_image`.

    Returns:
        A `Drawn` whose data has `sigmas` (steps + 1,) and `previews`, one for each step that was run.
    """
    if shift_of(pipe.scheduler) is None:
        raise ValueError(f"The pipeline's {type(pipe.scheduler).__name__} has no shift to look at.")
    previews = []

    def keep(step: Step) -> None:
        previews.append(latent_to_rgb(pipe, step.latents))
        if watch is not None:
            watch(step)

    drawn = text_to_image(pipe, prompt, watch=keep, **settings)
    levels = sigmas(pipe, drawn.settings["steps"], drawn.settings["shift"])
    drawn.data |= {"sigmas": levels, "previews": previews}
    return drawn


def curve(levels: torch.Tensor, shift: float, previews: Sequence[Image.Image] = ()) -> show.Picture:
    """The sigmas (steps + 1,) over the steps beside those without shift, and under them previews of some steps."""
    from matplotlib.figure import Figure  # not pyplot, which is not made for threads

    steps = len(levels) - 1
    figure = Figure(figsize=(5.2, 6 if previews else 2.6), layout="constrained")  # its letters serve a telephone too
    grid = figure.add_gridspec(3 if previews else 1, 4, height_ratios=[1.6, 1, 1] if previews else [1])
    axis = figure.add_subplot(grid[0, :])
    axis.plot(range(steps + 1), levels, "o-", color=show.BLUE, markersize=4, label=f"shift {shift:g}")
    plain = levels / (shift - (shift - 1) * levels)  # the shift's inverse
    axis.plot(range(steps + 1), plain, "--", color=show.ORANGE, label="no shift")
    above = int((levels[:-1] > 0.5).sum())
    title = f"Shift {shift:g}: {above} of {steps} steps start above sigma 0.5"
    axis.set(xlabel="step", ylabel="sigma", ylim=(-0.03, 1.03), title=title)
    axis.legend()
    chosen = sorted({round(i) for i in np.linspace(0, len(previews) - 1, min(8, len(previews)))})
    for place, index in enumerate(chosen):
        small = figure.add_subplot(grid[1 + place // 4, place % 4])
        small.imshow(previews[index])
        small.set(xticks=[], yticks=[])
        small.set_xlabel(f"step {index + 1}, σ {float(levels[index + 1]):.2f}", fontsize=8)
    return show.figure(figure, f"Sigma over {steps} steps. {title}")


class Schedule(Explorer):
    """Shift and sigma schedule: the curve follows the sliders at once, the pictures under it as they are drawn."""

    title = "Shift and schedule"

    def own(self):
        if "shift" not in self.inputs:
            raise ValueError(f"The pipeline's {type(self.pipe.scheduler).__name__} has no shift to look at.")
        self.inputs["steps"].value = 14
        return [self.inputs["shift"]]

    def draw(self, **settings):
        drawn = schedule(self.pipe, **settings)
        picture = curve(drawn.data["sigmas"], drawn.settings["shift"], drawn.data["previews"])
        drawn.data["curve"] = picture._repr_html_()
        return drawn

    def below(self):
        now = {name: self.inputs[name].value for name in ("steps", "shift")}
        if any(now.items() <= drawn.settings.items() for drawn in self.shown):
            return "".join(drawn.data["curve"] for drawn in self.shown)
        return curve(sigmas(self.pipe, **now), now["shift"])._repr_html_()
