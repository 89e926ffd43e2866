"""The explorers in a real browser, headless Chromium by Playwright: a lesson in JupyterLab, the page of `make app`.

Screenshots are kept in tests/artefacts.
"""

import base64
import contextlib
import html
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import lessons
import nbformat
import pytest
from PIL import Image

ARTEFACTS = Path(__file__).parents[1] / "artefacts"
PATIENCE = 120_000  # milliseconds for what waits on a drawing, on a machine that is busy
START = 300_000  # and on a server or a kernel
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]
KERNEL = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
pytestmark = pytest.mark.xdist_group("browser")  # one browser and one server for all of them
SETTING = "a panda on a green background, flat"


def absent(reason: str) -> None:
    """No browser: said, and under CI a failure."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; under CI the browser tests must run")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if "PYTEST_XDIST_WORKER" in os.environ:
        mine = tmp_path_factory.getbasetemp().parent / "browser"
        if mine.exists():
            pytest.fail(
                "a second process runs browser tests, which build on each other: xdist did not keep their group"
            )
        mine.touch()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("Playwright is not installed (pip install 'sd3kit[browser]')")
    with sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
        system = next(filter(None, map(shutil.which, names)), None)
        if system is None and not Path(playwright.chromium.executable_path).exists():
            absent("there is no Chromium (apt-get install chromium, or playwright install chromium)")
        started = playwright.chromium.launch(executable_path=system, args=FLAGS)
        yield started
        started.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def serving(command: list[str], folder: Path, port: int):
    """A server of Jupyter's family with nothing of this machine's settings; gives its address once it listens."""
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "IPYTHONDIR": str(folder / "ipython"),
        "HF_HUB_OFFLINE": "1",
    }
    log = (folder / "log.txt").open("w+")
    server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while not listening(port):
            if server.poll() is not None or time.monotonic() > end:
                log.seek(0)
                pytest.fail(f"the server did not start: {log.read()[-2000:]}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


def lesson(folder: Path) -> None:
    """Lesson 00 up to its pipeline, and its explorer; the whole of it is executed by test_notebooks."""
    notebook = nbformat.read(lessons.LESSONS[0], as_version=4)
    needed = ("import sd3kit", "sd3kit.load()", "explore.TextToImage(")
    code = [c for c in notebook.cells if c.cell_type == "code" and any(part in c.source for part in needed)]
    assert code, "lesson 00 loads a pipeline"
    chosen = [notebook.cells[0]]
    for part in needed:
        chosen += [next((c for c in code if part in c.source and c not in chosen), None)]
    if chosen[-1] is None:
        source = "from sd3kit import explore\n\nexplore.TextToImage(pipe)"
        chosen[-1] = nbformat.v4.new_code_cell(source)
    for cell in chosen:
        cell.pop("outputs", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.cells = [cell for cell in chosen if cell is not None]
    nbformat.write(notebook, folder / "lesson.ipynb")


def shot(page, name: str) -> None:
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"{name}.png")


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """Lesson 00 in JupyterLab, run with the Run menu; gives the page."""
    folder = tmp_path_factory.mktemp("lab")
    lesson(folder)
    off = folder / "config" / "labconfig" / "page_config.json"
    off.parent.mkdir(parents=True)
    off.write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    port = free_port()
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly"]
    with serving(command, folder, port) as address:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        try:
            page.goto(f"{address}/lab/tree/lesson.ipynb", timeout=START)
            page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=START)
            # cells that are run before the kernel answers are dropped
            page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=START)
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
            page.locator(".sd3kit-explorer").first.wait_for(timeout=START)
        finally:
            shot(page, "lab-start")
        yield page
        page.close()


@pytest.fixture
def explorer(lab):
    root = lab.locator(".sd3kit-explorer").first
    root.scroll_into_view_if_needed()
    yield root
    shot(lab, "lab-last")


@pytest.fixture(scope="module")
def site(browser, tmp_path_factory):
    """The explorers as a page, as `make app` serves a real model; gives the browser's page."""
    pytest.importorskip("voila") if not os.environ.get("CI") else __import__("voila")
    folder, port = tmp_path_factory.mktemp("page"), free_port()
    shutil.copy(Path(__file__).parents[2] / "site" / "explorers.ipynb", folder)
    command = [sys.executable, "-m", "voila", "explorers.ipynb", "--no-browser", f"--port={port}"]
    with serving(command, folder, port) as address:
        page = browser.new_page(viewport={"width": 1100, "height": 1300}, accept_downloads=True)
        page.goto(address, timeout=START)
        page.locator(".sd3kit-explorer").nth(1).wait_for(timeout=START)
        yield page
        page.close()


OTHERS = """import sd3kit
from IPython.display import display
from peft import LoraConfig
from sd3kit import explore

pipe = sd3kit.load(quiet=True)
pipe.own_settings = {"steps": 8, "guidance": 4.0}  # what is drawn here need not be good
pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "mine")
for explorer in (explore.Schedule, explore.Attention, explore.Encoders, explore.Lora):
    display(explorer(pipe, "a fox on a blue background, flat"))"""


@pytest.fixture(scope="module")
def others(browser, tmp_path_factory):
    """The explorers of the later lessons on one page; gives the browser's page."""
    folder, port = tmp_path_factory.mktemp("others"), free_port()
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(OTHERS)], metadata=KERNEL), folder / "others.ipynb"
    )
    command = [sys.executable, "-m", "voila", "others.ipynb", "--no-browser", f"--port={port}"]
    with serving(command, folder, port) as address:
        page = browser.new_page(viewport={"width": 1100, "height": 1300})
        page.goto(address, timeout=START)
        page.locator(".sd3kit-explorer").nth(3).wait_for(timeout=START)
        yield page
        shot(page, "others")
        page.close()


# ---- what a person does


def status(root):
    return root.locator(".sd3kit-said")


def done(root, words: str = "Done") -> str:
    """Wait for these words, and return the line that holds them: the next drawing may replace it at once."""
    line = "([at, words]) => { const text = at.innerText; return new RegExp(words).test(text) && text; }"
    found = root.page.wait_for_function(line, arg=[status(root).element_handle(), words], timeout=PATIENCE)
    return found.json_value().strip()


def ask(root, prompt: str) -> None:
    box = root.get_by_label("Prompt", exact=True)
    box.fill(prompt)
    box.press("Enter")


def slider(root, name: str):
    return root.get_by_role("slider", name=name, exact=True)


def unfold(root, title: str = "More") -> None:
    """Open a folded pane, if it is not open."""
    pane = root.get_by_role("button", name=title, exact=True).or_(root.get_by_text(title, exact=True)).first
    if not root.get_by_label("Negative prompt", exact=True).is_visible():
        pane.click()
    root.get_by_label("Negative prompt", exact=True).wait_for(timeout=PATIENCE)


def seen(root) -> None:
    """Write down in the page what the status line, the progress bar and the picture show from now on."""
    root.evaluate(
        """root => {
            window.seen = [];
            const note = () => {
                const bar = root.querySelector('progress'), image = root.querySelector('img[alt^="Preview"]');
                window.seen.push([root.querySelector('.sd3kit-said').innerText.trim(), bar ? bar.value : 0,
                                  image ? image.alt : '']);
            };
            new MutationObserver(note).observe(root, {childList: true, subtree: true, characterData: true});
        }"""
    )


def picture(root, alt: str) -> Image.Image:
    """The picture with this alternative text, as the browser has it."""
    image = root.get_by_alt_text(alt, exact=True).first
    image.wait_for(timeout=PATIENCE)
    return Image.open(io.BytesIO(base64.b64decode(image.get_attribute("src").partition(",")[2])))


def serious(page, context: str) -> list[str]:
    """What axe-core finds in a part of the page and calls serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context=context).response["violations"]
    return [
        f"{item['id']} ({item['impact']}): {[node['html'][:160] for node in item['nodes']][:3]}"
        for item in found
        if item["impact"] in ("serious", "critical")
    ]


def test_a_prompt_typed_in_the_lesson_is_drawn(lab, explorer, judge):
    seen(explorer)
    ask(explorer, SETTING)
    assert re.match(r"Done: 28 steps in [\d.]+ s", done(explorer))
    drawn = picture(explorer, f"{SETTING}; seed 0")
    assert judge.background(drawn) == "green" and judge.subject(drawn)[0] == "panda"
    said, bars, previews = zip(*lab.evaluate("window.seen"), strict=True)
    assert "Drawing…" in said
    assert len(set(bars)) > 5 and max(bars) == 28
    assert any(re.match(rf"Preview of step \d+ of 28: {SETTING}; seed 0", alt) for alt in previews)
    shot(lab, "lab-done")


def test_stop_in_the_lesson(lab, explorer):
    seen(explorer)
    slider(explorer, "Steps").press("End")  # 50 steps; a change draws
    explorer.locator("progress").wait_for(timeout=PATIENCE)
    explorer.get_by_role("button", name="Stop", exact=True).click()
    words = done(explorer, "Stopped after")
    shot(lab, "lab-stopped")
    assert 1 <= int(re.search(r"after (\d+) of 50", words)[1]) < 50
    slider(explorer, "Steps").press("Home")
    assert "1 steps" in done(explorer, "Done: 1 steps")


@pytest.mark.night
def test_sliders_moved_quickly_end_with_the_last_setting(lab, explorer):
    before = explorer.get_by_role("button", name=re.compile("^Back to")).count()
    unfold(explorer)
    steps, guidance = slider(explorer, "Steps"), slider(explorer, "Guidance")
    steps.press("Home")
    for _ in range(2):
        steps.press("PageUp")
    guidance.press("Home")
    for _ in range(20):
        guidance.press("ArrowRight")
    last = float(guidance.get_attribute("aria-valuenow"))
    assert last == 11.0
    explorer.get_by_text(re.compile("guidance 11,")).wait_for(timeout=PATIENCE)
    done(explorer)
    lab.wait_for_timeout(1500)  # nothing that waited comes after
    assert explorer.get_by_text(re.compile("guidance 11,")).is_visible()
    after = explorer.get_by_role("button", name=re.compile("^Back to")).count()
    assert after - before < 12, "most drawings on the way are stopped"


def test_an_error_in_the_lesson_is_one_line_and_the_next_try_works(lab, explorer, judge):
    ask(explorer, "")
    explorer.get_by_role("alert").get_by_text("The prompt is empty").wait_for(timeout=PATIENCE)
    shot(lab, "lab-error")
    ask(explorer, "a fox on a red background, flat")
    done(explorer)
    assert explorer.get_by_role("alert").count() == 0
    assert judge.background(picture(explorer, "a fox on a red background, flat; seed 0")) == "red"


@pytest.mark.night
def test_the_lesson_by_keyboard_alone(lab, explorer, judge):
    explorer.get_by_label("Prompt", exact=True).focus()
    wording = "an apple on a yellow background, flat"
    lab.keyboard.press("Control+A")
    lab.keyboard.type(wording)
    reached, made = [], explorer.get_by_alt_text(re.compile(rf"^Picture \d+: {wording}"))
    for _ in range(40):
        lab.keyboard.press("Tab")
        if not reached:  # leaving the prompt draws: what has the focus then must not be replaced by that picture
            made.first.wait_for(timeout=PATIENCE)
            done(explorer)
        name = lab.evaluate(
            """() => { const at = document.activeElement;
                return at.closest('.sd3kit-explorer') === null ? null : at.getAttribute('aria-label') ||
                    (at.labels && at.labels.length ? at.labels[0].innerText : at.innerText).trim(); }"""
        )
        if name is None:
            break
        reached.append(name)
        if name == "Draw":
            lab.keyboard.press("Enter")
            made.nth(1).wait_for(timeout=PATIENCE)
            done(explorer)
        if name.startswith("Back to"):
            lab.keyboard.press("Space")
            done(explorer, "Back to: ")
            break
    wanted = {"Seed", "Steps", "Draw", "Stop", "Another seed", "Negative prompt", "Guidance", "Shift"}
    assert wanted <= set(reached), reached
    assert reached[-1].startswith("Back to")
    assert judge.background(picture(explorer, f"{wording}; seed 0")) == "yellow"


@pytest.mark.night
def test_a_comparison_stands_side_by_side(lab, explorer):
    unfold(explorer)
    done(explorer)
    box = explorer.get_by_label("Compare the next with these", exact=True)
    box.check()
    slider(explorer, "Guidance").press("Home")
    explorer.locator("strong").nth(1).wait_for(timeout=PATIENCE)
    labels = [label.bounding_box() for label in explorer.locator("strong").all()]
    assert labels[0]["y"] == labels[1]["y"] and labels[0]["x"] < labels[1]["x"]
    assert explorer.locator("strong").all_inner_texts() == ["guidance 11", "guidance 1"]
    box.uncheck()


@pytest.mark.night
def test_a_negative_seed_is_refused(lab, explorer):
    box = explorer.get_by_label("Seed", exact=True)
    box.fill("-5")
    box.press("Enter")
    explorer.get_by_role("alert").get_by_text("not -5").wait_for(timeout=PATIENCE)
    box.fill("0")
    box.press("Enter")
    done(explorer)


def test_nothing_serious_in_the_accessibility_scan_of_the_lessons_explorer(lab, explorer):
    assert not serious(lab, ".sd3kit-explorer")
    line = explorer.locator(".sd3kit-said > .widget-html-content")
    assert line.get_attribute("aria-live") == "polite", "the lasting element is the live region"


def test_a_saved_lesson_shows_a_still_where_no_kernel_runs(lab, explorer):
    still = lab.locator("[data-sd3kit]")
    assert still.count() == 1 and not still.is_visible(), "the explorer itself is there"
    last = explorer.locator("img[alt*='; seed']").first.get_attribute("alt")
    lab.keyboard.press("Escape")
    lab.get_by_role("menuitem", name="File", exact=True).click()
    with lab.expect_response(lambda r: r.request.method == "PUT" and "/api/contents/" in r.url, timeout=START):
        lab.get_by_role("menuitem", name=re.compile("^Save Notebook(?! As)")).first.click()
    name = json.loads(lab.evaluate("document.getElementById('jupyter-config-data').textContent"))["serverRoot"]
    saved = nbformat.read(Path(name).expanduser() / "lesson.ipynb", as_version=4)
    outputs = [output.data for cell in saved.cells for output in cell.get("outputs", []) if "data" in output]
    stored = next(data for data in outputs if "data-sd3kit" in data.get("text/html", ""))
    assert html.escape(last) in stored["text/html"] and "run this cell" in stored["text/html"]
    assert re.search(r"steps \d+, guidance", stored["text/plain"])
    assert "children=(" not in "".join(data.get("text/plain", "") for data in outputs)
    lab.get_by_role("menuitem", name="Kernel", exact=True).click()
    lab.get_by_role("menuitem", name=re.compile("^Shut Down Kernel")).click()
    lab.reload()
    still.wait_for(timeout=START)
    lab.wait_for_timeout(3000)
    assert still.is_visible() and still.get_by_alt_text(last, exact=True).is_visible()
    said = lab.locator(".jp-OutputArea:has([data-sd3kit])").get_by_text("Error displaying widget")
    assert not any(message.is_visible() for message in said.all())
    shot(lab, "lab-still")


def test_the_page_draws_an_idea_and_its_download_brings_the_settings_back(site, judge, tmp_path):
    from sd3kit.explore import from_png

    root = site.locator(".sd3kit-explorer").first
    root.get_by_label("Seed", exact=True).fill("3")
    root.get_by_text("Ideas", exact=True).click()
    root.get_by_role("button", name="an owl on a teal background, 3d", exact=True).click()
    root.get_by_role("button", name="Draw", exact=True).click()
    root.get_by_alt_text("an owl on a teal background, 3d; seed 3", exact=True).first.wait_for(timeout=PATIENCE)
    done(root)
    assert judge.background(picture(root, "an owl on a teal background, 3d; seed 3")) == "teal"
    with site.expect_download() as download:
        root.get_by_role("link", name="Download this PNG").click()
    download.value.save_as(tmp_path / "owl.png")
    settings = from_png(tmp_path / "owl.png")
    assert (settings["prompt"], settings["seed"]) == ("an owl on a teal background, 3d", 3)
    shot(site, "page-text")


@pytest.mark.night
def test_a_new_picture_leaves_the_focus_on_the_download_link(site):
    root = site.locator(".sd3kit-explorer").first
    done(root)
    root.get_by_role("link", name="Download this PNG").focus()
    before = root.get_by_role("button", name=re.compile("^Back to")).count()
    # a click that moves no focus
    root.get_by_role("button", name="Draw", exact=True).evaluate("button => button.click()")
    root.get_by_role("button", name=re.compile("^Back to")).nth(before).wait_for(timeout=PATIENCE)
    site.wait_for_function("document.activeElement.innerText === 'Download this PNG'", timeout=PATIENCE)


@pytest.mark.night
def test_the_page_changes_the_picture_and_inpaints(site, tmp_path):
    root = site.locator(".sd3kit-explorer").nth(1)
    Image.new("RGB", (96, 96), "teal").save(tmp_path / "teal.png")
    with site.expect_file_chooser() as chooser:
        root.get_by_role("button", name="Picture").click()
    chooser.value.set_files(tmp_path / "teal.png")
    root.get_by_text("Taken: 96 x 96 pixels").wait_for(timeout=PATIENCE)
    root.get_by_role("button", name="Draw", exact=True).click()
    done(root)
    root.get_by_label("Draw anew", exact=True).select_option("middle")
    root.get_by_alt_text(re.compile("veiled where it is drawn anew")).wait_for(timeout=PATIENCE)
    root.get_by_role("button", name="Back to 2", exact=True).wait_for(timeout=PATIENCE)
    root.scroll_into_view_if_needed()
    shot(site, "page-image")


def test_nothing_serious_in_the_accessibility_scan_of_the_page(site):
    assert not serious(site, "body")
    root = site.locator(".sd3kit-explorer").first
    slider(root, "Steps").press("End")
    root.locator("progress").wait_for(timeout=PATIENCE)
    assert not serious(site, ".sd3kit-explorer"), "while it draws"
    root.get_by_role("button", name="Stop", exact=True).click()
    done(root, "Stopped after|Done")


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (0, lambda root: slider(root, "Shift").press("Home")),
        (1, lambda root: root.get_by_label("Word", exact=True).select_option("blue")),
        (2, lambda root: root.get_by_label("T5", exact=True).uncheck()),
        (3, lambda root: slider(root, "mine").press("Home")),
    ],
    ids=("schedule", "attention", "encoders", "lora"),
)
def test_the_other_explorers_draw_and_follow_a_change(others, place, change):
    root = others.locator(".sd3kit-explorer").nth(place)
    root.scroll_into_view_if_needed()
    slider(root, "Steps").press("Home")
    slider(root, "Steps").press("PageUp")
    root.get_by_role("button", name="Draw", exact=True).click()
    pictures = "root => [...root.querySelectorAll('img')].map(image => image.src).join()"
    before = None
    while before != (before := root.evaluate(pictures)):  # a drawing that the slider began may end after this one began
        done(root)
        others.wait_for_timeout(2000)
    change(root)
    changed = f"([root, before]) => ({pictures})(root) !== before"
    others.wait_for_function(changed, arg=[root.element_handle(), before], timeout=PATIENCE)
    done(root)
    shot(others, f"others-{place}")


def test_nothing_serious_in_the_accessibility_scan_of_the_other_explorers(others):
    assert not serious(others, "body")
