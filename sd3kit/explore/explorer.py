"""What all explorers share: controls, Draw and Stop, pictures side by side, and a gallery.

Drawings run in threads, so that the notebook stays free: a round of pictures at a time, and the newest round wins.
Where no kernel runs, and in a notebook that was saved, the last pictures stand in the explorer's place with their
settings.
"""

import html
import random
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .controls import button, control, row, shared, widgets
from .drawing import Step, Stopped, latent_to_rgb, own_settings
from .drawn import WIDTH, Drawn, figures, image_html, side_by_side

IDEAS = (
    "a fox on a blue background, flat",
    "an owl on a teal background, 3d",
    "a penguin holding a sign that says open",
    "a cat next to a rocket on a green background",
    "three apples on a white background",
    "A cat holding a sign that says hello world",
)
KEPT = 12  # pictures of the gallery
LIVE_PARAMETERS = 10**8  # a model with fewer is quick enough to draw at every change
FEW = 4  # steps of a model whose pictures follow each letter that is typed
PASSING = 1.0  # seconds in which such a picture makes place for the next one in the gallery
SCRIPT, STYLE = (Path(__file__).with_name(f"explorer.{kind}") for kind in ("js", "css"))


class Explorer:
    """An explorer; a notebook shows one that is the last line of a cell, and `box` is its widget.

    One for a function of one's own is a subclass with `draw(**settings)`, which is called in the thread, with `watch`
    and `stop` among the settings, and gives a `Drawn`; and with `own` where it has more controls.
    """

    title = "Explorer"

    def __init__(self, pipe, prompt: str = IDEAS[0], *, live: bool | None = None):
        """
        Args:
            live: draw at each change of a control; None is yes for a small model. With nano-turbo the picture follows
                the typing too.
        """
        if widgets is None:
            raise ImportError("Explorers need ipywidgets: pip install 'sd3kit[lab]', or use the functions.")
        if live is None:
            live = sum(weight.numel() for weight in pipe.transformer.parameters()) < LIVE_PARAMETERS
        self.pipe, self.inputs = pipe, shared(pipe, prompt)
        self.shown: list[Drawn] = []  # side by side
        self._beside: list[Drawn] = []  # those that the next ones are compared with
        self._state = threading.RLock()  # of what follows, and of the page
        self._stop = threading.Event()  # of the newest round, which alone may show itself
        self._busy, self._thread = False, None
        self._held = False  # while controls are set without drawing
        self._handle = None  # of the still in the notebook
        # pictures come so fast that they follow each letter, and previews between them would only flicker
        self._follows = live and own_settings(pipe)["steps"] <= FEW
        self.inputs["prompt"].continuous_update = self._follows
        self._seeds = control("Dropdown", "Seeds at once", options=[1, 2, 4])
        self._compare = control("Checkbox", "Compare the next with these", value=False, indent=False)
        self._live = control("Checkbox", "Draw at each change", value=live, indent=False)
        self._draw = button("Draw", "Draw with these settings", self.start, button_style="primary")
        self._stopper = button("Stop", "Stop drawing within one step", self.stop)
        self._said, self._bar, self._pictures, self._below = (widgets.HTML() for _ in range(4))
        self._gallery = row([])
        self.box = widgets.VBox(self._layout())
        self._name = f"sd3kit-{self.box.model_id}"
        self.box.add_class("sd3kit-explorer").add_class(self._name)
        for one in (*self.inputs.values(), self._seeds):
            one.observe(self._changed, "value")
        self._compare.observe(self._hold, "value")
        self.say("Ready.")
        self.refresh()

    def _layout(self) -> list:
        """The prompt with Draw beside it, seed and steps in view, the rest folded away; pictures to the right."""
        every = dict(self.inputs)
        first = [*(self.own() or ()), *(one for name, one in self.inputs.items() if name not in every)]
        script = html.escape(SCRIPT.read_text(encoding="utf-8"), quote=True)
        heading = f'<h2 style="font-size:1.2em;margin:4px 0">{html.escape(self.title)}</h2>'
        heading += f'<img alt="" style="display:none" src="data:," onerror="{script}">'
        prompt, seed, steps = (every.pop(name) for name in ("prompt", "seed", "steps"))
        another = button("Another seed", "At random", lambda: seed.set_trait("value", random.randrange(10_000)))
        ideas = [button(idea, "Draw this", lambda idea=idea: prompt.set_trait("value", idea)) for idea in IDEAS]
        more = [one for one in every.values() if one not in first] + [self._seeds, self._compare, self._live]
        panes = widgets.Accordion([widgets.VBox(more), row(ideas)], selected_index=None)
        for place, title in enumerate(("More", "Ideas")):
            panes.set_title(place, title)
        half = {"flex": "1 1 300px", "min_width": "260px"}
        left = widgets.VBox([*first, row([seed, another]), steps, panes], layout={"max_width": "480px", **half})
        self._said.add_class("sd3kit-said")
        self._bar.layout.min_height = "32px"
        self._pictures.layout.min_height = f"{WIDTH + 60}px"  # nothing jumps when a picture comes
        right = widgets.VBox([self._said, self._bar, self._pictures, self._below], layout=half)
        rows = row([prompt, self._draw, self._stopper]), row([left, right], align_items="flex-start")
        return [widgets.HTML(heading), *rows, self._gallery]

    def own(self) -> list | None:
        """Put the controls of further settings into `inputs`; gives those of the others that stand first, or none."""

    def below(self) -> str:
        """What stands below the pictures, as HTML; asked for at each change."""
        return ""

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Set the controls that these settings name, such as `from_png`'s, without drawing; others are passed over."""
        self._held = True
        try:
            for name in settings.keys() & self.inputs.keys():
                one, value = self.inputs[name], settings[name]
                if hasattr(one, "options") and value not in one.options:
                    one.options = sorted({*one.options, value})
                elif hasattr(one, "max"):  # a slider would take its end for what lies beyond, without a word
                    one.max, one.min = max(one.max, value), min(one.min, value)
                one.value = value
        finally:
            self._held = False
        self.refresh()

    def _changed(self, _) -> None:
        if not self._held:
            self.refresh()
            if self._live.value:
                self.start()

    def _hold(self, change) -> None:
        self._beside = self.shown if change["new"] else []

    def start(self) -> None:
        """Draw with the controls as they are; what is being drawn with other settings is stopped."""
        base = {name: one.value for name, one in self.inputs.items()}
        jobs = [base | {"seed": base["seed"] + n} for n in range(self._seeds.value)]
        with self._state:
            stop = self._round(busy=True)
            self.say("Drawing…")
            # those of older rounds are at their end, or wait for their turn and hear that they are stopped
            self._thread = threading.Thread(target=self._work, args=(jobs, stop), name="sd3kit explorer", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the drawing within one step."""
        with self._state:
            if self._busy:
                self._stop.set()
                self.say("Stopping…")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait in a script until the drawing has ended; False where `timeout` seconds were not enough."""
        if self._thread is not None:
            self._thread.join(timeout)
        return self._thread is None or not self._thread.is_alive()

    def _round(self, busy: bool) -> threading.Event:
        """Stop the round that runs, and begin another, or none; gives its event."""
        self._stop.set()
        self._stop, self._busy, self._bar.value = threading.Event(), busy, ""
        # white is readable on the red of "danger", not on the orange of "warning"
        self._stopper.button_style = "danger" if busy else ""
        return self._stop

    def _work(self, jobs: list[dict[str, Any]], stop: threading.Event) -> None:
        """One round, in its thread; it shows nothing once another, or a return to a picture, has taken its place."""
        start, made, failed = time.perf_counter(), [], False

        def watch(step: Step) -> None:
            look, job = latent_to_rgb(self.pipe, step.latents), jobs[len(made)]
            which = f"picture {len(made) + 1} of {len(jobs)}, " if len(jobs) > 1 else ""
            bar = f'<progress max="{step.total}" value="{step.number}" aria-label="Steps drawn"></progress>'
            words = f"Preview of step {step.number} of {step.total}: {job['prompt']}; seed {job['seed']}"
            with self._state:
                if stop is not self._stop:
                    raise Stopped
                self._bar.value = f"{bar} {which}step {step.number} of {step.total}, σ {step.sigma:.2f}"
                self._pictures.value = side_by_side([*figures(self._beside + made), image_html(look, words)])

        try:
            for job in jobs:
                drawn = self.draw(watch=None if self._follows and self.shown else watch, stop=stop, **job)
                made.append(drawn)
                with self._state:
                    if stop is not self._stop:
                        raise Stopped
                    self.show(self._beside + made)
                    if not drawn.stopped:
                        self._keep(drawn, job)
                if drawn.stopped:
                    break
            many = f"{len(made)} pictures, each " if len(made) > 1 else ""
            share = f" (strength {job['strength']:g} of {job['steps']})" if "strength" in job else ""
            words = f"Done: {many}{drawn.total} steps{share} in {time.perf_counter() - start:.1f} s."
            if drawn.stopped:
                words = f"Stopped after {drawn.steps} of {drawn.total} steps: this is what there was."
        except Stopped:
            words = "Stopped before the first step."
        except Exception as error:
            words, failed = one_line(error), True
        with self._state:
            if stop is self._stop:
                self._round(busy=False)
                self.say(words, failed)

    def refresh(self) -> None:
        """Show what depends on the controls anew."""
        self._below.value = self.below()

    def say(self, words: str, error: bool = False) -> None:
        """Show one line, which a screen reader reads out when it has time, an error at once."""
        role, colour = ("alert", "color:var(--jp-error-color1,#B00020);font-weight:600") if error else ("status", "")
        self._said.value = f'<div role="{role}" style="{colour}">{html.escape(words)}</div>'

    def show(self, made: list[Drawn]) -> None:
        """Show pictures side by side; the still in the notebook follows."""
        self.shown = list(made)
        self._pictures.value = side_by_side(figures(made))
        self.refresh()
        if self._handle is not None:
            self._handle.update(self.still(), raw=True)

    def _keep(self, drawn: Drawn, controls: dict[str, Any]) -> None:
        """Add a picture to the gallery, with the controls as they were; the oldest goes when it is full."""
        before, now = self._gallery.children, time.monotonic()
        passing = before and self._follows and self._seeds.value == 1 and now - before[0].at < PASSING
        number = before[0].number + 1 if before else 1
        small = widgets.HTML(image_html(drawn.image, f"Picture {number}: {drawn.alt}", 96))
        back = button(f"Back to {number}", drawn.caption, lambda: self.back(drawn, controls))
        item = widgets.VBox([small, back], layout={"width": "104px", "margin": "2px"})
        item.number, item.drawn, item.at = number, drawn, now
        self._gallery.children = (item, *before[1 if passing else 0 :])[:KEPT]
        for old in set(before) - set(self._gallery.children):
            for part in (*old.children, old):
                part.close()

    def back(self, drawn: Drawn, controls: Mapping[str, Any]) -> None:
        """Return to a picture that was made: its settings and the picture itself, without drawing it again."""
        with self._state:
            self._round(busy=False)
            self.restore(controls)
            self.show([drawn])
            self.say(f"Back to: {drawn.alt}.")

    def still(self) -> dict[str, str]:
        """The last pictures with their settings, as a notebook keeps them for where no kernel runs."""
        told = "; ".join(one.caption for one in self.shown) or "nothing drawn yet"
        pictures = self._pictures.value + self._below.value if self.shown else ""
        note = f"<p><em>{html.escape(self.title)}, an explorer: run this cell to turn its knobs.</em></p>"
        style = STYLE.read_text(encoding="utf-8").replace("NAME", self._name)
        page = f'<div data-sd3kit="{self._name}">{pictures}{note}</div><style>{style}</style>'
        return {"text/html": page, "text/plain": f"{self.title}: {told}"}

    def _ipython_display_(self) -> None:
        """Show the explorer after its still, which it hides; a small model draws a first picture at once."""
        from IPython.display import display

        handle = display(self.still(), raw=True, display_id=True)
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        told = {"text/plain": "An explorer: run this cell to use it."}
        display({"application/vnd.jupyter.widget-view+json": view} | told, raw=True)
        if self._live.value and not self.shown:
            self.start()
            self.wait(60)  # so that this cell's output holds the picture, for a notebook that is run by a program too
            handle.update(self.still(), raw=True)
        self._handle = handle


def one_line(error: Exception) -> str:
    """An error for the status line: its own first line, after its kind where it is not one of ours."""
    if "out of memory" in str(error).lower():
        return "The memory is full: choose a smaller size, or start the kernel anew."
    first = str(error).strip().partition("\n")[0][:240]
    return first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
