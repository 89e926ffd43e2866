"""A Hub that misbehaves in thirty ways: each ends in time, with a sentence that names the cause."""

import json
import os
import re
import subprocess
import sys

import pytest
from misbehaving_hub import serving

import sd3kit
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
    "circle": "in a circle",
    "circle-elsewhere": "(in a circle|is not a Hub)",
    "slow": "(does not answer in time|is not a Hub)",
    "silent": "does not answer in time",
    "late-no-file": "lacks a file of a diffusers pipeline",
    "late-error": r"error of its own \(500\)",
    "late-rate": r"\(429\): try again in 61 minutes",
    "late-html": "is not a Hub",
    "late-cut": "was cut",
    "late-circle": "in a circle",
}
CHILD = """
import contextlib, io, json, sys, time
import sd3kit
from sd3kit.loading import hub
hub.PATIENCE = 6.0  # so that the test is short
for mode in sys.argv[1:]:
    for way in ("load", "file"):
        start, said, noise = time.monotonic(), None, io.StringIO()
        with contextlib.redirect_stderr(noise):
            try:
                if way == "load":
                    sd3kit.load(f"x/{mode}", quiet=True)
                else:
                    hub.file(f"x/{mode}", f"x/{mode}", "transformer/config.json")
            except Exception as error:
                said = [type(error).__name__, str(error)]
        row = {"mode": mode, "way": way, "seconds": time.monotonic() - start, "said": said, "noise": noise.getvalue()}
        print(json.dumps(row), flush=True)
"""
TOKEN = "hf_secretsecretsecretsecretsecretsecr"


def ask(address, folder, *modes, **more):
    """What a process says that asks a Hub for models of these names."""
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *modes], env=env | more, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    with serving(NANO) as (address, tokens):
        rows = ask(address, tmp_path_factory.mktemp("home"), "good", *MODES)
    return {(row["mode"], row["way"]): row for row in rows}, tokens


@pytest.mark.parametrize("way", ["load", "file"])
@pytest.mark.parametrize("mode", MODES)
def test_a_hub_that_misbehaves(mode, way, answers):
    row = answers[0][mode, way]
    kind, sentence = row["said"]
    assert kind == "LoadError" and "\n" not in sentence and sentence.endswith(".")
    assert re.search(MODES[mode], sentence)
    assert row["seconds"] < hub.PATIENCE  # its own is 6 seconds; a busy machine may add some


def test_a_good_hub_loads_and_no_token_goes_over_plain_http(answers):
    rows, tokens = answers
    assert rows["good", "load"]["said"] is None and rows["good", "file"]["said"] is None
    assert "your token is not sent to 127.0.0.1" in rows["good", "load"]["noise"]
    assert len(tokens) > 50 and not any(tokens)


def test_a_copy_is_used_where_the_hub_is_gone(tmp_path):
    with serving(NANO) as (address, _):
        assert [row["said"] for row in ask(address, tmp_path, "good")] == [None, None]
    load, file = ask(address, tmp_path, "good")  # nobody listens there now
    assert load["said"] is None and file["said"] is None
    assert re.search(r"the Hub could not be asked \(ConnectError\); the copy of x/good here is used", load["noise"])
    load, file = ask(address, tmp_path, "other")
    for row in (load, file):
        assert row["said"][0] == "LoadError" and "cannot be reached" in row["said"][1] and row["seconds"] < 10
    load, file = ask(address, tmp_path, "other", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in load["said"][1]


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


def test_an_address_that_is_none(tmp_path):
    for row in ask("hub.example", tmp_path, "any"):
        assert "HF_ENDPOINT is 'hub.example', which is no address" in row["said"][1]


def test_a_token_with_a_line_end_is_not_told(tmp_path):
    with serving(NANO) as (address, _):
        for row in ask(address, tmp_path, "gated", HF_TOKEN=f"{TOKEN}\nx"):
            assert row["said"][0] == "LoadError" and TOKEN not in row["said"][1]


def test_names_that_the_hub_cannot_have():
    for name in ("a b/c", "a/b--c", f"a/{'b' * 300}", "ä/ö"):
        with pytest.raises(sd3kit.LoadError, match=r"no name of a model|cannot be reached"):
            sd3kit.load(name, quiet=True)
