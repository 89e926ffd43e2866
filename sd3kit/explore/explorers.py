"""The explorers: widgets over the functions of `drawing`, of core ipywidgets that versions 7.7 and 8 share.

Work runs in a thread, so the notebook stays free; a change of a setting stops what is being drawn and draws the newest.
What happened is said in one line, errors too, and the next try works.
"""

import contextlib
import html
import io
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ipywidgets as widgets
from PIL import Image

from ..lesson import show
from . import drawing
from .drawing import Drawn, Step, picture_html
from .work import Worker

IDEAS = (
    "a fox on a blue background, flat",
    "an owl on a teal background, 3d",
    "a penguin holding a sign that says open",
    "a cat next to a rocket on a green background",
    "three apples on a white background",
    "A cat holding a sign that says hello world",
)
ALL = -1  # of the layers or steps: a slider takes no None
KEPT = 12  # pictures of the gallery
LARGEST_SEED = 2**31 - 1  # a number box of a browser holds more, but nobody types them
LIVE_PARAMETERS = 10**8  # a model with fewer is quick enough to draw at every change

# ipywidgets gives the handles of its sliders no name, and replaces whatever stands in an HTML widget, so that a live
# region inside is new each time and not announced. This names the handles after their labels and makes the status
# line's lasting container the live region. A download link that had the focus when a new picture replaced it hands the
# focus to the next one. Where scripts do not run the explorer works without.
_NAMES = """<img alt="" width="0" height="0" style="display:none" src="data:," onerror="(function find(start, tries) {
  var root = start.closest('.sd3kit-explorer');
  if (!root && tries) { setTimeout(function () { find(start, tries - 1); }, 100); }
  if (!root || root.named) { return; }
  root.named = true;
  function name() {
    root.querySelectorAll('.widget-hslider').forEach(function (slider) {
      var label = slider.querySelector('.widget-label');
      slider.querySelectorAll('[role=slider], .ui-slider-handle').forEach(function (handle, i, all) {
        var which = all.length > 1 ? [', from', ', to'][i] : '';
        handle.setAttribute('aria-label', label.textContent + which);
      });
      slider.querySelectorAll('.widget-readout').forEach(function (box) {
        box.setAttribute('role', 'textbox');
        box.setAttribute('aria-label', label.textContent + ', as a number');
      });
    });
    root.querySelectorAll('.sd3kit-said > .widget-html-content').forEach(function (line) {
      line.setAttribute('aria-live', 'polite');
    });
  }
  var link = null;
  document.addEventListener('focusin', function (event) {
    link = root.contains(event.target) && event.target.matches('a[download]') ? event.target : null;
  });
  root.addEventListener('focusout', function () {
    setTimeout(function () { if (link && link.isConnected && document.activeElement !== link) { link = null; } });
  });
  function follow() {
    var next = root.querySelector('a[download]');
    if (link && next && next !== link && document.activeElement === document.body) { next.focus(); }
  }
  new MutationObserver(function () { name(); follow(); }).observe(root, {childList: true, subtree: true});
  name();
})(this, 100)">"""


def _input(kind: Callable[..., widgets.Widget], label: str, **traits: Any) -> widgets.Widget:
    """A labelled control; all are of one width, so that they line up."""
    return kind(
        description=label,
        style={"description_width": "116px"},
        layout=widgets.Layout(width="96%", max_width="440px"),
        **traits,
    )


def _text(label: str, value: str = "") -> widgets.Text:
    # tells its value when Enter is pressed or the box is left, not at each letter
    return _input(widgets.Text, label, value=value, continuous_update=False)


def uploaded(widget: widgets.FileUpload) -> bytes | None:
    """Take the file out of an upload button, in the form of ipywidgets 7 or 8; None where there is none."""
    files = list(widget.value.values()) if isinstance(widget.value, Mapping) else list(widget.value)
    # empty again, or the same file would be no change the next time; 7's trait is read-only but for this
    widget.set_trait("value", type(widget.value)())
    return bytes(files[-1]["content"]) if files else None


def opened(data: bytes) -> Image.Image:
    """A picture from an uploaded file.

    Raises:
        ValueError: it is no picture, or too large a one.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Image.DecompressionBombError as error:
        raise ValueError("This picture is too large to be opened: make it smaller first.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError("This file is not a picture that can be read: use a PNG or JPEG.") from error
    return image


def one_line(error: Exception) -> str:
    """An error for the status line: its own first line, after its kind where it is not one of ours."""
    lines = str(error).strip().splitlines()
    first = (lines[0] if lines else "")[:240]
    if "out of memory" in first.lower():
        return "The memory is full: choose a smaller size, or start the kernel anew."
    return first if isinstance(error, ValueError) and first else f"{type(error).__name__}: {first}"


class Explorer(widgets.VBox):
    """What all explorers share: controls, Draw and Stop, progress with a preview, the picture, and the gallery.

    An explorer for a function of one's own is a subclass with `draw`.
    """

    def __init__(
        self,
        pipe,
        title: str,
        inputs: Mapping[str, widgets.Widget],
        *,
        first: tuple[widgets.Widget, ...] = (),
        others: tuple[widgets.Widget, ...] = (),
        under: tuple[widgets.Widget, ...] = (),
        live: bool | None = None,
    ):
        """
        Args:
            pipe: the pipeline; explorers of one pipeline wait for each other.
            title: its heading.
            inputs: the controls, by the names of `draw`'s settings.
            first, others: further controls, above and below them; under: widgets below the picture.
            live: draw at each change of a control; None is yes for a small model.
        """
        if live is None:
            live = sum(weight.numel() for weight in pipe.transformer.parameters()) < LIVE_PARAMETERS
        self.pipe, self.inputs = pipe, dict(inputs)
        self.made: list[Drawn] = []
        self.shown: Drawn | None = None
        self._worker = Worker(self._failed)
        self._asked: dict | None = None
        # The drawing that may show itself, until it has ended; not one that a newer one, or a return, has replaced.
        self._shows: object = None
        self._showing = threading.RLock()
        self._held = False
        self._look: Callable | None = None
        self._live = widgets.Checkbox(value=live, description="Draw at each change", indent=False)
        self._draw = widgets.Button(description="Draw", button_style="primary", tooltip="Draw with these settings")
        self._stop = widgets.Button(description="Stop", tooltip="Stop drawing within one step")
        for button in (self._draw, self._stop):
            button.layout.width = "96px"
        self._said, self._bar = widgets.HTML(), widgets.HTML()
        self._said.add_class("sd3kit-said")
        self._picture = widgets.HTML(layout=widgets.Layout(min_height="300px"))
        self._gallery = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap"))
        buttons = widgets.HBox([self._draw, self._stop, self._live], layout=widgets.Layout(flex_flow="row wrap"))
        half = {"flex": "1 1 300px", "max_width": "480px", "min_width": "260px"}
        left = widgets.VBox([*first, *self.inputs.values(), *others, buttons], layout=widgets.Layout(**half))
        right = widgets.VBox([self._said, self._bar, self._picture, *under], layout=widgets.Layout(**half))
        heading = widgets.HTML(f'<h2 style="font-size:1.2em;margin:4px 0">{html.escape(title)}</h2>{_NAMES}')
        both = widgets.HBox([left, right], layout=widgets.Layout(flex_flow="row wrap", align_items="flex-start"))
        super().__init__([heading, both, self._gallery])
        self.add_class("sd3kit-explorer")
        for control in self.inputs.values():
            control.observe(self._changed, "value")
        self._draw.on_click(lambda _: self.start())
        self._stop.on_click(lambda _: self.stop())
        self.say("Ready.")

    # -- what a subclass gives

    def draw(self, settings: dict[str, Any], watch: Callable[[Step], None], stop: threading.Event) -> Drawn:
        """Draw with the settings; called in the thread."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The controls' values, by name."""
        return {name: control.value for name, control in self.inputs.items()}

    def restore(self, settings: Mapping[str, Any]) -> list[str]:
        """Set the controls that these settings name, without drawing.

        Returns:
            The names for which there is no control.

        Raises:
            ValueError: a value that a control does not offer; the controls stay as they were.
        """
        before = self.settings()
        with self._quiet():
            for name, value in settings.items():
                if name not in self.inputs:
                    continue
                try:
                    self.inputs[name].value = value
                    kept = self.inputs[name].value == value
                except Exception:  # traitlets' own, of several kinds
                    kept = False
                if not kept:  # a slider moves a value that is out of range to its end
                    for other, old in before.items():
                        self.inputs[other].value = old
                    raise ValueError(f"This explorer cannot show {name} {value}.")
        return [name for name in settings if name not in self.inputs]

    def png_button(self) -> widgets.FileUpload:
        """A button that takes the settings from an uploaded PNG, and draws with them if they are all known here."""
        button = upload_button("Settings from a PNG", ".png")
        button.observe(lambda _: self._from_png(uploaded(button)), "value")
        return button

    def _from_png(self, data: bytes | None) -> None:
        if data is None:
            return
        try:
            unknown = self.restore(drawing.from_png(data))
        except ValueError as error:
            self.say(one_line(error), error=True)
            return
        if unknown:
            self.say(f"This explorer has no {' or '.join(unknown)}: press Draw to use the other settings.")
        else:
            self.start()

    # -- work

    def start(self) -> None:
        """Draw with the controls as they are; what is being drawn with other settings is stopped."""
        settings, token = self.settings(), object()
        with self._showing:
            if self._shows is not None and settings == self._asked:
                return  # leaving the prompt's box by a click on Draw asks twice
            self._asked, self._shows = settings, token
        self._worker.submit(lambda stop: self._work(settings, token, stop))

    def stop(self) -> None:
        """End the drawing within one step."""
        with self._showing:
            if self._shows is not None:
                self._asked = None
                self._worker.stop()
                self.say("Stopping…")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait in a script until the drawing has ended; False where `timeout` seconds were not enough."""
        return self._worker.wait(timeout)

    def look(self, stop: threading.Event | None = None) -> Callable:
        """The preview's map for this pipeline, fitted when it is first needed; `stop` ends the wait for its turn."""
        if self._look is None:
            self._look = drawing.latent_to_rgb(self.pipe, stop)
        return self._look

    def _changed(self, change: Mapping[str, Any]) -> None:
        if self._live.value and not self._held:
            self.start()

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """Set controls without drawing."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _work(self, settings: dict[str, Any], token: object, stop: threading.Event) -> None:
        """One drawing, in the thread; it shows nothing once another has taken its place."""
        quarter = 0

        def watch(step: Step) -> None:
            nonlocal quarter
            with self._showing:
                if self._shows is not token:
                    return
                self._progress(step, settings)
                done = 4 * step.number // step.total
                if done > quarter and step.number < step.total and not stop.is_set():
                    quarter = done
                    self.say(f"{25 * done} percent.")

        drawn, words, failed = None, "Stopped before the first step.", False
        try:
            with self._showing:
                if self._shows is token and not stop.is_set():
                    self.say("Drawing…")
                    self._stop.button_style = "danger"  # white is readable on its red, not on the orange of "warning"
            drawing.check(self.pipe, settings)  # before the wait for another explorer's drawing
            self.look(stop)
            drawn = self.draw(settings, watch, stop)
        except drawing.Stopped:
            pass
        except Exception as error:
            words, failed = one_line(error), True
        with self._showing:
            if self._shows is not token:
                return
            self._shows = None
            if drawn is None:
                self._end(words, failed)
                return
            if not drawn.stopped:
                self._keep(drawn, settings)
            self.show_drawn(drawn)

    def _progress(self, step: Step, settings: dict[str, Any]) -> None:
        bar = (
            f'<progress max="{step.total}" value="{step.number}" aria-label="Steps drawn" style="width:60%"></progress>'
        )
        self._bar.value = f"{bar} step {step.number} of {step.total}, σ {step.sigma:.2f}"
        data = io.BytesIO()
        self.look()(step.latents).save(data, "PNG")
        words = f"Preview of step {step.number} of {step.total}: {settings['prompt']}; seed {settings['seed']}"
        self._picture.value = picture_html(data.getvalue(), words, 320)

    def _failed(self, error: Exception) -> None:
        """An error while showing, which is a fault here and not in the settings."""
        self._end(one_line(error), error=True)

    def _end(self, words: str, error: bool = False) -> None:
        self._bar.value, self._stop.button_style = "", ""
        self.say(words, error)

    def say(self, words: str, error: bool = False) -> None:
        """Show one line, which a screen reader reads out when it has time, an error at once."""
        role, colour = ("alert", "color:#B00020;font-weight:600") if error else ("status", "")
        live = "assertive" if error else "polite"
        self._said.value = f'<div role="{role}" aria-live="{live}" style="{colour}">{html.escape(words)}</div>'

    # -- what was made

    def show_drawn(self, drawn: Drawn) -> None:
        """Show a picture with its time, its settings in words, and a link that downloads it."""
        self.shown = drawn
        png = drawn.png()
        shown = picture_html(png, drawn.alt, 320)
        href = shown.split('"', 2)[1]
        name = f"sd3kit-seed-{drawn.settings['seed']}.png"
        self._picture.value = (
            f'{shown}<a download="{name}" href="{href}" style="text-decoration:underline">Download this PNG</a> '
            f"(its settings are inside)<br>{html.escape(summary(drawn.settings))}"
        )
        if drawn.stopped:
            self._end(f"Stopped after {drawn.steps} of {drawn.total} steps: this is what there was.")
        else:
            self._end(f"Done: {drawn.steps} steps in {drawn.seconds:.1f} s.")

    def _keep(self, drawn: Drawn, controls: dict[str, Any]) -> None:
        """Add a picture to the gallery, with the controls as they were; the oldest goes when it is full."""
        self.made = [drawn, *self.made][:KEPT]
        small = drawn.image.copy()
        small.thumbnail((96, 96))
        data = io.BytesIO()
        small.save(data, "PNG")
        number = 1 + max((item.number for item in self._gallery.children), default=0)
        item = widgets.VBox(layout=widgets.Layout(width="104px", margin="2px"))
        item.number = number
        back = widgets.Button(
            description=f"Back to {number}", tooltip=f"{drawn.alt}. {summary(drawn.settings)}", layout={"width": "96px"}
        )
        back.on_click(lambda _: self.back(drawn, controls))
        item.children = [widgets.HTML(picture_html(data.getvalue(), f"Picture {number}: {drawn.alt}", 96)), back]
        gone = self._gallery.children[KEPT - 1 :]
        self._gallery.children = (item, *self._gallery.children[: KEPT - 1])
        for old in gone:
            for part in (*old.children, old):
                part.close()

    def back(self, drawn: Drawn, controls: Mapping[str, Any]) -> None:
        """Return to a picture that was made: its settings and the picture itself, without drawing it again."""
        with self._showing:
            self._shows = self._asked = None
            self._worker.stop()
            self.restore(controls)
            self.show_drawn(drawn)
            self.say(f"Back to: {drawn.alt}.")


def summary(settings: Mapping[str, Any]) -> str:
    """Settings in one line, such as "seed 3, 28 steps, guidance 7"."""
    parts = [f"seed {settings['seed']}", f"{settings['steps']} steps", f"guidance {settings['guidance']:g}"]
    if settings.get("negative_prompt"):
        parts.append(f"not {settings['negative_prompt']!r}")
    parts += [f"{name} {settings[name]:g}" for name in ("shift", "strength") if name in settings]
    if "size" in settings:
        parts.append(f"{settings['size']} px")
    if "keep" in settings:
        parts.append(f"encoders {settings['keep'] or 'none'}")
    parts += [f"{name} at {scale:g}" for name, scale in settings.get("scales", {}).items()]
    return ", ".join(parts)


def prompt_inputs(pipe, prompt: str, *, size: bool = True, negative: bool = True, shift: bool = True) -> dict:
    """The controls that most explorers share, by the names of the settings."""
    low, high = drawing.sizes(pipe)
    native = drawing.native_size(pipe)
    stride = max(16, native // 8)
    sides = list(range(max(low, native // 2), min(high, 2 * native) + 1, stride))
    inputs = {"prompt": _text("Prompt", prompt)}
    if negative:
        inputs["negative_prompt"] = _text("Negative prompt")
    inputs |= {
        "seed": _input(widgets.BoundedIntText, "Seed", value=0, min=0, max=LARGEST_SEED),
        "steps": _input(widgets.IntSlider, "Steps", value=28, min=1, max=50),
        "guidance": _input(widgets.FloatSlider, "Guidance", value=7.0, min=1.0, max=20.0, step=0.5),
    }
    if shift:
        value = float(pipe.scheduler.shift)
        inputs["shift"] = _input(widgets.FloatSlider, "Shift", value=value, min=0.5, max=12.0, step=0.5)
    if size:
        inputs["size"] = _input(widgets.Dropdown, "Size in pixels", value=native, options=sides)
    return inputs


def seed_button(explorer_inputs: Mapping[str, widgets.Widget]) -> widgets.Button:
    """A button that sets another seed."""
    button = widgets.Button(description="Another seed", tooltip="Set a seed at random", layout={"width": "120px"})

    def change(_) -> None:
        explorer_inputs["seed"].value = random.randrange(10_000)

    button.on_click(change)
    return button


def upload_button(label: str, accept: str) -> widgets.FileUpload:
    return widgets.FileUpload(description=label, accept=accept, multiple=False, layout={"width": "auto"})


def _row(*children: widgets.Widget) -> widgets.HBox:
    return widgets.HBox(list(children), layout=widgets.Layout(flex_flow="row wrap"))


class TextToImage(Explorer):
    """Text to image: prompt, negative prompt, seed, steps, guidance, shift and size."""

    def __init__(self, pipe, prompt: str = IDEAS[0], *, ideas: tuple[str, ...] = IDEAS, live: bool | None = None):
        inputs = prompt_inputs(pipe, prompt)
        self._ideas = _input(widgets.Dropdown, "Ideas", options=[("choose one", ""), *((idea, idea) for idea in ideas)])
        self._ideas.observe(self._take_idea, "value")
        inputs["prompt"].observe(self._leave_idea, "value")
        others = (self._ideas, _row(seed_button(inputs), self.png_button()))
        super().__init__(pipe, "Text to image", inputs, others=others, live=live)

    def draw(self, settings, watch, stop):
        return drawing.text_to_image(self.pipe, watch=watch, stop=stop, **settings)

    def _take_idea(self, change: Mapping[str, Any]) -> None:
        if change["new"]:
            self.inputs["prompt"].value = change["new"]

    def _leave_idea(self, change: Mapping[str, Any]) -> None:
        # only now: a box that is reset at once would let arrow keys reach the first idea alone
        if change["new"] != self._ideas.value:
            self._ideas.value = ""


class ImageToImage(Explorer):
    """Image to image with a strength; with a mask, a box, an ellipse or an uploaded one, inpainting."""

    def __init__(
        self,
        pipe,
        image: Image.Image | None = None,
        prompt: str = IDEAS[0],
        *,
        source: Explorer | None = None,
        live: bool | None = None,
    ):
        """
        Args:
            image: the picture to change; one can be uploaded too.
            source: an explorer whose picture can be taken over.
        """
        inputs = prompt_inputs(pipe, prompt)
        across = {"min": 0, "max": 100, "step": 5}
        inputs |= {
            "strength": _input(widgets.FloatSlider, "Strength", value=0.8, min=0.05, max=1.0, step=0.05),
            "mask": _input(
                widgets.Dropdown,
                "Mask",
                options=[("none: change all", ""), ("box", "box"), ("ellipse", "ellipse"), ("uploaded", "uploaded")],
            ),
            "across": _input(widgets.IntRangeSlider, "Mask across, %", value=(50, 100), **across),
            "down": _input(widgets.IntRangeSlider, "Mask down, %", value=(0, 100), **across),
        }
        self.image = None if image is None else image.copy()
        self._mask_image: Image.Image | None = None
        self._before = widgets.HTML()
        self._image_file = upload_button("Picture", "image/*")
        self._mask_file = upload_button("Mask (white is new)", "image/*")
        self._image_file.observe(lambda _: self._upload(self._image_file, "image"), "value")
        self._mask_file.observe(lambda _: self._upload(self._mask_file, "_mask_image"), "value")
        buttons = [self._image_file, self._mask_file]
        if source is not None:
            take = widgets.Button(
                description="Take the picture above", tooltip="Change the last drawn picture", layout={"width": "180px"}
            )
            take.on_click(lambda _: self._take(source))
            buttons.insert(0, take)
        first, others = (_row(*buttons), self._before), (_row(seed_button(inputs), self.png_button()),)
        super().__init__(pipe, "Image to image and inpainting", inputs, first=first, others=others, live=live)
        for name in ("mask", "across", "down", "size"):
            self.inputs[name].observe(lambda _: self._show_before(), "value")
        self._show_before()

    def draw(self, settings, watch, stop):
        settings, image = dict(settings), self.image
        shape, across, down = (settings.pop(name) for name in ("mask", "across", "down"))
        if image is None:
            raise ValueError("There is no picture to change yet: upload one.")
        if not shape:
            return drawing.image_to_image(self.pipe, image, watch=watch, stop=stop, **settings)
        where = self._mask(shape, across, down, settings["size"])
        return drawing.inpaint(self.pipe, image, where, watch=watch, stop=stop, **settings)

    def back(self, drawn, controls):
        self.image = drawn.data["image"]
        if controls["mask"] == "uploaded":
            self._mask_image = drawn.data["mask"]
        super().back(drawn, controls)
        self._show_before()

    def _mask(self, shape: str, across: tuple[int, int], down: tuple[int, int], size: int) -> Image.Image:
        if shape == "uploaded":
            if self._mask_image is None:
                raise ValueError("There is no mask yet: upload one, or choose box or ellipse.")
            return self._mask_image
        left, right, top, bottom = (edge / 100 for edge in (*across, *down))
        return drawing.mask(shape, left, top, right, bottom, size)

    def _upload(self, file: widgets.FileUpload, name: str) -> None:
        data = uploaded(file)
        if data is None:
            return
        try:
            setattr(self, name, opened(data))
        except ValueError as error:
            self.say(one_line(error), error=True)
            return
        if name == "_mask_image":
            with self._quiet():
                self.inputs["mask"].value = "uploaded"
        self._asked = None  # the same settings, but of another picture
        self._show_before()
        self._changed({})

    def _take(self, source: Explorer) -> None:
        if source.shown is None:
            self.say("There is no picture above yet: draw one first.", error=True)
            return
        self.image, self._asked = source.shown.image, None
        self._show_before()
        self._changed({})

    def _show_before(self) -> None:
        """The picture to change, with a veil where it will be drawn anew."""
        if self.image is None:
            self._before.value = "<p>No picture yet.</p>"
            return
        values = self.settings()
        shown = drawing.square(self.image, values["size"])
        words = "The picture to change"
        if values["mask"]:
            try:
                where = self._mask(values["mask"], values["across"], values["down"], values["size"])
            except ValueError:
                where = None
            if where is not None:
                veil = drawing.square(where, values["size"]).convert("L").point(lambda level: level * 0.55)
                shown.paste(Image.new("RGB", shown.size, show.VERMILION), mask=veil)
                words += f", veiled where it is drawn anew ({values['mask']})"
        data = io.BytesIO()
        shown.save(data, "PNG")
        self._before.value = picture_html(data.getvalue(), words, 160)


class Schedule(Explorer):
    """Shift and sigma schedule: the curve follows the sliders at once, the pictures under it as they are drawn."""

    def __init__(self, pipe, prompt: str = IDEAS[0], *, live: bool | None = None):
        inputs = prompt_inputs(pipe, prompt, size=False, negative=False)
        inputs["steps"].value = 14
        self._curve = widgets.HTML()
        super().__init__(pipe, "Shift and schedule", inputs, under=(self._curve,), live=live)
        for name in ("steps", "shift"):
            self.inputs[name].observe(lambda _: self._show_curve(), "value")
        self._show_curve()

    def draw(self, settings, watch, stop):
        return drawing.schedule(self.pipe, watch=watch, stop=stop, look=self.look(), **settings)

    def show_drawn(self, drawn: Drawn) -> None:
        super().show_drawn(drawn)
        picture = drawing.curve(drawn.data["sigmas"], drawn.settings["shift"], drawn.data["previews"])
        self._curve.value = picture._repr_html_()

    def _show_curve(self) -> None:
        values = self.settings()
        levels = drawing.sigmas(self.pipe, values["steps"], values["shift"])
        self._curve.value = drawing.curve(levels, values["shift"])._repr_html_()


class Attention(Explorer):
    """Where words look: draw once, then pick a word, a layer, a step and a method."""

    def __init__(self, pipe, prompt: str = IDEAS[0], *, live: bool | None = None):
        shared = prompt_inputs(pipe, prompt, negative=False, shift=False)
        inputs = {name: shared[name] for name in ("prompt", "seed", "steps", "size")}
        layers = [("all", ALL), *((str(n + 1), n) for n in range(len(pipe.transformer.transformer_blocks)))]
        methods = [("attention weights", "raw"), ("ConceptAttention", "concept")]
        self.views = {
            "word": _input(widgets.Dropdown, "Word", options=drawing.words_of(prompt)),
            "layer": _input(widgets.SelectionSlider, "Layer", options=layers),
            "step": _input(widgets.SelectionSlider, "Step", options=[("all", ALL)]),
            "method": _input(widgets.Dropdown, "Method", options=methods),
        }
        self._map = widgets.HTML()
        views = tuple(self.views.values())
        super().__init__(pipe, "Where words look", inputs, others=views, under=(self._map,), live=live)
        for view in views:
            view.observe(lambda _: self._show_map(), "value")

    def draw(self, settings, watch, stop):
        return drawing.attention(self.pipe, watch=watch, stop=stop, **settings)

    def show_drawn(self, drawn: Drawn) -> None:
        super().show_drawn(drawn)
        words, steps = drawn.data["words"], drawn.data["raw"].shape[1]
        word = self.views["word"].value
        self.views["word"].options = words
        self.views["word"].value = word if word in words else words[0]
        self.views["step"].options = [("all", ALL), *((str(n + 1), n) for n in range(steps))]
        self._show_map()

    def _show_map(self) -> None:
        values = {name: None if view.value == ALL else view.value for name, view in self.views.items()}
        if self.shown is None or values["word"] not in self.shown.data["words"]:
            return
        try:
            picture = drawing.heat(self.shown, values.pop("word"), **values)
        except ValueError:
            return  # the controls are being set to another picture
        data = io.BytesIO()
        picture.image.save(data, "PNG")
        self._map.value = picture_html(data.getvalue(), picture.alt, 320)


class Lora(Explorer):
    """LoRA: a scale for each adapter that is loaded."""

    def __init__(self, pipe, prompt: str = IDEAS[0], *, live: bool | None = None):
        shared = prompt_inputs(pipe, prompt, shift=False)
        self.names = drawing.adapters(pipe)
        sliders = {
            f"scale of {name}": _input(widgets.FloatSlider, name, value=1.0, min=-2.0, max=2.0, step=0.1)
            for name in self.names
        }
        super().__init__(pipe, "LoRA", shared | sliders, live=live)

    def draw(self, settings, watch, stop):
        settings = dict(settings)
        scales = {name: settings.pop(f"scale of {name}") for name in self.names}
        return drawing.lora(self.pipe, scales=scales, watch=watch, stop=stop, **settings)


class Encoders(Explorer):
    """The three text encoders, each of which can be switched off."""

    NAMES = ("CLIP L/14", "OpenCLIP bigG/14", "T5")

    def __init__(self, pipe, prompt: str = IDEAS[0], *, live: bool | None = None):
        boxes = {
            f"encoder {n}": widgets.Checkbox(value=True, description=name, indent=False)
            for n, name in enumerate(self.NAMES, 1)
        }
        super().__init__(pipe, "Text encoders", prompt_inputs(pipe, prompt, shift=False) | boxes, live=live)

    def draw(self, settings, watch, stop):
        settings = dict(settings)
        keep = "".join(str(n) for n in (1, 2, 3) if settings.pop(f"encoder {n}"))
        return drawing.encoders(self.pipe, keep=keep, watch=watch, stop=stop, **settings)


def page(model: str | None = None) -> widgets.VBox:
    """The quick-try page: text to image and image to image, for someone with no interest in code.

    Args:
        model: as in `sd3kit.load`.

    Raises:
        LoadError: the model cannot be loaded.
    """
    from ..loading.pipeline import load

    pipe = load(model, quiet=True)
    text = TextToImage(pipe)
    title = (
        "<h1>Try Stable Diffusion 3</h1><p>Say what to draw, or choose an idea, and press Draw. The same seed and the "
        "same words give the same picture. What you type goes to the machine that serves this page, and no further.</p>"
    )
    both = widgets.VBox([widgets.HTML(title), text, ImageToImage(pipe, source=text)])
    both.add_class("sd3kit-page")
    return both
