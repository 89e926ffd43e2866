"""The explorers' controls: core ipywidgets that versions 7.7 and 8 share, named, and alike in width.

Imported when an explorer is made; the functions work without ipywidgets.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ipywidgets as widgets

from .drawing import native_size, own_settings, shift_of, sizes

HTML = widgets.HTML


def control(kind: str, label: str, **traits: Any) -> widgets.Widget:
    """A labelled control of an ipywidgets class."""
    if kind == "Text":
        traits["continuous_update"] = False  # tells its value when Enter is pressed or the box is left
    layout = widgets.Layout(width="98%", max_width="460px")
    return getattr(widgets, kind)(description=label, style={"description_width": "120px"}, layout=layout, **traits)


def shared(pipe, prompt: str) -> dict[str, widgets.Widget]:
    """The controls that all explorers have, by the names of the settings."""
    (low, high), native, usual = sizes(pipe), native_size(pipe), own_settings(pipe)
    sides = range(max(low, native // 2), min(high, 2 * native) + 1, max(16, native // 8))
    found = {
        "prompt": control("Text", "Prompt", value=prompt),
        "negative_prompt": control("Text", "Negative prompt"),
        "seed": control("IntText", "Seed", value=0),  # not a bounded one, which takes -5 for 0 without a word
        "steps": control("IntSlider", "Steps", value=usual["steps"], min=1, max=50),
        "guidance": control("FloatSlider", "Guidance", value=usual["guidance"], min=1.0, max=20.0, step=0.5),
        "size": control("Dropdown", "Size in pixels", value=native, options=list(sides)),
    }
    if shift := shift_of(pipe.scheduler):
        found["shift"] = control("FloatSlider", "Shift", value=float(shift), min=0.5, max=12.0, step=0.5)
    found["prompt"].layout = widgets.Layout(flex="1 1 300px", min_width="240px")
    return found


def button(label: str, tooltip: str, pressed: Callable[[], Any], **traits: Any) -> widgets.Button:
    made = widgets.Button(description=label, tooltip=tooltip, layout={"width": "auto"}, **traits)
    made.on_click(lambda _: pressed())
    return made


def upload(label: str, accept: str, taken: Callable[[bytes], Any]) -> widgets.FileUpload:
    """A button that takes a file; `taken` is called with its bytes."""
    made = widgets.FileUpload(description=label, accept=accept, multiple=False, layout={"width": "auto"})

    def changed(_) -> None:
        files = list(made.value.values()) if isinstance(made.value, Mapping) else list(made.value)  # 7 or 8
        # empty again, or the same file would be no change the next time; 7's trait is read-only but for this
        made.set_trait("value", type(made.value)())
        if files:
            taken(bytes(files[-1]["content"]))

    made.observe(changed, "value")
    return made


def row(children: Iterable[widgets.Widget], **layout: str) -> widgets.HBox:
    return widgets.HBox(list(children), layout=widgets.Layout(flex_flow="row wrap", **layout))


def column(children: Iterable[widgets.Widget], **layout: str) -> widgets.VBox:
    return widgets.VBox(list(children), layout=widgets.Layout(**layout))


def folded(panes: Mapping[str, widgets.Widget]) -> widgets.Accordion:
    """Panes under their titles, closed."""
    made = widgets.Accordion(list(panes.values()), selected_index=None)
    for place, title in enumerate(panes):
        made.set_title(place, title)
    return made
