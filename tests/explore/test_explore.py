"""The explorers without a browser: what the functions return, the newest setting wins, Stop stops, errors pass."""

import base64
import copy
import io
import json
import re
import subprocess
import sys
import threading
import time

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image, PngImagePlugin

from sd3kit import explore
from sd3kit.explore import controls, drawing, explorer

PROMPT = "a fox on a blue background, flat"
QUICK = {"steps": 3, "size": 64}
# What ipywidgets 7.7 and 8 both have.
CORE = {
    "Accordion", "Button", "Checkbox", "Dropdown", "FileUpload", "FloatSlider", "HBox", "HTML", "IntSlider", "IntText",
    "Text", "VBox",
}  # fmt: skip


def pixels(image):
    return np.asarray(image, np.float32)


@pytest.fixture
def calls(pipe):
    """One entry for each call of the transformer, and how many were under way at most."""
    seen, now = [], [0, 0]

    def before(*_):
        seen.append(time.perf_counter())
        now[0] += 1
        now[1] = max(now)

    def after(*_):
        now[0] -= 1

    hooks = [pipe.transformer.register_forward_pre_hook(before), pipe.transformer.register_forward_hook(after)]
    yield seen, now
    for hook in hooks:
        hook.remove()


@pytest.fixture
def text(pipe):
    """The text-to-image explorer at a small size, drawing only when asked."""
    one = explore.TextToImage(pipe, PROMPT, live=False)
    one.restore(QUICK)
    yield one
    one.stop()
    assert one.wait(30)


def said(one):
    return re.sub("<[^>]*>", "", one._said.value)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)


# ---- drawing live with nano-turbo


def test_the_picture_follows_slider_and_typing_and_the_encoding_is_kept(turbo, monkeypatch):
    monkeypatch.setattr(explorer, "PASSING", 60.0)  # a busy machine is slow
    one = explore.TextToImage(turbo, PROMPT)
    assert one.inputs["steps"].value == 4 and one.inputs["guidance"].value == 1
    one.restore({"size": 64})
    encoded = []
    hook = turbo.text_encoder.register_forward_hook(lambda *_: encoded.append(1))
    for seed in (1, 2, 3):
        one.inputs["seed"].value = seed
        assert one.wait(30)
    assert len(encoded) == 1 and len(one._gallery.children) == 1, "passing pictures make place"
    for word in ("a f", "a fo", "a fox"):
        one.inputs["prompt"].value = word
    assert one.wait(30)
    hook.remove()
    assert one.shown[0].settings["prompt"] == "a fox" and len(encoded) <= 4
    drawn = explore.text_to_image(turbo, "a fox", seed=3, size=64)
    assert np.array_equal(pixels(drawn.image), pixels(one.shown[0].image))


def test_kept_encodings_go_when_an_encoder_changes(turbo):
    one = explore.TextToImage(turbo, PROMPT, live=False)
    one.restore({"size": 64})
    weight, drawn = turbo.text_encoder_2.text_projection.weight, []
    with torch.no_grad():
        for _ in range(2):
            one.start()
            assert one.wait(30)
            drawn.append(pixels(one.shown[0].image))
            weight.mul_(-1)
    assert not np.array_equal(*drawn)
    assert not np.isnan(pixels(explore.text_to_image(turbo, PROMPT, steps=1, size=64).image)).any()


# ---- the functions


def test_text_to_image_is_the_pipelines_own_picture_and_leaves_the_pipeline_alone(pipe):
    seen = []
    drawn = explore.text_to_image(pipe, PROMPT, seed=5, guidance=4.0, shift=2.0, watch=seen.append, **QUICK)
    pipe.scheduler.set_shift(2.0)
    plain = pipe(
        PROMPT, generator=torch.Generator().manual_seed(5), num_inference_steps=3, width=64, height=64,
        guidance_scale=4.0, max_sequence_length=40,
    ).images[0]  # fmt: skip
    pipe.scheduler.set_shift(pipe.scheduler.config.shift)
    assert np.array_equal(pixels(drawn.image), pixels(plain))
    assert drawn.settings == {
        "prompt": PROMPT, "negative_prompt": "", "seed": 5, "steps": 3, "guidance": 4.0, "shift": 2.0, "size": 64,
    }  # fmt: skip
    assert [(step.number, step.total) for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0].sigma > seen[1].sigma > seen[2].sigma == 0
    assert seen[0].latents.shape == (1, 16, 8, 8)
    assert drawn.seconds > 0 and not drawn.stopped
    other = explore.text_to_image(pipe, PROMPT, seed=5, guidance=4.0, **QUICK)
    assert other.settings["shift"] == pipe.scheduler.config.shift == pipe.scheduler.shift
    assert not np.array_equal(pixels(other.image), pixels(drawn.image)), "the shift has an effect"
    assert pipe._progress_bar_config == {"disable": True}


def test_a_cell_that_draws_meanwhile_does_not_share_the_scheduler(pipe):
    undisturbed = explore.text_to_image(pipe, PROMPT, shift=12.0, **QUICK)
    between = []

    def meanwhile(step):
        if step.number == 1:
            between.append(explore.text_to_image(pipe, PROMPT, **QUICK).settings["shift"])
            pipe(PROMPT, num_inference_steps=2, width=64, height=64, max_sequence_length=40)

    drawn = explore.text_to_image(pipe, PROMPT, shift=12.0, watch=meanwhile, **QUICK)
    assert between == [pipe.scheduler.config.shift], "not the shift of the drawing that runs"
    assert np.array_equal(pixels(drawn.image), pixels(undisturbed.image))


def test_image_to_image_runs_its_share_of_the_steps(pipe, calls):
    source = Image.new("RGB", (200, 100), "green")
    drawn = explore.image_to_image(pipe, source, PROMPT, strength=0.5, steps=8, size=64)
    assert drawn.steps == drawn.total == len(calls[0]) == 4
    assert drawn.image.size == drawn.data["image"].size == (64, 64)
    with pytest.raises(ValueError, match="below one step"):
        explore.image_to_image(pipe, source, PROMPT, strength=0.1, steps=8, size=64)


def test_inpaint_changes_the_masked_part_only(pipe):
    source = explore.text_to_image(pipe, "a cat on a yellow background, flat", seed=1, steps=6).image
    where = explore.mask("box", left=0.5, size=128)
    drawn = explore.inpaint(pipe, source, where, "a rocket on a blue background, flat", steps=6)
    change = np.abs(pixels(drawn.image) - pixels(source)).mean(-1)
    kept, anew = change[:, :48].mean(), change[:, 80:].mean()
    assert anew > 3 * kept, (anew, kept)
    with pytest.raises(ValueError, match="mask is empty"):
        explore.inpaint(pipe, source, Image.new("L", (128, 128)), PROMPT)


def test_masks_have_the_area_of_their_shape():
    area = {shape: (pixels(explore.mask(shape, 0.25, 0, 0.75, 1, 128)) > 127).mean() for shape in ("box", "ellipse")}
    assert area["box"] == 0.5
    assert area["ellipse"] == pytest.approx(0.5 * np.pi / 4, rel=0.02)
    with pytest.raises(ValueError, match="empty"):
        explore.mask("box", 0.5, 0, 0.5, 1)
    with pytest.raises(ValueError, match="ellipse"):
        explore.mask("star")


def test_schedule_keeps_the_sigmas_that_were_used_and_a_picture_of_each_step(pipe):
    reached = []
    settings = {"steps": 4, "shift": 6.0, "size": 64}
    drawn = explore.schedule(pipe, PROMPT, watch=lambda step: reached.append(step.sigma), **settings)
    assert drawn.data["sigmas"][1:].tolist() == pytest.approx(reached)
    assert [preview.size for preview in drawn.data["previews"]] == [(8, 8)] * 4
    assert (explore.sigmas(pipe, 4, 6.0)[1:-1] > explore.sigmas(pipe, 4, 1.0)[1:-1]).all()
    picture = explore.curve(drawn.data["sigmas"], 6.0, drawn.data["previews"])
    assert "Shift 6" in picture.alt and picture.image.width > 300


def test_previews_resemble_what_the_decoder_makes(pipe):
    seen = []
    drawn = explore.text_to_image(pipe, PROMPT, steps=6, watch=seen.append)
    look = explore.latent_to_rgb(pipe)
    small = pixels(drawn.image.resize((16, 16), Image.Resampling.BOX))

    def explained(preview):
        return 1 - ((pixels(preview) - small) ** 2).sum() / ((small - small.mean((0, 1))) ** 2).sum()

    assert explained(look(seen[-1].latents)) > 0.5
    assert explained(look(seen[-1].latents.flip(1))) < 0.2, "the control: channels in the wrong order"


def test_attention_has_a_map_for_each_word_and_layer(pipe):
    drawn = explore.attention(pipe, "a fox, blue", steps=2, seed=3)
    layers = len(pipe.transformer.transformer_blocks)
    assert drawn.data["words"] == ["a", "fox", "blue"]
    assert drawn.data["raw"].shape == drawn.data["concept"].shape == (3, 2, layers, 8, 8)
    assert drawn.steps == 2 and drawn.settings["seed"] == 3
    one, other = (explore.heat(drawn, "fox", layer=layer) for layer in (0, layers - 1))
    assert not np.array_equal(pixels(one.image), pixels(other.image))
    assert "'fox'" in one.alt and "layer 1" in one.alt and "seed 3" in one.alt
    for wrong in ({"word": "owl"}, {"word": "fox", "layer": layers}, {"word": "fox", "method": "magic"}):
        with pytest.raises(ValueError):
            explore.heat(drawn, **wrong)
    small = explore.attention(pipe, "a fox", steps=1, size=64)
    assert small.image.size == (64, 64) and small.data["raw"].shape[-2:] == (4, 4) and small.settings["size"] == 64
    with pytest.raises(ValueError, match="no word to look at"):
        explore.attention(pipe, "...", steps=1)


@pytest.fixture
def with_lora(pipe):
    from peft import LoraConfig

    parts = pipe.components | {"transformer": copy.deepcopy(pipe.transformer)}
    other = StableDiffusion3Pipeline(**parts)
    other.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    for name in ("dog", "ink"):
        other.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), adapter_name=name)
    for name, weight in other.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    other.set_adapters(["dog", "ink"], [0.5, 2.0])
    other.own_settings = pipe.own_settings
    return other


def test_lora_scales_count_and_are_put_back(pipe, with_lora):
    def state():
        weights = {name: weight.requires_grad for name, weight in with_lora.transformer.named_parameters()}
        layers = [layer for layer in with_lora.transformer.modules() if hasattr(layer, "scaling")]
        return weights, [(dict(layer.scaling), layer.active_adapters) for layer in layers]

    before = state()
    plain = pixels(explore.text_to_image(pipe, PROMPT, **QUICK).image)
    without = explore.lora(with_lora, PROMPT, {"dog": 0.0}, **QUICK)
    strong = explore.lora(with_lora, PROMPT, {"dog": 1.0, "ink": -1.0}, **QUICK)
    assert np.abs(pixels(without.image) - plain).max() <= 1
    assert np.abs(pixels(strong.image) - plain).max() > 10
    assert strong.settings["scales"] == {"dog": 1.0, "ink": -1.0}
    assert state() == before and before[1]
    with pytest.raises(ValueError, match="no adapter 'cat'"):
        explore.lora(with_lora, PROMPT, {"cat": 1.0})
    with pytest.raises(ValueError, match="No LoRA is loaded"):
        explore.lora(pipe, PROMPT)
    one = explore.Lora(with_lora, PROMPT, live=False)
    one.restore(QUICK | {"scale of dog": 0.5, "scale of ink": 0.0})
    one.start()
    assert one.wait(30) and one.shown[0].settings["scales"] == {"dog": 0.5, "ink": 0.0}


def test_encoders_can_be_switched_off(pipe):
    plain = pixels(explore.text_to_image(pipe, PROMPT, **QUICK).image)
    drawn = {keep: pixels(explore.encoders(pipe, PROMPT, keep, **QUICK).image) for keep in ("123", "3", "")}
    assert np.abs(drawn["123"] - plain).max() <= 1
    assert np.abs(drawn["3"] - plain).max() > 10 and np.abs(drawn[""] - drawn["3"]).max() > 10
    with pytest.raises(ValueError, match="123"):
        explore.encoders(pipe, PROMPT, "4")


# ---- stop, errors, one job at a time


def test_stop_ends_within_one_step_and_frees(pipe, calls, monkeypatch):
    stop, freed = threading.Event(), []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    watch = lambda step: stop.set() if step.number == 2 else None  # noqa: E731
    drawn = explore.text_to_image(pipe, PROMPT, steps=20, size=64, watch=watch, stop=stop)
    assert len(calls[0]) == drawn.steps == 2 and drawn.total == 20 and drawn.stopped
    assert freed and "stopped after 2 of 20" in drawn.alt
    with pytest.raises(explore.Stopped):
        explore.text_to_image(pipe, PROMPT, stop=stop)
    assert len(calls[0]) == 2


def test_an_error_in_a_step_frees_and_leaves_the_pipeline_usable(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))

    def fail(*_):
        raise RuntimeError("a layer broke")

    hook = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a layer broke"):
        explore.text_to_image(pipe, PROMPT, shift=9.0, **QUICK)
    hook.remove()
    assert freed and pipe.scheduler.shift == pipe.scheduler.config.shift
    assert explore.text_to_image(pipe, PROMPT, **QUICK).steps == 3


class Own(explore.Explorer):
    """An explorer of a function of one's own."""

    title = "Mine"

    def draw(self, settings, watch, stop):
        return self.function(settings, stop)


def test_the_newest_round_wins_and_nothing_queues(pipe):
    ran, own = [], Own(pipe, PROMPT, live=False)
    started = threading.Event()

    def function(settings, stop):
        with drawing.turn(pipe, stop):
            ran.append(settings["seed"])
            started.set()
            if settings["seed"] < 30:
                assert stop.wait(10), "an old drawing is asked to stop"
            return explore.Drawn(Image.new("RGB", (8, 8)), settings, 0.1, 3, 3)

    own.function = function
    own.start()
    assert started.wait(10)
    for number in range(1, 31):
        own.inputs["seed"].value = number
        own.start()
    assert own.wait(10) and ran[0] == 0 and ran[-1] == 30 and len(ran) < 20, ran
    assert [one.settings["seed"] for one in own.shown] == [30] and len(own.made) == 1
    until(lambda: "sd3kit explorer" not in [thread.name for thread in threading.enumerate()])


def test_an_error_in_a_drawing_is_said_and_the_next_one_works(pipe):
    own = Own(pipe, PROMPT, live=False)
    own.function = lambda settings, stop: 1 / 0
    own.start()
    assert own.wait(10) and said(own) == "ZeroDivisionError: division by zero"
    own.function = lambda settings, stop: explore.Drawn(Image.new("RGB", (8, 8)), settings, 0.1, 3, 3)
    own.start()
    assert own.wait(10) and said(own).startswith("Done: 3 steps")


def test_a_slider_moved_many_times_ends_with_the_last_setting(pipe, calls):
    one = explore.TextToImage(pipe, PROMPT, live=True)
    one.restore({"steps": 5, "size": 64})
    for value in np.arange(1.0, 20.5, 0.5):
        one.inputs["guidance"].value = float(value)
        time.sleep(0.004)
    assert one.wait(60)
    assert one.shown[0].settings["guidance"] == 20.0
    assert len(one.made) <= 2, "drawings on the way are stopped"
    assert len(calls[0]) < 39 * 5 / 2, "and take few steps"
    assert said(one).startswith("Done: 5 steps")


def test_two_explorers_of_one_pipeline_take_turns(pipe, calls):
    both = [explore.TextToImage(pipe, PROMPT, live=False), explore.Encoders(pipe, PROMPT, live=False)]
    for one in both:
        one.restore(QUICK)
        one.start()
    assert all(one.wait(60) for one in both)
    assert calls[1][1] == 1 and len(calls[0]) == 6
    assert all(said(one).startswith("Done") for one in both)


def test_the_explorers_stop_button(text, calls):
    text.inputs["steps"].value = 50
    text._draw.click()
    until(lambda: len(calls[0]) > 2)
    pressed = time.perf_counter()
    text._stopper.click()
    assert text.wait(30)
    late = [call for call in calls[0] if call > pressed]
    assert len(late) <= 1 and len(calls[0]) < 50
    assert re.match(r"Stopped after \d+ of 50 steps", said(text)) and not text.made
    text.restore(QUICK)
    text._draw.click()
    assert text.wait(30) and said(text).startswith("Done: 3 steps")


def test_stop_also_ends_what_waits(text, calls):
    text.inputs["steps"].value = 50
    text.start()
    until(lambda: len(calls[0]) > 1)
    text.inputs["seed"].value = 8
    text.start()
    text.stop()
    assert text.wait(30)
    assert said(text) == "Stopped before the first step." and len(calls[0]) < 10


def test_what_waits_for_another_drawing_hears_stop_and_wrong_settings(pipe, calls):
    with drawing.turn(pipe):
        for kind in (explore.TextToImage, explore.Schedule):
            one = kind(pipe, PROMPT, live=False)
            one.start()
            until(lambda one=one: "Drawing" in said(one))
            one.stop()
            assert one.wait(10) and said(one) == "Stopped before the first step."
            one.inputs["prompt"].value = ""
            one.start()
            assert one.wait(10) and said(one).startswith("The prompt is empty")
    stop, ended = threading.Event(), []
    stop.set()
    with drawing.turn(pipe):
        for wrong, kind in (({"steps": 0}, ValueError), ({"stop": stop}, explore.Stopped)):

            def other(wrong=wrong, kind=kind):
                with pytest.raises(kind):
                    explore.schedule(pipe, PROMPT, **wrong)
                ended.append(kind)

            thread = threading.Thread(target=other, daemon=True)
            thread.start()
            thread.join(10)
    assert ended == [ValueError, explore.Stopped] and not calls[0]


def test_an_error_while_fitting_the_preview_frees(pipe, monkeypatch):
    freed = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(1))
    monkeypatch.setattr(pipe.vae, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explore.latent_to_rgb(pipe)
    assert freed


def test_an_error_is_one_line_and_the_next_try_works(text):
    text.inputs["prompt"].value = ""
    text._draw.click()
    assert text.wait(30)
    assert said(text).startswith("The prompt is empty") and 'role="alert"' in text._said.value
    text.inputs["prompt"].value = PROMPT
    text._draw.click()
    assert text.wait(30)
    assert said(text).startswith("Done: 3 steps") and 'role="status"' in text._said.value
    assert rounds.one_line(RuntimeError("CUDA out of memory. Tried\nto")).startswith("The memory is full")
    assert "fewer steps" not in rounds.one_line(RuntimeError("CUDA out of memory.")), "they take no less"
    assert rounds.one_line(KeyError("x\ny")).count("\n") == 0


# ---- what is shown and kept


def test_pictures_have_alternative_texts_with_prompt_and_seed(text):
    text.restore({"prompt": 'a fox "<b>"', "seed": 7})
    values = []
    text._pictures.observe(lambda change: values.append(change["new"]), "value")
    text.start()
    assert text.wait(30)
    assert len(values) == 4, "three previews and the picture"
    texts = [re.search(r'alt="([^"]*)"', value)[1] for value in values]
    assert texts[0] == "Preview of step 1 of 3: a fox &quot;&lt;b&gt;&quot;; seed 7"
    assert texts[-1] == "a fox &quot;&lt;b&gt;&quot;; seed 7"
    thumb = text._gallery.children[0].children[0].value
    assert 'alt="Picture 1: a fox &quot;&lt;b&gt;&quot;; seed 7"' in thumb
    assert 'aria-live="polite"' in text._said.value


def test_one_click_returns_to_a_picture_and_its_settings(text, calls):
    for seed in (1, 2):
        text.restore({"seed": seed})
        text.start()
        assert text.wait(30)
    first = pixels(text.made[1].image)
    drawn = len(calls[0])
    text._gallery.children[1].children[1].click()
    assert text.inputs["seed"].value == text.shown[0].settings["seed"] == 1
    assert np.array_equal(pixels(text.shown[0].image), first) and len(calls[0]) == drawn
    assert "seed 1" in said(text)


def test_the_gallery_is_bounded(text, monkeypatch):
    drawn = explore.Drawn(Image.new("RGB", (64, 64)), text.settings(), 1.0, 3, 3)
    for _ in range(explorer.KEPT + 5):
        text._keep(drawn, text.settings())
    assert len(text.made) == len(text._gallery.children) == explorer.KEPT
    assert text._gallery.children[0].children[1].description == f"Back to {explorer.KEPT + 5}"


def test_settings_come_back_from_a_png(pipe, text, tmp_path):
    drawn = explore.text_to_image(
        pipe, "ein Füchslein", negative_prompt="red", seed=9, guidance=3.0, shift=4.0, **QUICK
    )
    drawn.save(tmp_path / "fox.png")
    settings = explore.from_png(tmp_path / "fox.png")
    assert settings == drawn.settings
    again = explore.text_to_image(pipe, **settings)
    assert np.array_equal(pixels(again.image), pixels(drawn.image))
    text.restore(settings)
    assert text.settings() == settings
    with pytest.raises(ValueError, match="cannot show steps 400"):
        text.restore(settings | {"seed": 1, "steps": 400})
    assert text.settings() == settings, "all or nothing"


def upload(button, data):
    """What the browser sends for a file, to ipywidgets 7 or 8; the form that is not installed is tested below."""
    file = {"name": "a.png", "type": "image/png", "size": len(data), "last_modified": 0}
    if hasattr(button, "_counter"):
        button.set_state({"metadata": [file], "data": [memoryview(data)], "_counter": button._counter + 1})
    else:
        button.set_state({"value": [file | {"content": memoryview(data)}]})


@pytest.mark.parametrize("value", [{"fox.png": {"content": b"data"}}, ({"content": memoryview(b"data")},)])
def test_uploads_of_ipywidgets_7_and_8(monkeypatch, value):
    class Upload:
        def __init__(self, **_):
            self.value = ()

        def observe(self, changed, name):
            self.changed = changed

        def set_trait(self, name, new):
            self.value = new

    monkeypatch.setattr(widgets, "FileUpload", Upload)
    taken = []
    button = controls.upload("A file", "image/*", taken.append)
    button.value = value
    button.changed(None)
    button.changed(None)  # emptied by us, which is told too
    assert taken == [b"data"] and button.value == type(value)()


def button_named(widget, name):
    """The button of this name in an explorer."""
    widget = getattr(widget, "box", widget)
    found = [button_named(child, name) for child in getattr(widget, "children", ())]
    return widget if getattr(widget, "description", "") == name else next(filter(None, found), None)


def test_the_same_idea_counts_again(text):
    idea = button_named(text, explorer.IDEAS[1])
    for _ in range(2):
        idea.click()
        assert text.inputs["prompt"].value == explorer.IDEAS[1]
        text.inputs["prompt"].value = "a cat"


def test_the_download_link_holds_the_settings(text):
    text.start()
    assert text.wait(30)
    data = re.search(r'<a download="sd3kit-seed-0.png" href="data:image/png;base64,([^"]+)"', text._pictures.value)[1]
    assert explore.from_png(base64.b64decode(data)) == text.settings()


def png_with(text=None):
    info, data = PngImagePlugin.PngInfo(), io.BytesIO()
    if text is not None:
        info.add_text("sd3kit", text)
    Image.new("RGB", (8, 8)).save(data, "PNG", pnginfo=info)
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png_with(), "no settings"),
        (png_with('{"seed": "many"'), "damaged"),
        (png_with('{"seed": 1e999}'), "damaged"),
        (png_with("[" * 100_000), "damaged"),
        (png_with('{"prompt": ["a fox"]}'), "damaged"),
        (png_with("[1]"), "damaged"),
        (b"no picture", "not a PNG"),
    ],
    ids=("none", "cut off", "infinite", "deep", "a list", "no dictionary", "no picture"),
)
def test_files_without_settings_are_refused(data, words):
    with pytest.raises(ValueError, match=words):
        explore.from_png(data)


def test_a_missing_file_has_no_settings(tmp_path):
    with pytest.raises(OSError):
        explore.from_png(tmp_path / "missing.png")


def test_a_picture_too_large_to_open_has_no_settings(monkeypatch):
    data = png_with("{}")
    monkeypatch.setattr(drawn_module, "MOST_PIXELS", 16)
    with pytest.raises(ValueError, match="too large"):
        explore.from_png(data)


def test_unknown_settings_in_a_png_are_left_out():
    text = json.dumps({"prompt": "a fox", "seed": 1, "callback": "os.system"})
    assert explore.from_png(png_with(text)) == {"prompt": "a fox", "seed": 1}


def test_several_seeds_and_another_value_stand_side_by_side(text):
    text.inputs["seed"].value = 4
    text._seeds.value = 2
    text._compared.value = "guidance"
    text.start()
    assert text.wait(30) and [one.settings["seed"] for one in text.shown] == [4, 5], "no other value is given yet"
    text._other.value = "2.5"
    text.start()
    assert text.wait(60) and said(text).startswith("Done: 4 pictures, each 3 steps")
    drawn = [(one.settings["seed"], one.settings["guidance"]) for one in text.shown]
    assert drawn == [(4, 4.0), (4, 2.5), (5, 4.0), (5, 2.5)]
    bold = re.findall("<strong>(.*?)</strong>", text._pictures.value)
    assert bold == ["seed 4, guidance 4", "seed 4, guidance 2.5", "seed 5, guidance 4", "seed 5, guidance 2.5"]
    text._gallery.children[2].children[1].click()
    assert (text.inputs["seed"].value, text.inputs["guidance"].value) == (4, 2.5)
    text._other.value = "much"
    text.start()
    assert "another value of guidance" in said(text) and 'role="alert"' in text._said.value


def test_a_comparison_of_an_encoder_is_without_it(pipe):
    one = explore.Encoders(pipe, PROMPT, live=False)
    one.restore(QUICK)
    one._compared.value = "encoder 3"
    one.start()
    assert one.wait(30) and [drawn.settings["keep"] for drawn in one.shown] == ["123", "12"]


def test_a_negative_seed_is_refused_in_the_widget_too(text):
    text.inputs["seed"].value = -5
    text.start()
    assert text.wait(30) and said(text).endswith("not -5.") and 'role="alert"' in text._said.value


def test_a_still_with_the_settings_is_kept_for_where_no_kernel_runs(pipe, monkeypatch):
    shown, updates = [], []

    class Handle:
        def update(self, data, raw):
            updates.append(data)

    def display(data, raw, display_id=False):
        shown.append(data)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    one = explore.TextToImage(pipe, PROMPT, live=True)
    one.restore(QUICK)
    one._ipython_display_()
    assert "nothing drawn yet" in shown[0]["text/plain"] and "run this cell" in shown[0]["text/html"]
    assert shown[1]["application/vnd.jupyter.widget-view+json"]["model_id"] == one.box.model_id
    assert "children" not in shown[0]["text/plain"] + shown[1]["text/plain"]
    kept = updates[-1]["text/html"]
    assert f'alt="{PROMPT}; seed 0"' in kept and "seed 0, 3 steps, guidance 4" in kept, "drawn before the cell ends"
    one.inputs["seed"].value = 6
    assert one.wait(30) and f"{PROMPT}; seed 6" in updates[-1]["text/plain"]
    name = re.search('data-sd3kit="([^"]+)"', kept)[1]
    heading = one.box.children[0].value
    assert f'[data-sd3kit="{name}"]{{display:none}}' in heading, "beside the explorer itself the still is hidden"
    assert "display:none" not in kept.replace(re.search("<style>.*?</style>", kept)[0], "")


# ---- the other explorers


def test_image_explorer_changes_a_picture_and_inpaints(pipe):
    one = explore.ImageToImage(pipe, prompt=PROMPT, live=False)
    one.restore({"steps": 4, "size": 64, "strength": 0.5})
    one.start()
    assert one.wait(30) and "no picture to change" in said(one)
    data = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(data, "PNG")
    upload(button_named(one, "Picture"), data.getvalue())
    assert said(one).startswith("Taken: 90 x 60 pixels, of which the middle square is used") and not one.made
    one.start()
    assert one.wait(30) and one.shown[0].steps == 2
    assert said(one).startswith("Done: 2 steps (strength 0.5 of 4)")
    one.restore({"mask": "left half"})
    assert "veiled where it is drawn anew (left half)" in one._before.value
    one.start()
    assert one.wait(30)
    where = pixels(one.shown[0].data["mask"])
    assert where[:, :32].min() == 255 and where[:, 32:].max() == 0
    one.restore({"mask": "my own mask"})
    one.start()
    assert one.wait(30) and "no mask yet" in said(one)
    own = io.BytesIO()
    explore.mask("ellipse", 0, 0, 0.5, 0.5, size=60).save(own, "PNG")
    upload(button_named(one, "Mask (white is new)"), own.getvalue())
    one.start()
    assert one.wait(30) and "90 x 60 pixels and the mask 60 x 60" in said(one)
    one._gallery.children[1].children[1].click()
    assert one.inputs["mask"].value == "everything" and one.shown[0].steps == 2


def test_schedule_explorer_draws_the_curve_before_the_pictures(pipe):
    one = explore.Schedule(pipe, PROMPT, live=False)
    one.inputs["shift"].value = 6.0
    assert "Shift 6:" in one._below.value
    before = one._below.value
    one.restore({"steps": 3})
    one.start()
    assert one.wait(60) and said(one).startswith("Done")
    assert one._below.value != before and "Sigma over 3 steps" in one._below.value


def test_attention_explorer_follows_word_and_layer_without_drawing_again(pipe, calls):
    one = explore.Attention(pipe, "a fox on blue", live=False)
    one.restore({"steps": 2, "size": 64})
    one.start()
    assert one.wait(60) and one.shown[0].image.size == (64, 64)
    drawn, seen = len(calls[0]), set()
    for view, value in (("word", "fox"), ("layer", 2), ("step", 1), ("method", "concept")):
        one.views[view].value = value
        seen.add(one._below.value)
    assert len(seen) == 4 and len(calls[0]) == drawn
    assert "Where &#x27;fox&#x27; is looked at in layer 3" in one._below.value


def test_only_core_widgets(pipe, with_lora):
    made = [
        *(kind(pipe, live=False) for kind in (explore.TextToImage, explore.ImageToImage, explore.Schedule)),
        *(kind(pipe, live=False) for kind in (explore.Attention, explore.Encoders)),
        explore.Lora(with_lora, live=False),
    ]
    made[0]._keep(explore.Drawn(Image.new("RGB", (8, 8)), made[0].settings(), 1.0, 3, 3), made[0].settings())
    kinds, without_name, made = set(), [], [getattr(one, "box", one) for one in made]
    while made:
        widget = made.pop()
        kind = next(c for c in type(widget).__mro__ if c.__module__.startswith("ipywidgets"))
        kinds.add(kind.__name__)
        assert widget._model_module == "@jupyter-widgets/controls", widget
        if not isinstance(widget, widgets.HTML | widgets.Box) and not widget.description:
            without_name.append(widget)
        made += getattr(widget, "children", ())
    assert kinds == CORE and not without_name


def test_the_functions_need_no_widgets():
    script = """
import sys
sys.modules["ipywidgets"] = None  # importing it fails
import sd3kit
from sd3kit import explore
pipe = sd3kit.load("nano", quiet=True)
pipe.set_progress_bar_config(disable=True)
print(explore.schedule(pipe, "a fox", steps=1, size=64).steps)
try:
    explore.Schedule(pipe)
except ImportError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.splitlines()[0] == "1" and "Schedule needs ipywidgets: pip install" in ran.stdout
