"""The explorers' controls: core ipywidgets that versions 7.7 and 8 share, named, and alike in width."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .drawing import own_settings, shift_of, sizes

try:
    import ipywidgets as widgets
except ImportError:  # the functions work without
    widgets = None


def control(kind: str, label: str, **traits: Any):
    """A labelled control of an ipywidgets class."""
    layout = {"width": "98%", "max_width": "460px"}
    return getattr(widgets, kind)(description=label, style={"description_width": "120px"}, layout=layout, **traits)


def shared(pipe, prompt: str) -> dict[str, Any]:
    """The controls that all explorers have, by the names of the settings."""
    (low, native, high), usual = sizes(pipe), own_settings(pipe)
    sides = range(max(low, native // 2), min(high, 2 * native) + 1, max(16, native // 8))
    found = {
        # told when Enter is pressed or the box is left
        "prompt": control("Text", "Prompt", value=prompt, continuous_update=False),
        "negative_prompt": control("Text", "Negative prompt", continuous_update=False),
        "seed": control("IntText", "Seed", value=0),  # not a bounded one, which takes -5 for 0 without a word
        "steps": control("IntSlider", "Steps", value=usual["steps"], min=1, max=50),
        "guidance": control("FloatSlider", "Guidance", value=usual["guidance"], min=1.0, max=20.0, step=0.5),
        "size": control("Dropdown", "Size in pixels", value=native, options=list(sides)),
    }
    if shift := shift_of(pipe.scheduler):
        found["shift"] = control("FloatSlider", "Shift", value=float(shift), min=0.5, max=12.0, step=0.5)
    found["prompt"].layout = {"flex": "1 1 300px", "min_width": "240px"}
    found["seed"].layout.width = "250px"
    return found


def button(label: str, tooltip: str, pressed: Callable[[], Any], **traits: Any):
    made = widgets.Button(description=label, tooltip=tooltip, layout={"width": "auto"}, **traits)
    made.on_click(lambda _: pressed())
    return made


def upload(label: str, taken: Callable[[bytes], Any]):
    """A button that takes a picture file; `taken` is called with its bytes."""
    made = widgets.FileUpload(description=label, accept="image/*", multiple=False, layout={"width": "auto"})

    def changed(_) -> None:
        files = list(made.value.values()) if isinstance(made.value, Mapping) else list(made.value)  # 7 or 8
        # empty again, or the same file would be no change the next time; 7's trait is read-only but for this
        made.set_trait("value", type(made.value)())
        if files:
            taken(bytes(files[-1]["content"]))

    made.observe(changed, "value")
    return made


def row(children: Iterable, **layout: str):
    return widgets.HBox(list(children), layout={"flex_flow": "row wrap", **layout})
