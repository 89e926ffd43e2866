"""What all explorers share: controls, Draw and Stop, pictures side by side, and a gallery.

Where no kernel runs, and in a notebook that was saved, the last pictures stand in the explorer's place with their
settings.
"""

import contextlib
import html
import random
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .drawing import Watch, own_settings
from .drawn import Drawn, summary
from .rounds import Rounds
from .showing import WIDTH, figures, image_html, side_by_side

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
SCRIPT = Path(__file__).with_name("explorer.js")


class Explorer(Rounds):
    """An explorer for a function of one's own is a subclass with `draw`, and `own` where it has more controls.

    A notebook shows an explorer that is the last line of a cell; `box` is its widget.
    """

    title = "Explorer"
    in_view: tuple[str, ...] = ("seed", "steps")  # of the shared controls; the others are folded away

    def __init__(self, pipe, prompt: str = IDEAS[0], *, live: bool | None = None):
        """
        Args:
            pipe: the pipeline; explorers of one pipeline wait for each other.
            live: draw at each change of a control; None is yes for a small model. With nano-turbo the picture follows
                the typing too.

        Raises:
            ImportError: ipywidgets is not installed.
        """
        try:
            from . import controls as ui
        except ModuleNotFoundError as error:
            if error.name != "ipywidgets":
                raise
            name = type(self).__name__
            raise ImportError(
                f"{name} needs ipywidgets: pip install 'sd3kit[lab]', or use the function of the same name."
            ) from error
        if live is None:
            live = sum(weight.numel() for weight in pipe.transformer.parameters()) < LIVE_PARAMETERS
        super().__init__()
        self.pipe, self.ui = pipe, ui
        self.shown: list[Drawn] = []  # side by side
        self.made: list[Drawn] = []  # the gallery's, the newest first
        self._held = False  # while controls are set without drawing
        self._kept_at = 0.0  # when the last picture went into the gallery
        self._handle = None  # of the still in the notebook
        self.inputs = shared = ui.shared(pipe, prompt)
        self._follows = live and own_settings(pipe)["steps"] <= FEW
        shared["prompt"].continuous_update = self._follows  # at each letter, and not at Enter
        self.inputs = dict(shared)
        own = self.own()
        self._live = ui.control("Checkbox", "Draw at each change", value=live, indent=False)
        self._seeds = ui.control("Dropdown", "Seeds at once", options=[1, 2, 4])
        names = [(one.description, name) for name, one in self.inputs.items()]
        self._compared = ui.control("Dropdown", "Compare", options=[("nothing", ""), *names])
        self._other = ui.control("Text", "with the value")
        self._draw = ui.button("Draw", "Draw with these settings", self.start, button_style="primary")
        self._stopper = ui.button("Stop", "Stop drawing within one step", self.stop)
        self._said, self._bar, self._pictures, self._below = (ui.HTML() for _ in range(4))
        self._gallery = ui.row([])
        self.box = ui.column(self._layout(shared, own))
        self.box.add_class("sd3kit-explorer")
        for one in (*self.inputs.values(), self._seeds, self._compared, self._other):
            one.observe(self._changed, "value")
        self.say("Ready.")
        self.refresh()

    def _layout(self, shared: Mapping[str, Any], own: list) -> list:
        """The prompt with Draw beside it, seed and steps in view, the rest folded away; pictures to the right."""
        ui = self.ui
        script = html.escape(SCRIPT.read_text(encoding="utf-8"), quote=True)
        # where this shows, the still in its place does not; and folded panes' titles are too pale to be read easily
        style = f'<style>[data-sd3kit="{self._said.model_id}"]{{display:none}}'
        style += ".sd3kit-explorer [class*=Collapse-header]{color:var(--jp-ui-font-color1,#222)}</style>"
        heading = f'<h2 style="font-size:1.2em;margin:4px 0">{html.escape(self.title)}</h2>{style}'
        heading += f'<img alt="" style="display:none" src="data:," onerror="{script}">'
        another = ui.button(
            "Another seed", "Set a seed at random", lambda: shared["seed"].set_trait("value", random.randrange(10_000))
        )
        shared["seed"].layout.width = "250px"
        view = [shared[name] for name in self.in_view if name in shared and name != "seed"]
        more = [one for name, one in shared.items() if name not in (*self.in_view, "prompt")]
        more += [self._seeds, self._compared, self._other, self._live]
        half = {"flex": "1 1 300px", "min_width": "260px"}
        left = ui.column(
            [*own, ui.row([shared["seed"], another]), *view, ui.folded({"More": ui.column(more)} | self.panes())],
            **half,
        )
        left.layout.max_width = "480px"
        self._said.add_class("sd3kit-said")
        self._bar.layout.min_height = "32px"
        self._pictures.layout.min_height = f"{WIDTH + 60}px"  # nothing jumps when a picture comes
        right = ui.column([self._said, self._bar, self._pictures, self._below], **half)
        top = ui.row([shared["prompt"], self._draw, self._stopper])
        return [ui.HTML(heading), top, ui.row([left, right], align_items="flex-start"), self._gallery]

    # -- what a subclass gives

    def draw(self, settings: dict[str, Any], watch: Watch, stop: threading.Event) -> Drawn:
        """Draw with the settings, a copy of its own; called in the thread."""
        raise NotImplementedError

    def own(self) -> list:
        """The controls that stand first, besides the shared ones; those of its settings are put into `inputs`."""
        return []

    def panes(self) -> dict:
        """Further folded panes, by title."""
        return {}

    def below(self) -> str:
        """What stands below the pictures, as HTML; asked for at each change."""
        return ""

    # -- settings

    def settings(self) -> dict[str, Any]:
        """The controls' values, by name."""
        return {name: one.value for name, one in self.inputs.items()}

    def restore(self, settings: Mapping[str, Any]) -> None:
        """Set the controls that these settings name, such as `from_png`'s, without drawing; others are passed over.

        Raises:
            ValueError: a value that a control does not offer; the controls stay as they were.
        """
        before, self._held = self.settings(), True
        try:
            for name in [name for name in settings if name in before]:
                with contextlib.suppress(Exception):  # traitlets' own, of several kinds
                    self.inputs[name].value = settings[name]
                if self.inputs[name].value != settings[name]:  # a slider moves what is out of range to its end
                    for other, old in before.items():
                        self.inputs[other].value = old
                    raise ValueError(f"This explorer cannot show {name} {settings[name]}.")
        finally:
            self._held = False
        self.refresh()

    def jobs(self) -> list[dict[str, Any]]:
        """The settings of each picture to draw: seed after seed, each beside the one that it is compared with.

        Raises:
            ValueError: the value to compare with is none of its setting's.
        """
        base, name, text = self.settings(), self._compared.value, self._other.value
        made = [base | {"seed": base["seed"] + n} for n in range(self._seeds.value)]
        kind = type(base.get(name))
        if not name or (kind is not bool and not text.strip()):  # a box has but one other value
            return made
        try:
            other = {name: not base[name] if kind is bool else kind(text)}
        except ValueError:
            called = self.inputs[name].description.lower()
            raise ValueError(f"Type another value of {called} to compare with, not {text!r}.") from None
        return [job | change for job in made for change in ({}, other)]

    def _changed(self, _) -> None:
        if not self._held:
            self.refresh()
            if self._live.value:
                self.start()

    def refresh(self) -> None:
        """Show what depends on the controls anew."""
        self._below.value = self.below()

    # -- what is shown and kept

    def say(self, words: str, error: bool = False) -> None:
        """Show one line, which a screen reader reads out when it has time, an error at once."""
        role, colour = ("alert", "color:var(--jp-error-color1,#B00020);font-weight:600") if error else ("status", "")
        live = "assertive" if error else "polite"
        self._said.value = f'<div role="{role}" aria-live="{live}" style="{colour}">{html.escape(words)}</div>'

    def show(self, made: list[Drawn]) -> None:
        """Show pictures side by side; the still in the notebook follows."""
        self.shown = list(made)
        self._pictures.value = side_by_side(figures(made))
        self.refresh()
        if self._handle is not None:
            self._handle.update(self.still(), raw=True)

    def _keep(self, drawn: Drawn, controls: dict[str, Any]) -> None:
        """Add a picture to the gallery, with the controls as they were; the oldest goes when it is full."""
        ui, before, now = self.ui, self._gallery.children, time.monotonic()
        if self._follows and len(self._asked or ()) == 1 and now - self._kept_at < PASSING:
            before, passed, self.made = before[1:], before[:1], self.made[1:]
        else:
            passed = ()
        self._kept_at = now
        number = before[0].number + 1 if before else 1
        tip = f"{drawn.alt}. {summary(drawn.settings)}"
        back = ui.button(f"Back to {number}", tip, lambda: self.back(drawn, controls))
        small = ui.HTML(image_html(drawn.image, f"Picture {number}: {drawn.alt}", 96))
        item = ui.column([small, back], width="104px", margin="2px")
        item.number = number
        self.made = [drawn, *self.made][:KEPT]
        self._gallery.children = (item, *before[: KEPT - 1])
        for old in (*before[KEPT - 1 :], *passed):
            for part in (*old.children, old):
                part.close()

    def back(self, drawn: Drawn, controls: Mapping[str, Any]) -> None:
        """Return to a picture that was made: its settings and the picture itself, without drawing it again."""
        with self._state:
            self._stop.set()
            self._stop, self._asked = threading.Event(), None
            self.restore(controls)
            self.show([drawn])
            self._bar.value, self._stopper.button_style = "", ""
            self.say(f"Back to: {drawn.alt}.")

    def still(self) -> dict[str, str]:
        """The last pictures with their settings, as a notebook keeps them for where no kernel runs."""
        told = "; ".join(f"{one.alt}; {summary(one.settings)}" for one in self.shown) or "nothing drawn yet"
        pictures = side_by_side(figures(self.shown, links=False)) + self.below() if self.shown else ""
        note = f"<p><em>{html.escape(self.title)}, an explorer: run this cell to turn its knobs.</em></p>"
        name = self._said.model_id
        # where the explorer is not, its place is hidden: JupyterLab would show "model not found" there
        alone = f'.jp-OutputArea:has([data-sd3kit="{name}"]):not(:has(.sd3kit-explorer))'
        style = f"<style>{alone} > .jp-OutputArea-child:has(.jupyter-widgets){{display:none}}</style>"
        page = f'<div data-sd3kit="{name}">{style}{pictures}{note}</div>'
        return {"text/html": page, "text/plain": f"{self.title}: {told}"}

    def _ipython_display_(self) -> None:
        """Show the explorer after its still, which it hides; a small model draws a first picture at once."""
        from IPython.display import display

        handle = display(self.still(), raw=True, display_id=True)
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        told = "An explorer: run this cell to use it."
        display({"application/vnd.jupyter.widget-view+json": view, "text/plain": told}, raw=True)
        if self._live.value and not self.shown:
            self.start()
            self.wait(60)  # so that this cell's output holds the picture, for a notebook that is run by a program too
            handle.update(self.still(), raw=True)
        self._handle = handle
