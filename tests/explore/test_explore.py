"""The explorers without a browser: what the functions return, the newest setting wins, Stop stops, errors pass."""

import base64
import contextlib
import importlib
import io
import json
import re
import sys
import threading
import time

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from sd3kit import explore
from sd3kit.explore import controls, drawing, explorer

PROMPT = "a fox on a blue background, flat"
QUICK = {"steps": 2, "size": 64}
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


def controls_of(one):
    return {name: control.value for name, control in one.inputs.items()}


def gallery(one):
    return [item.drawn for item in one._gallery.children]


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
    for seed in (1, 2):
        one.inputs["seed"].value = seed
        assert one.wait(30)
    assert len(encoded) == 1 and len(one._gallery.children) == 1, "passing pictures make place"
    for word in ("a f", "a fo", "a fox"):
        one.inputs["prompt"].value = word
    assert one.wait(30)
    hook.remove()
    assert one.shown[0].settings["prompt"] == "a fox" and len(encoded) <= 4
    drawn = explore.text_to_image(turbo, "a fox", seed=2, size=64)
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
        PROMPT, generator=torch.Generator().manual_seed(5), num_inference_steps=2, width=64, height=64,
        guidance_scale=4.0, max_sequence_length=40,
    ).images[0]  # fmt: skip
    pipe.scheduler.set_shift(pipe.scheduler.config.shift)
    assert np.array_equal(pixels(drawn.image), pixels(plain))
    assert drawn.settings == {
        "prompt": PROMPT, "negative_prompt": "", "seed": 5, "steps": 2, "guidance": 4.0, "shift": 2.0, "size": 64,
    }  # fmt: skip
    assert [(step.number, step.total) for step in seen] == [(1, 2), (2, 2)]
    assert seen[0].sigma > seen[1].sigma == 0
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
            pipe(PROMPT, num_inference_steps=1, width=64, height=64, max_sequence_length=40)

    drawn = explore.text_to_image(pipe, PROMPT, shift=12.0, watch=meanwhile, **QUICK)
    assert between == [pipe.scheduler.config.shift], "not the shift of the drawing that runs"
    assert np.array_equal(pixels(drawn.image), pixels(undisturbed.image))


def test_image_to_image_runs_its_share_of_the_steps(pipe, calls):
    source = Image.new("RGB", (200, 100), "green")
    drawn = explore.image_to_image(pipe, source, PROMPT, strength=0.5, steps=4, size=64)
    assert drawn.steps == drawn.total == len(calls[0]) == 2
    assert drawn.image.size == drawn.data["image"].size == (64, 64)
    with pytest.raises(ValueError, match="below one step"):
        explore.image_to_image(pipe, source, PROMPT, strength=0.1, steps=8, size=64)


def test_inpaint_changes_the_masked_part_only(pipe):
    source, where = Image.new("RGB", (64, 64), "yellow"), Image.new("L", (64, 64))
    where.paste(255, (32, 0, 64, 64))
    drawn = explore.image_to_image(
        pipe, source, "a rocket on a blue background, flat", mask=where, strength=1, steps=4, size=64
    )
    change = np.abs(pixels(drawn.image) - pixels(source)).mean(-1)
    kept, anew = change[:, :24].mean(), change[:, 40:].mean()
    assert anew > 3 * kept, (anew, kept)


def test_schedule_keeps_the_sigmas_that_were_used_and_a_picture_of_each_step(pipe, turbo):
    reached = []
    settings = {"steps": 3, "shift": 6.0, "size": 64}
    drawn = explore.schedule(pipe, PROMPT, watch=lambda step: reached.append(step.sigma), **settings)
    assert drawn.data["sigmas"][1:].tolist() == pytest.approx(reached)
    assert [preview.size for preview in drawn.data["previews"]] == [(8, 8)] * 3
    assert (explore.sigmas(pipe, 4, 6.0)[1:-1] > explore.sigmas(pipe, 4, 1.0)[1:-1]).all()
    picture = explore.curve(drawn.data["sigmas"], 6.0, drawn.data["previews"])
    assert explore.sigmas(turbo, 1, 3.0).tolist() == [1.0, 0.0], "one level cannot be stretched"
    assert "Shift 6" in picture.alt and picture.image.width > 300


def test_previews_resemble_what_the_decoder_makes(pipe):
    seen = []
    drawn = explore.text_to_image(pipe, PROMPT, steps=6, watch=seen.append)
    small = pixels(drawn.image.resize((16, 16), Image.Resampling.BOX))

    def explained(preview):
        return 1 - ((pixels(preview) - small) ** 2).sum() / ((small - small.mean((0, 1))) ** 2).sum()

    assert explained(explore.latent_to_rgb(pipe, seen[-1].latents)) > 0.5
    wrong = explore.latent_to_rgb(pipe, seen[-1].latents.flip(1))
    assert explained(wrong) < 0.2, "the control: channels in the wrong order"


def test_attention_has_a_map_for_each_word_and_layer(pipe):
    drawn = explore.attention(pipe, "a fox, blue", seed=3, **QUICK)
    layers = len(pipe.transformer.transformer_blocks)
    assert drawn.data["words"] == ["a", "fox", "blue"]
    assert drawn.data["raw"].shape == drawn.data["concept"].shape == (3, 2, layers, 4, 4)
    assert drawn.steps == 2 and drawn.settings["seed"] == 3 and drawn.image.size == (64, 64)
    one, other = (explore.heat(drawn, "fox", layer=layer) for layer in (1, layers))
    assert not np.array_equal(pixels(one.image), pixels(other.image))
    assert "'fox'" in one.alt and "layer 1" in one.alt and "seed 3" in one.alt
    with pytest.raises(ValueError, match="no word to look at"):
        explore.attention(pipe, "...", steps=1)


def test_lora_scales_count_and_are_put_back(pipe, with_lora):
    def state():
        weights = {name: weight.requires_grad for name, weight in with_lora.transformer.named_parameters()}
        layers = [layer for layer in with_lora.transformer.modules() if hasattr(layer, "scaling")]
        return weights, [(dict(layer.scaling), layer.active_adapters) for layer in layers]

    with_lora.set_adapters(["dog", "ink"], [0.5, 2.0])
    before = state()
    plain = pixels(explore.text_to_image(pipe, PROMPT, **QUICK).image)
    without = explore.lora(with_lora, PROMPT, {"dog": 0.0}, **QUICK)
    strong = explore.lora(with_lora, PROMPT, {"dog": 1.0, "ink": -1.0}, **QUICK)
    assert np.abs(pixels(without.image) - plain).max() <= 1
    assert np.abs(pixels(strong.image) - plain).max() > 10
    assert strong.settings["scales"] == {"dog": 1.0, "ink": -1.0} and "scales dog 1, ink -1" in strong.caption
    assert state() == before and before[1]
    with pytest.raises(ValueError, match="'cat'"):
        explore.lora(with_lora, PROMPT, {"cat": 1.0})
    with pytest.raises(ValueError, match="No LoRA is loaded"):
        explore.lora(pipe, PROMPT, {"dog": 1.0})
    with_lora.disable_lora()
    with pytest.raises(ValueError, match="switched off"):
        explore.lora(with_lora, PROMPT, {"dog": 1.0})
    with_lora.enable_lora()
    assert state() == before
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
    assert explore.text_to_image(pipe, PROMPT, **QUICK).steps == 2


class Own(explore.Explorer):
    """An explorer of a function of one's own."""

    title = "Mine"

    def draw(self, watch, stop, **settings):
        return self.function(settings, stop)


def test_the_newest_round_wins_and_nothing_queues(pipe):
    ran, own = [], Own(pipe, PROMPT, live=False)
    started = threading.Event()

    def function(settings, stop):
        with drawing.turn(stop):
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
    assert own.wait(10) and ran[0] == 0 and ran[-1] == 30
    assert [one.settings["seed"] for one in own.shown] == [30] and len(gallery(own)) == 1
    ran.clear()
    with drawing.turn(threading.Event()):  # another drawing
        for number in range(31):
            own.inputs["seed"].value = number
            own.start()
        until(lambda: [thread.name for thread in threading.enumerate()].count("sd3kit explorer") == 1)
    assert own.wait(10) and ran == [30], "what waited has heard that it is too late"


def test_what_was_stopped_while_it_waited_for_its_turn_does_not_begin():
    stops, began = [threading.Event() for _ in range(6)], []

    def work(number):
        with contextlib.suppress(drawing.Stopped), drawing.turn(stops[number]):
            began.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    with drawing.turn(threading.Event()):
        for thread in threads:
            thread.start()
        for stop in stops[:5]:
            stop.set()
    for thread in threads:
        thread.join()
    assert began == [5]


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
    assert len(gallery(one)) <= 2, "drawings on the way are stopped"
    assert len(calls[0]) < 39 * 5 / 2, "and take few steps"
    assert said(one).startswith("Done: 5 steps")


def test_two_explorers_of_one_pipeline_take_turns(pipe, calls):
    both = [explore.TextToImage(pipe, PROMPT, live=False), explore.Encoders(pipe, PROMPT, live=False)]
    for one in both:
        one.restore(QUICK)
        one.start()
    assert all(one.wait(60) for one in both)
    assert calls[1][1] == 1 and len(calls[0]) == 4
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
    assert re.match(r"Stopped after \d+ of 50 steps", said(text)) and not gallery(text)
    text.restore(QUICK)
    text._draw.click()
    assert text.wait(30) and said(text).startswith("Done: 2 steps")


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
    with drawing.turn(threading.Event()):
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
    with drawing.turn(threading.Event()):
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
    drawing._maps.pop(pipe.vae, None)
    with pytest.raises(ZeroDivisionError):
        explore.schedule(pipe, PROMPT, **QUICK)
    assert freed


def test_an_error_is_one_line_and_the_next_try_works(text):
    text.inputs["prompt"].value = ""
    text._draw.click()
    assert text.wait(30)
    assert said(text).startswith("The prompt is empty") and 'role="alert"' in text._said.value
    text.inputs["prompt"].value = PROMPT
    text._draw.click()
    assert text.wait(30)
    assert said(text).startswith("Done: 2 steps") and 'role="status"' in text._said.value
    assert explorer.one_line(RuntimeError("CUDA out of memory. Tried\nto")).startswith("The memory is full")
    assert "fewer steps" not in explorer.one_line(RuntimeError("CUDA out of memory.")), "they take no less"
    assert explorer.one_line(KeyError("x\ny")).count("\n") == 0


# ---- what is shown and kept


def test_pictures_have_alternative_texts_with_prompt_and_seed(text):
    text.restore({"prompt": 'a fox "<b>"', "seed": 7})
    values = []
    text._pictures.observe(lambda change: values.append(change["new"]), "value")
    text.start()
    assert text.wait(30)
    assert len(values) == 3, "two previews and the picture"
    texts = [re.search(r'alt="([^"]*)"', value)[1] for value in values]
    assert texts[0] == "Preview of step 1 of 2: a fox &quot;&lt;b&gt;&quot;; seed 7"
    assert texts[-1] == "a fox &quot;&lt;b&gt;&quot;; seed 7"
    thumb = text._gallery.children[0].children[0].value
    assert 'alt="Picture 1: a fox &quot;&lt;b&gt;&quot;; seed 7"' in thumb
    assert 'role="status"' in text._said.value


def test_one_click_returns_to_a_picture_and_its_settings(text, calls):
    for seed in (1, 2):
        text.restore({"seed": seed})
        text.start()
        assert text.wait(30)
    first = pixels(gallery(text)[1].image)
    drawn = len(calls[0])
    text._gallery.children[1].children[1].click()
    assert text.inputs["seed"].value == text.shown[0].settings["seed"] == 1
    assert np.array_equal(pixels(text.shown[0].image), first) and len(calls[0]) == drawn
    assert "seed 1" in said(text)


def test_the_gallery_is_bounded(text, monkeypatch):
    drawn = explore.Drawn(Image.new("RGB", (64, 64)), controls_of(text), 1.0, 3, 3)
    for _ in range(explorer.KEPT + 5):
        text._keep(drawn, controls_of(text))
    assert len(text._gallery.children) == explorer.KEPT
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
    assert controls_of(text) == settings


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
    button = controls.upload("A file", taken.append)
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
    assert explore.from_png(base64.b64decode(data)) == controls_of(text)


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
        (png_with("[" * 100_000), "damaged"),
        (png_with("[1]"), "damaged"),
        (b"no picture", "not a PNG"),
    ],
    ids=("none", "cut off", "deep", "no dictionary", "no picture"),
)
def test_files_without_settings_are_refused(data, words):
    with pytest.raises(ValueError, match=words):
        explore.from_png(data)


def test_a_missing_file_has_no_settings(tmp_path):
    with pytest.raises(OSError):
        explore.from_png(tmp_path / "missing.png")


def test_unknown_settings_in_a_png_are_left_out():
    text = json.dumps({"prompt": "a fox", "seed": 1, "callback": "os.system"})
    assert explore.from_png(png_with(text)) == {"prompt": "a fox", "seed": 1}


def test_what_lies_beyond_a_slider_is_restored_all_the_same(text):
    text.restore({"prompt": "a fox", "steps": 100, "shift": 20.0, "width": 80, "height": 208})
    assert {name: text.inputs[name].value for name in ("steps", "shift")} == {"steps": 100, "shift": 20.0}


def test_several_seeds_and_what_they_are_compared_with_stand_side_by_side(text):
    text.inputs["seed"].value = 4
    text._seeds.value = 2
    text.start()
    assert text.wait(30) and said(text).startswith("Done: 2 pictures, each 2 steps")
    text._compare.value = True
    for guidance in (3.0, 2.5000000000000004):  # as a slider adds it up
        text.inputs["guidance"].value = guidance
        text.start()
        assert text.wait(30)
        drawn = [(one.settings["seed"], one.settings["guidance"]) for one in text.shown]
        assert drawn == [(4, 4.0), (5, 4.0), (4, guidance), (5, guidance)]
    bold = re.findall("<strong>(.*?)</strong>", text._pictures.value)
    assert bold == ["seed 4, guidance 4", "seed 5, guidance 4", "seed 4, guidance 2.5", "seed 5, guidance 2.5"]
    text._gallery.children[5].children[1].click()
    assert (text.inputs["seed"].value, text.inputs["guidance"].value) == (4, 4.0)
    text._compare.value = False
    text.start()
    assert text.wait(30) and len(text.shown) == 2


def test_the_boxes_of_the_encoders_say_which_are_kept(pipe):
    one = explore.Encoders(pipe, PROMPT, live=False)
    one.restore(QUICK | {"encoder 3": False})
    one.start()
    assert one.wait(30) and one.shown[0].settings["keep"] == "12"


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
    assert f'alt="{PROMPT}; seed 0"' in kept and "seed 0, steps 2, guidance 4" in kept, "drawn before the cell ends"
    one.inputs["seed"].value = 6
    assert one.wait(30) and f"{PROMPT}; seed 6" in updates[-1]["text/plain"]
    name = re.search('data-sd3kit="([^"]+)"', kept)[1]
    assert f'body:has(.{name}) [data-sd3kit="{name}"]' in kept and name in one.box._dom_classes, "beside it, hidden"


# ---- the other explorers


def test_image_explorer_changes_a_picture_and_inpaints(pipe):
    one = explore.ImageToImage(pipe, prompt=PROMPT, live=False)
    one.restore({"steps": 4, "size": 64, "strength": 0.5})
    one.start()
    assert one.wait(30) and "no picture to change" in said(one)
    data = io.BytesIO()
    Image.new("RGB", (90, 60), "red").save(data, "PNG")
    upload(button_named(one, "Picture"), data.getvalue())
    assert said(one).startswith("Taken: 90 x 60 pixels; the middle square is used") and not gallery(one)
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
    Image.new("L", (60, 60), 255).save(own, "PNG")
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
    one.restore(QUICK)
    one.start()
    assert one.wait(60) and said(one).startswith("Done")
    assert one._below.value != before and "Sigma over 2 steps" in one._below.value


def test_attention_explorer_follows_word_and_layer_without_drawing_again(pipe, calls):
    one = explore.Attention(pipe, "a fox on blue", live=False)
    one.restore({"steps": 2, "size": 64})
    one.start()
    assert one.wait(60) and one.shown[0].image.size == (64, 64)
    drawn, seen = len(calls[0]), set()
    for view, value in (("word", "fox"), ("layer", 3), ("step", 2), ("method", "concept")):
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
    made[0]._keep(explore.Drawn(Image.new("RGB", (8, 8)), controls_of(made[0]), 1.0, 3, 3), controls_of(made[0]))
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


def test_the_functions_need_no_widgets(pipe, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ipywidgets", None)  # importing it fails
        importlib.reload(controls)
        without.setattr(explorer, "widgets", controls.widgets)
        assert explore.schedule(pipe, "a fox", steps=1, size=64).steps == 1
        with pytest.raises(ImportError, match="Explorers need ipywidgets: pip install"):
            explore.Schedule(pipe)
    importlib.reload(controls)
