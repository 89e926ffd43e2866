"""The static page in headless Chromium: equal to Python step by step, whole as a page, and no request to anyone else.

The page is built into site/dist and served by site/serve.py, as `make app` does it. Screenshots are kept in
tests/artefacts; sizes and times are printed (`pytest -s`).
"""

import contextlib
import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sd3kit
from sd3kit import explore
from sd3kit.command import cli
from sd3kit.lesson import attention
from sd3kit.loading.names import own_settings
from sd3kit.loading.pipeline import prompt_length

SITE = Path(__file__).parents[1] / "site"
ARTEFACTS = Path(__file__).parent / "artefacts"
PATIENCE = 60_000  # milliseconds for what waits on a drawing, on a machine that is busy
FLAGS = [
    "--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip
WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan,WebGPU"]
FOX = "a fox on a blue background, 3d"
NANO, TURBO = "nano", "nano-turbo"  # the page opens with the second
# The same picture, as largest and mean difference of 255: with the 28 steps of a usual picture, and with the few of
# most tests here, where guidance makes a rounding error larger and no later step makes it smaller.
USUAL, FEW = (3, 0.1), (8, 0.5)
TRANSFER = 40e6  # bytes at the first visit, without WebGPU
pytestmark = pytest.mark.xdist_group("browser")  # two browsers at once would starve each other on two cores


def absent(reason: str) -> None:
    """No browser: said, and under CI a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; under CI the browser tests must run")
    pytest.skip(reason)


def test_wrong_arguments_of_the_build_write_nothing(tmp_path):
    (tmp_path / "file").touch()
    for word, code in (("--help", 0), ("--nothing", 2), ("file", 2), ("file/below", 2)):
        built = subprocess.run(
            [sys.executable, str(SITE / "build.py"), word], cwd=tmp_path, capture_output=True, text=True
        )
        assert built.returncode == code and "usage: build.py" in built.stdout + built.stderr, built.stderr
        assert "Traceback" not in built.stderr and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture(scope="module")
def address():
    """site/serve.py, which builds the page first; gives where it serves."""
    if not SITE.is_dir():
        pytest.skip("the page's folder is not here")
    if shutil.which("npm") is None:
        pytest.skip("there is no npm, which the page's libraries come from")
    for name in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            absent(f"{name} is not installed (pip install 'sd3kit[site]')")
    command = [sys.executable, SITE / "serve.py", "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        if "http" not in line:
            absent(f"the page could not be built: {server.stderr.read().strip().splitlines()[-1]}")
        yield re.search(r"http://\S+/", line)[0]
    finally:
        server.terminate()
        server.communicate(timeout=15)


def launch(chromium, flags: list[str]):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    system = next(filter(None, map(shutil.which, names)), None)
    if system is None and not Path(chromium.executable_path).exists():
        absent("there is no Chromium (apt-get install chromium, or playwright install chromium)")
    return chromium.launch(executable_path=system, args=flags)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("Playwright is not installed (pip install 'sd3kit[browser]')")
    with sync_playwright() as playwright:
        started = launch(playwright.chromium, [*FLAGS, "--disable-gpu"])
        yield started
        started.close()


def loaded(browser, address: str, backend: str):
    """A page of the same origin without an interface, to run the page's modules in, with a worker that is loaded."""
    page = browser.new_page()
    page.set_default_timeout(0)
    page.goto(f"{address}style.css")
    page.evaluate(
        """async (wanted) => {
          window.worker = new Worker('/worker.js', { type: 'module' });
          let last = 0;
          window.ask = (message) => new Promise((resolve, reject) => {
            const id = message.id ?? ++last;
            worker.onmessage = ({ data }) => {
              if (data.kind === 'error') reject(new Error(data.message));
              if (data.id === id && data.kind !== 'step') resolve(data);
              if (message.kind === 'load' && data.kind === 'ready') resolve(data);
            };
            worker.postMessage({ ...message, id });
          });
          window.backend = (await ask({ kind: 'load', wanted })).backend;
        }""",
        backend,
    )
    return page


@pytest.fixture(scope="module")
def bench(browser, address):
    page = loaded(browser, address, "wasm")
    yield page
    page.close()


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """Every address that the page of these tests asks for."""
    return []


@pytest.fixture(scope="module")
def site(browser, address, asked):
    """The page as a visitor opens it: it draws by itself, here with few steps."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    context.on("request", lambda request: asked.append(request.url))
    page.add_init_script(
        """window.shifts = [];
        new PerformanceObserver((list) => {
          for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts.push(entry.value);
        }).observe({ type: 'layout-shift', buffered: true });"""
    )
    page.goto(f"{address}#prompt=a+fox+on+a+red+background,+flat&steps=3&seed=5")
    drawn(page)
    yield page
    shot(page, "site-last")
    context.close()
    assert not faults


def shot(page, name: str) -> None:
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)


def drawn(page, of: int = 1) -> None:
    """Wait until so many pictures are drawn, and the view under the hood shows the steps."""
    done = f"{of} of {of} pictures" if of > 1 else "Drawn in"
    page.wait_for_function(
        """done => {
          const status = document.querySelector('#status');
          return status.className === 'error' || status.textContent.includes(done);
        }""",
        arg=done,
        timeout=PATIENCE,
    )
    assert done in page.inner_text("#status")
    page.wait_for_function(
        "[...document.querySelectorAll('#strip button')].some((frame) => /step (\\d+) of \\1,/.test(frame.ariaLabel))",
        timeout=PATIENCE,
    )


def pixels(message: dict) -> np.ndarray:
    """The picture in a worker's answer, (H, W, 3)."""
    side = message["size"]
    return np.array(message["rgba"], np.uint8).reshape(side, side, 4)[..., :3]


def same(mine: np.ndarray, theirs: np.ndarray, within: tuple[float, float] = FEW) -> None:
    apart = np.abs(mine.astype(int) - np.asarray(theirs).astype(int))
    print(f"\nlargest difference {apart.max()} of 255, mean {apart.mean():.4f}")
    assert apart.max() <= within[0]
    assert apart.mean() <= within[1]


def draw(bench, settings: dict, model: str = NANO, **more) -> dict:
    return bench.evaluate(
        """async ([settings, { picture, mask, word }]) => {
          const drawn = await ask({
            kind: 'draw',
            settings,
            picture: picture && Uint8ClampedArray.from(picture),
            mask: mask && Uint8Array.from(mask),
          });
          const looks = word && (await ask({ kind: 'attention', id: drawn.id, word, step: 0 }));
          return { ...drawn, rgba: Array.from(drawn.rgba), looks: looks && Array.from(looks.map) };
        }""",
        [settings | {"model": model}, more],
    )


# ---- equal to Python ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32 + 7])
def test_noise_is_torchs(bench, seed):
    script = """async seed => {
      const { Generator, randn } = await import('/random.js');
      const generator = new Generator(seed);
      return [Array.from(randn(generator, 4096)), Array.from(randn(generator, 64))];
    }"""
    generator = torch.Generator().manual_seed(seed)
    for mine, shape in zip(bench.evaluate(script, seed), ((1, 16, 16, 16), (1, 1, 8, 8)), strict=True):
        theirs = torch.randn(shape, generator=generator).flatten()
        torch.testing.assert_close(torch.tensor(mine), theirs, atol=3e-6, rtol=0)


@pytest.mark.parametrize(("steps", "shift"), [(28, 3.0), (1, 3.0), (4, 1.0), (50, 6.5)])
@pytest.mark.parametrize("model", ["nano", "nano-turbo"])
def test_noise_levels_are_the_schedulers(bench, pipe, turbo, model, steps, shift):
    script = """async ([model, steps, shift]) => {
      const about = await (await fetch('/model/nano.json')).json();
      const { sigmas, from_strength } = await import('/sampler.js');
      const levels = sigmas(steps, shift, about.models[model]);
      return [Array.from(levels), [0.1, 0.5, 0.6, 1].map((strength) => from_strength(levels, strength).length - 1)];
    }"""
    levels, left = bench.evaluate(script, [model, steps, shift])
    mine = torch.tensor(levels, dtype=torch.float32)
    # one step alone is nano's: a single level cannot be stretched
    of = turbo if model == TURBO and steps > 1 else pipe
    torch.testing.assert_close(mine, explore.sigmas(of, steps, shift), atol=1e-6, rtol=1e-6)
    # what diffusers' get_timesteps keeps
    assert left == [steps - int(max(steps - min(steps * s, steps), 0)) for s in (0.1, 0.5, 0.6, 1)]


PROMPTS = [
    FOX,
    "",
    'A cat holding a sign that says "hello world"',
    "2 dogs & a café, naïve 東京 😀!?",
    "it's a dog's  life\n\ttab",
    " ".join(["strawberry"] * 300),
    " leading space",
    "<|endoftext|> fox </s> <pad>",
    "don't STOP İ ½ ﬁ A\u030a e\u0301",
]


def test_tokens_are_the_tokenizers(bench, pipe):
    script = """async (prompts) => {
      const { Tokens } = await import('/tokens.js');
      const json = async (name) => (await fetch(`/model/${name}.json`)).json();
      const files = await Promise.all(['tokenizer', 'tokenizer_2', 'tokenizer_3'].map(json));
      window.tokens = new Tokens(files, await json('nano'));
      return prompts.map((prompt) => [tokens.length(prompt), tokens.ids(prompt, tokens.length(prompt))]);
    }"""
    for prompt, (length, mine) in zip(PROMPTS, bench.evaluate(script, PROMPTS), strict=True):
        assert length == prompt_length(pipe, prompt)
        for ids, name, most in zip(mine, ("tokenizer", "tokenizer_2", "tokenizer_3"), (77, 77, length), strict=True):
            tokenizer = getattr(pipe, name)
            theirs = tokenizer(prompt, padding="max_length", max_length=most, truncation=True).input_ids
            assert ids == theirs, (prompt, name)
    prompt = "A cat holding a sign that says hello, with a hat on a teal background"
    pairs = [(prompt, word) for word in ("cat", "sign", "hello", "teal", "background", "a", "hat")]
    pairs += [
        ("a 🦊🦊 fox on a red background", "fox"),
        ("éé, “ééé” — a dog on blue", "dog"),
        ("a <b>fox</b> on … red", "red"),
    ]
    for prompt, word in pairs:
        places = bench.evaluate("([prompt, word]) => tokens.places(prompt, word, 40)", [prompt, word])
        assert places == attention.word_tokens(pipe, prompt, word), (prompt, word)


def test_text_to_image_is_the_same_with_where_it_looks(bench, pipe):
    settings = dict(prompt=FOX, negative_prompt="flat", seed=3, steps=4, guidance=5.0, shift=2.0, size=96)
    got = draw(bench, settings, word="fox")
    same(pixels(got), explore.text_to_image(pipe, **settings).image)
    settings = dict(prompt=FOX, negative_prompt="", seed=3, steps=2, guidance=7.0, shift=3.0, size=128)
    got = draw(bench, settings, word="fox")
    maps = attention.maps(pipe, FOX, ["fox"], seed=3, steps=2, guidance_scale=7.0)["raw"][0].mean((0, 1))
    torch.testing.assert_close(torch.tensor(got["looks"]).view_as(maps), maps, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("steps", [4, 1])
def test_nano_turbo_draws_the_same(bench, turbo, steps):
    settings = dict(prompt=FOX, negative_prompt="", seed=3, steps=steps, guidance=1.0, shift=3.0, size=128)
    same(pixels(draw(bench, settings, TURBO)), explore.text_to_image(turbo, **settings).image)


@pytest.mark.night
def test_without_guidance_and_at_another_size_it_is_the_same(bench, pipe):
    settings = dict(prompt=FOX, negative_prompt="", seed=11, steps=2, guidance=1.0, shift=3.0, size=64)
    same(pixels(draw(bench, settings)), explore.text_to_image(pipe, **settings).image)


@pytest.mark.parametrize(
    ("model", "masked", "strength"),
    [(NANO, False, 0.6), (NANO, False, 1.0), (NANO, True, 0.6), (NANO, True, 1.0), (TURBO, True, 0.6)],
)
def test_image_to_image_and_inpainting_are_the_same(bench, pipe, turbo, model, masked, strength):
    start = Image.fromarray(np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)).convert("RGB")
    start.paste((200, 40, 40), (15, 10, 45, 35))
    settings = dict(
        prompt=FOX, negative_prompt="", seed=2, steps=3, guidance=3.0, shift=3.0, size=64, strength=strength
    )  # fmt: skip
    where = np.zeros((64, 64), np.uint8)
    where[20:64, 5:38] = 1
    rgba = np.dstack([np.asarray(start), np.full((64, 64), 255, np.uint8)])
    mask = {"mask": where.ravel().tolist()} if masked else {}
    got = draw(bench, settings, model, picture=rgba.ravel().tolist(), **mask)
    of = turbo if model == TURBO else pipe
    theirs = explore.image_to_image(of, start, mask=Image.fromarray(where * 255) if masked else None, **settings)
    same(pixels(got), theirs.image)


def test_webgpu_draws_the_same(browser, address, pipe):
    """In float32 on a graphics processor that Chromium imitates, which takes minutes."""
    if not os.environ.get("SD3KIT_TEST_WEBGPU"):
        pytest.skip("takes minutes without a graphics processor: SD3KIT_TEST_WEBGPU=1, nightly")
    settings = dict(prompt=FOX, negative_prompt="", seed=11, steps=1, guidance=1.0, shift=3.0, size=64)
    with contextlib.closing(launch(browser.browser_type, FLAGS + WEBGPU)) as other:
        page = loaded(other, address, "webgpu")
        assert page.evaluate("window.backend") == "webgpu"
        same(pixels(draw(page, settings)), explore.text_to_image(pipe, **settings).image)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_first_picture_is_nano_turbos_and_nanos_is_that_of_the_command_line(browser, address, turbo, tmp_path):
    """Seed 7, each with its own settings; also what the first visit takes in bytes and seconds."""
    command = [FOX, "--seed", "7", "-o", str(tmp_path / "nano.png")]
    assert cli.main(["generate", *command]) == 0
    explore.text_to_image(turbo, FOX, seed=7).save(tmp_path / "nano-turbo.png")
    context = browser.new_context(accept_downloads=True)
    page, sizes = context.new_page(), {}
    devtools = context.new_cdp_session(page)
    devtools.send("Network.enable")
    context.on("requestfinished", lambda request: sizes.update({request.url: request.sizes()["responseBodySize"]}))
    page.goto(f"{address}#{'prompt=' + FOX.replace(' ', '+')}&seed=7")
    drawn(page)
    for model in (TURBO, NANO):
        if model != page.input_value("#model"):
            page.locator("#model").select_option(model)
            page.locator("#draw").click()
            drawn(page)
        told = page.evaluate("[document.documentElement.dataset.ready, document.documentElement.dataset.drawn]")
        print(f"\n{model}: ready after {told[0]} s, drawn in {told[1]} s")
        with page.expect_download() as download:
            page.get_by_role("link", name="Download").click()
        download.value.save_as(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as picture, Image.open(tmp_path / f"{model}.png") as theirs:
            assert json.loads(picture.text["sd3kit"])["model"] == model
            assert explore.from_png(tmp_path / "page.png") == explore.from_png(tmp_path / f"{model}.png")
            same(np.asarray(picture.convert("RGB")), theirs, USUAL)
    dist = SITE / "dist"
    paths = {url.removeprefix(address).split("#")[0] or "index.html" for url in sizes if url.startswith(address)}
    assert "model/weights.f16" in paths and "vendor/ort-wasm-simd-threaded.wasm" in paths
    total = sum((dist / path).stat().st_size for path in paths if (dist / path).is_file())
    print(f"\nfirst visit: {len(paths)} files, {total / 1e6:.1f} MB")
    assert total < TRANSFER
    context.close()


def test_it_says_what_nano_is_and_shows_the_steps(site):
    count = f"{sum(p.numel() for m in models() for p in m.parameters()) / 1e6:.1f}"
    assert f"A Stable Diffusion 3 of {count} million parameters" in site.inner_text("header")
    assert site.get_by_role("img", name="a fox on a red background, flat; seed 5; nano-turbo").count() >= 1
    assert site.locator("#strip button").count() == 3
    before = site.locator("#heat").get_attribute("aria-label")
    assert re.match("Where the picture looks at fox in the mean of all steps and layers: most at row", before)
    site.get_by_role("group", name="Words of the prompt").get_by_role("button", name="red").click()
    site.wait_for_function("before => document.querySelector('#heat').ariaLabel !== before", arg=before)
    shot(site, "site-wide-light")


def models():
    parts = sd3kit.load("nano", quiet=True).components.values()
    return [part for part in parts if isinstance(part, torch.nn.Module)]


def test_words_that_nano_does_not_know_are_marked(site):
    site.get_by_label("Prompt", exact=True).fill("a woman with a foxx, 3d")
    assert site.locator("#marks u").all_inner_texts() == ["woman", "foxx"]
    site.get_by_label("Prompt", exact=True).fill("a foxx holding a sign that says qwerty on a blue background")
    assert site.locator("#marks u").all_inner_texts() == ["foxx"]
    site.locator("#hint").get_by_role("button", name="fox", exact=True).click()
    assert site.input_value("#prompt") == "a fox holding a sign that says qwerty on a blue background"
    assert site.locator("#marks u").count() == 0
    site.get_by_label("Prompt", exact=True).fill("a cat holding a sign that says abcdefgh")
    assert "too long" in site.inner_text("#hint")


def test_every_caption_of_the_recipe_is_known(site):
    """What nano was trained on is never marked."""
    script = """async (captions) => {
      const { Words } = await import('./words.js');
      const words = new Words((await (await fetch('model/nano.json')).json()).words);
      return captions.flatMap((caption) => words.unknown(caption).map(({ word }) => `${word} in ${caption}`));
    }"""
    import random

    from sd3kit.recipe import scenes
    from sd3kit.recipe.judge import Judge

    rng, subjects = random.Random(1), Judge().subjects
    kinds = ("single", "sign", "pair", "count")
    captions = [scenes.caption(scenes.random_scene(rng, subjects, kinds[i % 4]), rng) for i in range(400)]
    assert site.evaluate(script, captions) == []


@pytest.mark.night
def test_chips_change_the_prompt(site):
    site.get_by_label("Prompt", exact=True).fill("a fox on a blue background, 3d")
    for group, chip in (("Subjects", "owl"), ("Background colours", "orange"), ("Styles", "noto")):
        site.get_by_role("group", name=group).get_by_role("button", name=chip, exact=True).click()
    assert site.input_value("#prompt") == "an owl on an orange background, noto"
    site.get_by_role("group", name="Words on a sign").get_by_role("button", name="open").click()
    assert site.input_value("#prompt") == "an owl holding a sign that says open on an orange background, noto"
    pressed = site.locator(".chips [data-kind][aria-pressed=true]").all_inner_texts()
    assert pressed == ["noto", "orange", "“open”", "owl"]
    script = """async ([prompt, kind, value]) => {
      const { Words } = await import('./words.js');
      return new Words((await (await fetch('model/nano.json')).json()).words).with(prompt, kind, value);
    }"""
    for prompt, kind, value, then in (
        ("two cats on teal", "subject", "mouse", "two mice on teal"),
        ("two cats on teal", "colour", "red", "two cats on red"),
        ("", "style", "flat", "a fox, flat"),
        ("a cat holding a sign that says hi, flat", "sign", "open", "a cat holding a sign that says open, flat"),
        (
            "a cat holding a sign that says hi",
            "colour",
            "orange",
            "a cat holding a sign that says hi on an orange background",
        ),
    ):
        assert site.evaluate(script, [prompt, kind, value]) == then


def test_by_keyboard_alone(site):
    site.locator("#prompt").focus()
    site.keyboard.press("Control+A")
    site.keyboard.type("a star on a black background, flat")
    site.keyboard.press("Enter")
    site.wait_for_function("document.querySelector('#draw').textContent === 'Stop'")
    drawn(site)
    assert "a star on a black background, flat; seed 5; nano-turbo" in site.inner_text("#live")
    site.locator("#tab-text").focus()
    site.keyboard.press("ArrowRight")
    assert site.evaluate("document.activeElement.id") == "tab-change"
    assert site.locator("#paint").is_visible()
    site.keyboard.press("ArrowLeft")
    assert not site.locator("#paint").is_visible()


def test_a_wrong_setting_is_said_and_not_mended(site):
    site.locator("#seed").fill("-5")
    site.locator("#draw").click()
    assert site.inner_text("#status") == "The seed must be a whole number from 0 to 4294967295."
    site.locator("#seed").fill("5")
    site.locator("#prompt").fill(" ")
    site.locator("#draw").click()
    assert site.inner_text("#status").startswith("The prompt is empty")


def test_a_model_brings_its_own_settings(site):
    def shown() -> list[str]:
        return [site.input_value(f"#{name}") for name in ("steps", "guidance", "shift")]

    for model in (NANO, TURBO):
        site.locator("#model").select_option(model)
        assert shown() == [f"{value:g}" for value in (*own_settings(model).values(), 3)]
    site.evaluate("location.hash = 'prompt=a+fox&model=medium'")
    site.wait_for_function("document.querySelector('#status.error')")
    assert site.inner_text("#status") == "There is no such model in this page: choose nano or nano-turbo."
    site.evaluate("location.hash = 'prompt=a+fox+on+a+red+background,+flat&model=nano-turbo&seed=5'")
    site.wait_for_function("!document.querySelector('#status.error')")
    drawn(site)


@pytest.mark.night
def test_two_models_side_by_side_each_with_its_own_steps(site):
    site.get_by_role("tab", name="Compare").click()
    site.locator("#other").select_option("model")
    site.locator("#draw").click()
    drawn(site, 2)
    assert site.locator(".tile span").all_inner_texts() == ["A: nano-turbo, 4 steps", "B: nano, 28 steps"]
    site.locator(".tile").nth(1).click()
    site.wait_for_function("/ of 28,/.test(document.querySelector('#strip button')?.ariaLabel)", timeout=PATIENCE)
    shot(site, "site-models")
    site.get_by_role("tab", name="Text to image").click()


@pytest.mark.night
def test_two_settings_side_by_side_on_the_same_seeds(site):
    site.get_by_role("tab", name="Compare").click()
    site.locator("#prompt").fill("a sun on a purple background, flat")
    site.locator("#other").select_option("guidance")
    site.locator("#other-value").fill("2")
    site.get_by_text("Four", exact=True).click()
    site.locator("#draw").click()
    drawn(site, 4)
    assert site.locator(".tile span").all_inner_texts() == ["A: guidance 1", "B: guidance 2"] * 2
    names = [image.get_attribute("alt") for image in site.locator(".tile img").all()]
    assert [re.search(r"seed (\d+)", name)[1] for name in names] == ["5", "5", "6", "6"]
    shot(site, "site-compare")
    site.get_by_role("tab", name="Text to image").click()
    site.get_by_text("One", exact=True).click()


@pytest.mark.night
def test_a_picture_is_changed_under_a_mask_painted_by_hand(site):
    site.get_by_role("button", name="Change it").click()
    site.wait_for_function("document.querySelector('#status').textContent.startsWith('Say what')")
    site.locator("#paint").scroll_into_view_if_needed()
    box = site.locator("#paint").bounding_box()
    site.mouse.move(box["x"] + 20, box["y"] + 20)
    site.mouse.down()
    site.mouse.move(box["x"] + 90, box["y"] + 120, steps=4)
    site.mouse.up()
    assert site.locator("#strength").input_value() == "1"
    assert "with a mask" in site.locator("#paint").get_attribute("aria-label")
    site.locator("#prompt").fill("a moon on a purple background, flat")
    site.locator("#draw").click()
    drawn(site)
    shot(site, "site-change")
    with site.expect_download() as download:
        site.get_by_role("link", name="Download").click()
    assert explore.from_png(Path(download.value.path()))["strength"] == 1


@pytest.mark.night
@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_is_taken_by_paste_and_by_drop(site, way):
    site.get_by_role("tab", name="Text to image").click()
    site.evaluate(
        """async (way) => {
          const blob = await (await fetch(document.querySelector('#stage img').src)).blob();
          const data = new DataTransfer();
          data.items.add(new File([blob], 'a.png', { type: 'image/png' }));
          const paste = new ClipboardEvent('paste', { clipboardData: data });
          const drop = new DragEvent('drop', { dataTransfer: data });
          document.querySelector('#status').textContent = '';
          dispatchEvent(way === 'paste' ? paste : drop);
        }""",
        way,
    )
    site.wait_for_function("document.querySelector('#status').textContent.startsWith('Say what')")
    assert site.locator("#paint").get_attribute("aria-label") == "The picture that is changed"
    assert site.get_by_role("tab", name="Image to image").get_attribute("aria-selected") == "true"


def test_a_file_that_is_no_picture_is_refused_in_one_sentence(site):
    site.locator("#file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": b"nothing"})
    site.wait_for_function("document.querySelector('#status.error')")
    assert "is not a picture" in site.inner_text("#status")
    site.get_by_role("tab", name="Text to image").click()


@pytest.mark.night
def test_settings_come_back_from_a_picture_of_python(site, pipe):
    made = explore.text_to_image(pipe, "a ghost, \u201cnoto\u201d", seed=9, steps=2, guidance=3.0)
    site.locator("#settings-file").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": made.png()})
    site.wait_for_function("document.querySelector('#status').textContent.includes('those of the picture')")
    values = {name: site.input_value(f"#{name}") for name in ("model", "prompt", "seed", "steps", "guidance")}
    assert values == {
        "model": NANO, "prompt": "a ghost, \u201cnoto\u201d", "seed": "9", "steps": "2", "guidance": "3"
    }  # fmt: skip
    assert "does not say which model" in site.inner_text("#status")
    site.locator("#model").select_option(TURBO)


def test_stop_ends_what_is_drawn_and_what_waits(site):
    site.locator("#prompt").fill("a sun on a purple background, flat")
    site.locator("#model").select_option(NANO)
    site.locator("#steps").evaluate("steps => { steps.value = 50; }")
    site.get_by_text("Four", exact=True).click()
    site.locator("#draw").click()
    site.wait_for_function("/step [2-9]/.test(document.querySelector('#status').textContent)", timeout=PATIENCE)
    site.locator("#draw").click()
    assert (site.inner_text("#status"), site.inner_text("#draw")) == ("Stopped.", "Draw")
    site.locator("#model").select_option(TURBO)
    site.get_by_text("One", exact=True).click()
    site.locator("#draw").click()
    drawn(site)


def test_a_wrong_setting_while_it_draws_ends_the_drawing_with_a_sentence(site):
    site.locator("#prompt").fill("a sun on a purple background, flat")
    site.locator("#model").select_option(NANO)
    site.locator("#steps").evaluate("steps => { steps.value = 50; }")
    site.locator("#prompt").press("Enter")  # which draws anew also while something is drawn
    site.wait_for_function("/Step [2-9]/.test(document.querySelector('#status').textContent)", timeout=PATIENCE)
    site.locator("#prompt").fill("")
    site.locator("#prompt").press("Enter")
    assert (site.get_attribute("#status", "class"), site.inner_text("#draw")) == ("error", "Draw")
    site.locator("#prompt").fill(FOX)
    site.locator("#model").select_option(TURBO)
    site.locator("#draw").click()
    drawn(site)


@pytest.mark.night
def test_a_link_holds_the_settings(site, browser):
    site.locator("#negative_prompt").evaluate("input => { input.value = 'flat'; }")
    site.locator("#model").select_option(NANO)  # not what the page opens with
    site.get_by_role("button", name="Copy link").click()
    link = site.evaluate("navigator.clipboard.readText()")
    other = browser.new_page()
    other.goto(link)
    other.wait_for_function("document.querySelector('#prompt').value")
    for name in ("model", "prompt", "negative_prompt", "seed", "steps", "guidance", "shift", "size"):
        assert other.input_value(f"#{name}") == site.input_value(f"#{name}"), name
    other.close()
    site.locator("#model").select_option(TURBO)


@pytest.mark.night
def test_the_layout_never_jumps(site):
    assert sum(site.evaluate("window.shifts")) < 0.02


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_nothing_serious_in_the_accessibility_scan(site, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    site.set_viewport_size({"width": width, "height": 850})
    site.emulate_media(color_scheme=scheme)
    assert site.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out at the side"
    for tab in ("Image to image", "Compare", "Text to image"):
        site.get_by_role("tab", name=tab).click()
        site.locator("#more").evaluate("more => { more.open = true; }")
        found = [v for v in Axe().run(site).response["violations"] if v["impact"] in ("serious", "critical")]
        assert not found, json.dumps([(v["id"], [n["html"] for n in v["nodes"]]) for v in found], indent=1)
    shot(site, f"site-{width}-{scheme}")


@pytest.mark.night
def test_the_gallery_survives_a_reload(site):
    before = site.locator("#gallery img").count()
    newest = site.locator("#gallery img").first.get_attribute("alt")
    assert before
    site.reload()
    site.wait_for_function("n => document.querySelectorAll('#gallery img').length >= n", arg=before)
    assert newest in [image.get_attribute("alt") for image in site.locator("#gallery img").all()][:2]
    drawn(site)
    site.locator("#gallery button").last.click()  # the first that was drawn
    assert site.input_value("#prompt") == "a fox on a red background, flat"
    assert site.locator("#stage img").get_attribute("alt") == "a fox on a red background, flat; seed 5; nano-turbo"


def test_no_request_leaves_for_another_host(site, asked, address):
    """After all that these tests have done with the page."""
    assert len(asked) > 20
    assert [url for url in asked if not url.startswith((address, "blob:", "data:"))] == []


def test_a_file_that_is_missing_is_said_in_one_sentence(browser, address):
    context = browser.new_context()
    context.route("**/weights.f16", lambda route: route.fulfill(status=404))
    page = context.new_page()
    page.goto(address)
    page.wait_for_function("document.querySelector('#status.error')", timeout=PATIENCE)
    assert page.inner_text("#status") == "model/weights.f16 could not be loaded (404): reload the page."
    assert page.inner_text("#draw") == "Draw"
    context.close()


@pytest.mark.night
def test_any_web_host_in_a_folder_will_do(browser, address):
    """Without the headers of serve.py: with the page's own service worker on threads, without it on one."""

    class Plain(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Plain, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for workers, threads in (("allow", os.cpu_count() > 1), ("block", False)):
            context = browser.new_context(service_workers=workers)
            page = context.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/dist/#prompt={FOX.replace(' ', '+')}&steps=1&size=64")
            drawn(page)
            assert page.evaluate("crossOriginIsolated") == (workers == "allow")
            assert ("one thread" in page.inner_text("#machine")) != threads
            context.close()
        server.shutdown()
