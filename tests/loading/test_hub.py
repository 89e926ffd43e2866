"""A Hub that misbehaves in thirty ways: each ends in time, with a sentence that names the cause."""

import contextlib
import io
import re
import tempfile
import time
import traceback

import pytest
from huggingface_hub import constants, hf_api
from misbehaving_hub import serving

import sd3kit
from sd3kit.dreambooth import DreamBoothError, Settings, reporting
from sd3kit.loading import hub
from sd3kit.loading.names import NANO

# the model's name, which is how the Hub misbehaves, and what must be said
MODES = {
    "not-found": "has no model x/not-found",
    "gated": "is gated: accept its licence",
    "disabled": "has disabled",
    "no-revision": "no such revision",
    "no-file": "(has no model|lacks a file)",
    "refused-token": "asks for a token, and none is sent over http",
    "forbidden": r"\(403\): use a token that may",
    "rate": r"too many questions from you \(429\): try again in 61 minutes",
    "rate-window": "try again in 5 minutes",
    "rate-again-and-again": r"\(429\)",
    "rate-without-word": r"\(429\)",
    "error": r"error of its own \(500\)",
    "unavailable": r"error of its own \(503\)",
    "html": "is not a Hub",
    "no-json": "is not a Hub",
    "a-list": "is not a Hub",
    "an-empty-object": "is not a Hub",
    "cut": "(was cut|is not a Hub)",
    "reset": "(was cut|cannot be reached)",
    "no-http": "(was cut|is not a Hub)",
    "circle": "is not a Hub",
    "circle-elsewhere": "is not a Hub",
    "slow": "(does not answer in time|is not a Hub)",
    "silent": "does not answer in time",
    "late-no-file": "lacks a file of a diffusers pipeline",
    "late-error": r"error of its own \(500\)",
    "late-rate": r"\(429\): try again in 61 minutes",
    "late-html": "is not a Hub",
    "late-cut": "(was cut|does not answer in time)",
    "late-circle": "is not a Hub",
}
FILE_TOO = ("not-found", "rate", "html", "reset", "late-error", "late-cut")  # as the DreamBooth command asks
TOKEN = "hf_secretsecretsecretsecretsecretsecr"


@contextlib.contextmanager
def a_hub(patience: float):
    """Let this process's Hub be one that misbehaves, and its cache be empty; gives the tokens that were sent."""
    with (
        serving(NANO) as (address, tokens),
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory() as home,
    ):
        patch.setattr(hub, "PATIENCE", patience)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", home)
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(hf_api.api, "endpoint", address)
        patch.setenv("HF_TOKEN", TOKEN)
        hub._say_kept.cache_clear()
        yield tokens


def ask(mode: str, way: str = "load") -> dict:
    start, said, noise = time.monotonic(), None, io.StringIO()
    with contextlib.redirect_stderr(noise):
        try:
            if way == "load":
                sd3kit.load(f"x/{mode}", quiet=True)
            else:
                hub.file(f"x/{mode}", f"x/{mode}", "transformer/config.json")
        except Exception as error:
            assert TOKEN not in "".join(traceback.format_exception(error))
            said = [type(error).__name__, str(error)]
    assert TOKEN not in noise.getvalue()
    return {"seconds": time.monotonic() - start, "said": said, "noise": noise.getvalue()}


@pytest.fixture(scope="module")
def answers():
    """What is said of each of these models; after `bye` nobody listens any more."""
    ways = [(mode, way) for mode in MODES for way in ("load", "file") if way == "load" or mode in FILE_TOO]
    good, gone = (
        [(mode, way) for mode in modes for way in ("load", "file")] for modes in (["good"], ["good", "other"])
    )
    with a_hub(patience=2.0) as tokens:
        before = {pair: ask(*pair) for pair in good + ways}
        ask("bye")
        after = {pair: ask(*pair) for pair in gone}
    return before, after, tokens


@pytest.mark.parametrize("mode", MODES)
def test_a_hub_that_misbehaves(mode, answers):
    for row in (row for (asked, _), row in answers[0].items() if asked == mode):
        kind, sentence = row["said"]
        assert kind == "LoadError" and "\n" not in sentence and sentence.endswith(".")
        assert re.search(MODES[mode], sentence)
        assert row["seconds"] < 15  # a patience is 2 seconds here; a busy machine adds some


def test_a_good_hub_loads_and_no_token_goes_over_plain_http(answers):
    rows, _, tokens = answers
    assert rows["good", "load"]["said"] is None and rows["good", "file"]["said"] is None
    assert "your token is not sent to 127.0.0.1" in rows["good", "load"]["noise"]
    assert len(tokens) > 50 and not any(tokens)


def test_a_copy_is_used_where_the_hub_is_gone(answers):
    gone = answers[1]
    assert gone["good", "load"]["said"] is None and gone["good", "file"]["said"] is None
    for way in ("load", "file"):
        note = r"sd3kit: The Hub at http://127\.0\.0\.1:\d+ cannot be reached; the copy of x/good here is used\.\n"
        assert re.match(note, gone["good", way]["noise"])
    for way in ("load", "file"):
        kind, sentence = gone["other", way]["said"]
        assert kind == "LoadError" and "cannot be reached" in sentence and gone["other", way]["seconds"] < 15


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/cache/models--x"), "no permission for /cache/models--x.*HF_HOME"),
        (OSError(30, "Read-only file system", "/cache"), "no permission for /cache.*HF_HOME"),
        (OSError(28, "No space left on device"), "disk is full"),
    ],
)
def test_a_cache_that_cannot_be_written(error, words):
    assert re.search(words, hub.explain(error, "medium", "a/b"))


class LocalProtocolError(Exception):
    """As httpx calls it when a header holds what none may hold."""


def test_a_token_with_a_line_end_is_not_told(monkeypatch):
    def fails(*args, **more):
        raise LocalProtocolError(f"Illegal header value b'Bearer {TOKEN}\\n'")

    monkeypatch.setattr(hub, "_first_answers", fails)
    with pytest.raises(sd3kit.LoadError, match="characters that no token has") as caught:
        hub._or_copy("medium", "a/b", "x.json", fails, {"local_files_only": True})
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_names_that_the_hub_cannot_have():
    for name in ("a b/c", "a/b--c", f"a/{'b' * 300}", "ä/ö"):
        with pytest.raises(sd3kit.LoadError, match=r"no name of a model|cannot be reached"):
            sd3kit.load(name, quiet=True)


PUSHES = {
    "refused-token": "asks for a token, and none is sent over http",
    "forbidden": r"\(403\)",
    "rate": r"\(429\): try again in 61 minutes",
    "error": r"error of its own \(500\)",
    "html": "is not a Hub",
    "a-list": "is not a Hub",
    "cut": "(was cut|is not a Hub)",
    "reset": "(was cut|cannot be reached)",
    "circle": "is not a Hub",
    "slow": "does not answer in time",
    "bye": "has no model",
    "gone": "cannot be reached",
}


def test_a_training_s_repository_is_asked_for_in_the_same_way(capsys):
    """Before the training: a good Hub, one that misbehaves, and one that is gone; the token stays here."""
    with a_hub(patience=2.0) as tokens:
        given = {"push_to_hub": True, "hub_token": TOKEN}
        assert reporting.create(Settings(hub_model_id="good", **given)) == "x/good"
        for mode, words in PUSHES.items():
            start = time.monotonic()
            with pytest.raises(DreamBoothError, match=words) as caught:
                reporting.create(Settings(hub_model_id=mode, **given))
            assert time.monotonic() - start < 15
            sentence = str(caught.value)
            assert sentence.startswith(f"The Hub did not take {mode} (") and "\n" not in sentence, mode
            assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert len(tokens) >= len(PUSHES) and not any(tokens)
    assert "your token is not sent to 127.0.0.1" in capsys.readouterr().err
