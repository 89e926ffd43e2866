"""Bad command lines: a table of what is typed and what must come out. Each ends with one sentence and a code of 2.

To add a case, write the line as it is typed, in a folder that holds `prompts.txt`, `folder/`, `file` and `lesson/`,
and a fragment of what is said. Nothing may be written and no model loaded.
"""

import errno
import io
import os
import re
import shlex
import subprocess
import sys

import pytest

from notebooks import reset, strip
from sd3kit import files
from sd3kit.command import cli
from sd3kit.loading import pipeline
from sd3kit.recipe import __main__ as recipe
from studies import __main__ as study
from studies import accounting, bench, drawing, measure, seats, tables, teaching

LONG = "n" * 300
LINES = {
    "generate": "either a prompt",
    "generate ''": "there is no prompt",
    "generate a -o ''": "the name after -o is empty",
    "generate a -o folder": r"must end in \.png or \.jpg",
    "generate a -o folder.png/": "it is a folder",
    "generate a -o no/x.png": "folder is not there",
    "generate a -o file/x.png": "a file is where its folder should be",
    f"generate a -o {LONG}.png": "name is too long",
    f"generate a -o folder/{LONG}.jpg": "name is too long",
    "generate a -o x.gif": r"must end in \.png or \.jpg",
    "generate a -o loop.png": "circle",
    "generate a -o /proc/x.png": "cannot be written",
    "generate a --steps 0": "--steps must be 1 to 1000",
    "generate a --steps -3": "--steps must be 1 to 1000",
    "generate a --steps 1000000000000": "--steps must be 1 to 1000",
    "generate a --steps nan": "invalid int value: 'nan'",
    "generate a --steps 2.5": "invalid int value",
    "generate a --guidance nan": "--guidance must be 1 to 20, not nan",
    "generate a --guidance inf": "--guidance must be 1 to 20, not inf",
    "generate a --guidance -inf": "--guidance must be 1 to 20|expected one argument",
    "generate a --guidance 0": "--guidance must be 1 to 20",
    "generate a --guidance 1e300": "--guidance must be 1 to 20",
    "generate a --guidance x": "invalid float value",
    "generate a --seed -5": "--seed must be a whole number from 0",
    "generate a --seed 9223372036854775808": "--seed must be a whole number from 0",
    f"generate a --seed {'9' * 400}": "--seed must be a whole number from 0",
    "generate a --seed 1e3": "invalid int value",
    "generate a --size 100": "divisible by 16",
    "generate a --size 0": "at least 64",
    "generate a --size -64": "at least 64",
    "generate a --size 272": "this model draws up to 256",
    "generate a --size 1000000000000": "up to 256",
    "generate a --size 16000 --model medium": "HF_HUB_OFFLINE is set",
    "generate a --model nanoo": "did you mean nano",
    "generate a --model folder": "no model_index.json",
    "generate a --model file": "no model or folder",
    f"generate a --model {LONG}": "no model or folder",
    "generate a --count 0": "--count must be",
    "generate a --count -1": "--count must be",
    "generate a --count 100000": "--count must be",
    "generate a --count 2 -o ''": "the name after -o is empty",
    "generate a --count 2 -o x.png": "into a folder",
    "generate a --count 2 -o file": "a file is where its folder should be",
    "generate a --count 2 -o file/x": "a file is where its folder should be",
    f"generate a --count 2 -o {LONG}": "name is too long",
    "generate a --count 2 -o /proc/x": "cannot be written",
    "generate a --count 2 -o foreign": "was not written by sd3kit generate, or is damaged",
    "generate a --count 2 -o torn": "was not written by sd3kit generate, or is damaged",
    "generate a --count 2 -o other": "was drawn with steps 3, not 28",
    "generate a --prompts prompts.txt": "either a prompt",
    "generate --prompts none.txt": "could not be read",
    "generate --prompts folder": "could not be read",
    "generate --prompts file": "there is no prompt",
    "generate --prompts binary": "not UTF-8 text",
    "generate --prompts large.txt": "may have 100000 pictures",
    "generate --prompts long.txt": "a prompt may have 10000 characters",
    "generate --prompts many.txt --count 10000": "may have 100000 pictures",
    "reset": "required: lesson",
    "reset ''": "no one lesson",
    "reset 07 --folder lesson": "no one lesson '07'",
    "reset 03 --folder none": "no one lesson",
    "reset 03 --folder file": "no one lesson",
    "reset 03 --folder lesson": "not a git checkout",
    "nothing": "invalid choice",
    "": "required: command",
    "strip none -o out": "no notebooks in none",
    "strip folder -o out": "no notebooks in folder",
    "strip lesson": "required: -o",
    "strip lesson -o lesson": "holds the originals",
    "strip lesson -o lesson/.": "holds the originals",
    "strip file -o out": "is not a notebook",
    "strip lesson -o file": "a file is where its folder should be",
    f"strip lesson -o {LONG}": "name is too long",
    "strip lesson -o /proc/x": "cannot be written",
    "measure": "required: study",
    "measure nothing": "invalid choice: 'nothing'",
    "measure memory --rows": "expected at least one argument",
    "measure memory --rows magic": "no row 'magic' in memory",
    "measure speed --rows ''": "no row '' in speed",
    "measure memory --steps 0": "--steps must be 1 to 1000",
    "measure memory --steps nan": "invalid int value",
    "measure memory --steps 1000000000000": "--steps must be 1 to 1000",
    "measure memory --calls 0": "--calls must be 1 to",
    "measure memory --calls -1": "--calls must be 1 to",
    "measure memory --warmup -1": "--warmup must be 0 to",
    "measure memory --warmup 1000000": "--warmup must be 0 to",
    "measure memory --size 100": "divisible by 16",
    "measure memory --size 0": "at least 64",
    "measure memory --size -64": "at least 64",
    "measure memory --size 128 100": "divisible by 16, .*not 100",
    "measure memory --size 1000000000000": "at most 8192",
    "measure memory --size 272": "places for 256 pixels",
    "measure memory --size": "expected at least one argument",
    "measure memory --dtype float64": "invalid choice: 'float64'",
    "measure memory --weights none": "invalid choice: 'none'",
    "measure memory --weights random --model a/b": "random weights are there for",
    "measure memory --cap-gb nan": "--cap-gb needs",
    "measure memory --cap-gb -1": "--cap-gb needs",
    "measure memory --cap-gb inf": "--cap-gb needs",
    "measure memory --model nanoo": "did you mean nano",
    "measure memory --model folder": "no model_index.json",
    "measure memory --model a/b": "a/b is not on this machine",
    f"measure memory --model {LONG}": "no model or folder",
    "measure memory --out ''": "name of the place to write to is empty",
    "measure memory --out folder": "it is a folder",
    "measure memory --out no/x.jsonl": "folder is not there",
    "measure memory --out file/x.jsonl": "a file is where its folder should be",
    f"measure memory --out {LONG}": "name is too long",
    "measure memory --out /proc/x": "cannot be written",
    "measure memory --out torn.jsonl": "Line 1 of torn.jsonl is no record",
    "measure memory --out binary": "binary cannot be read|Line 1 of binary is no record",
    "measure memory --out list.jsonl": "Line 1 of list.jsonl is no record",
    "accounting --model nano": "are accounted for medium",
    "accounting --out folder": "it is a folder",
    "accounting --size 100": "--size must be divisible by 16",
    "accounting --size 1000000000": "at most 8192",
    "accounting --out torn.jsonl": "Line 1 of torn.jsonl is no record",
    "study": "required: NAME",
    "study nothing": "invalid choice: 'nothing'",
    "study ''": "invalid choice: ''",
    "study encoders --out ''": "is empty",
    "study encoders --out file": "a file is where its folder should be",
    "study encoders --out file/x": "a file is where its folder should be",
    f"study encoders --out {LONG}": "name is too long",
    "study encoders --out /proc/x": "cannot be written",
    "study encoders --out torn": "Line 1 of torn/encoders.jsonl is no record",
    "study encoders nothing": "invalid choice: 'nothing'",
    "seats --out torn.jsonl": "Line 1 of torn.jsonl is no record",
    "recipe": "required: command",
    "recipe train --work file": "a file is where its folder should be",
    "recipe train --work file/x": "a file is where its folder should be",
    f"recipe train --work {LONG}": "name is too long",
    "recipe train --work /proc/x": "cannot be written",
    "recipe train --work w --out file": "a file is where its folder should be",
    "recipe train --subjects 1": "--subjects must be 4 to",
    "recipe train --subjects 1000000000": "--subjects must be 4 to",
    "recipe train --flow-minutes nan": "--flow-minutes must be",
    "recipe train --vae-minutes inf": "--vae-minutes must be",
    "recipe train --text-minutes -1": "--text-minutes must be|expected one",
    "recipe train --work w --out o --start folder": "folder is no pipeline's folder",
    "recipe turbo --minutes 0": "--minutes must be",
    "recipe turbo --work w --out file": "a file is where its folder should be",
    "recipe evaluate --count 0": "--count must be 1 to",
    "recipe evaluate --count -5": "--count must be 1 to",
    "recipe evaluate --model medium --store": "leave --model out",
    "recipe train --work w --out o --device gpu": "--device asks for 'gpu'",
    "recipe evaluate --model nanoo --no-floors": "did you mean nano",
    "recipe sheets file": "a file is where its folder should be",
    "recipe sheets /proc/x": "cannot be written",
    "recipe sheets": "required: folder",
    "seats --learners 0": "must be 1 or more",
    "seats --learners nan": "invalid int value",
    "seats --threads 0": "must be 1 or more",
    "seats --pictures -1": "must be 1 or more",
    "seats --model nanoo": "did you mean nano",
    "seats --out folder": "it is a folder",
    "seats --out no/x.jsonl": "folder is not there",
    f"seats --out {LONG}": "name is too long",
}


def place(folder):
    (folder / "folder").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "file").touch()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "prompts.txt").write_text("a fox\n")
    (folder / "binary").write_bytes(b"\xff\xfe\x00\n")
    (folder / "large.txt").write_text("a fox\n" * 100_001)
    (folder / "long.txt").write_text("a" * 20_000)
    (folder / "torn.jsonl").write_text('{"row"\n{"row": 1}\n')
    (folder / "list.jsonl").write_text('[]\n{"row": 1}\n')
    (folder / "many.txt").write_text("a fox\n" * 11)
    (folder / "lesson").mkdir()
    (folder / "lesson" / "03_x.ipynb").write_text('{"cells": [], "metadata": {}, "nbformat": 4}')
    for name, settings in (("torn", "{"), ("other", '{"model": 0, "negative_prompt": "", "steps": 3}')):
        (folder / name).mkdir()
        (folder / name / "settings.json").write_text(settings)
    (folder / "torn" / "encoders.jsonl").write_text('{"row"\n{"row": 1}\n')
    from sd3kit.loading.names import NANO

    (folder / "other" / "settings.json").write_text(f'{{"model": "{NANO}", "negative_prompt": "", "steps": 3}}')
    (folder / "foreign").mkdir()
    (folder / "foreign" / "00001-0.png").write_bytes(b"no picture")
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder)): path.lstat().st_size if path.is_symlink() or path.is_file() else None
        for path in folder.rglob("*")
        if path.name != files.LOCK  # says nothing, and is empty
    }


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return place(tmp_path_factory.mktemp("place"))


def typed(line):
    words = shlex.split(line)
    mains = {"strip": strip.main, "seats": seats.main, "study": study.main}
    mains |= {"reset": reset.main, "accounting": accounting.main, "measure": measure.main, "recipe": recipe.main}
    main, words = (mains[words[0]], words[1:]) if words[:1] and words[0] in mains else (cli.main, words)
    try:
        return main(words)
    except SystemExit as end:  # argparse
        return end.code


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:60])
def test_a_bad_line_is_one_sentence(line, shared, monkeypatch, capsys):
    monkeypatch.chdir(shared)
    for module in (pipeline, bench, tables, drawing, teaching):
        monkeypatch.setattr(module, "load", lambda *args, **more: pytest.fail("a model was loaded"))
    before = contents(shared)
    assert typed(line) == 2
    said = capsys.readouterr().err
    last = said.strip().splitlines()[-1]
    assert re.search(LINES[line], last) and (said.startswith("usage:") or said.count("\n") == 1)
    assert len(last) < 700 and contents(shared) == before


def git(folder, *words):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_reset_on_a_disk_that_is_full_loses_nothing(number, tmp_path, monkeypatch, capsys):
    lesson = tmp_path / "03_x.ipynb"
    lesson.write_text("published" * 9999)
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "it"]):
        git(tmp_path, *words)
    lesson.write_text("answers" * 9999)
    good, writes = os.fsync, []

    def fails_from(which):
        def fsync(fd):
            writes.append(fd)
            if len(writes) > which:
                raise OSError(number, os.strerror(number))
            good(fd)

        return fsync

    for which in range(4):  # two probes, the copy, the lesson
        writes.clear()
        monkeypatch.setattr(os, "fsync", fails_from(which))
        assert reset.main(["03", "--folder", str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "cannot be written" in said and said.count("\n") == 1
        assert lesson.read_text() == "answers" * 9999
    kept = list((tmp_path / "mine").iterdir())
    assert len(kept) == 1 and kept[0].read_text() == "answers" * 9999  # written before the lesson was tried
    monkeypatch.setattr(os, "fsync", good)
    assert reset.main(["03", "--folder", str(tmp_path)]) == 0
    assert lesson.read_text() == "published" * 9999


def test_strip_on_a_disk_that_is_full(shared, tmp_path, monkeypatch, capsys):
    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert strip.main([str(shared / "lesson"), "-o", str(tmp_path / "out")]) == 2
    assert "the disk is full" in capsys.readouterr().err and not (tmp_path / "out").exists()


HOLDER = """
import sys, time
from sd3kit import files
with files.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_commands_never_draw_into_one_folder(tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline()
        assert cli.main(["generate", "a fox", "--count", "2", "-o", str(tmp_path / "out")]) == 2
        assert "another command is writing into" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.communicate()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [files.LOCK]


def test_a_prompt_of_bytes_that_are_no_text(tmp_path, capsys):
    assert cli.main(["generate", "a \udcff fox", "-o", str(tmp_path / "x.png")]) == 2
    assert "no UTF-8 text" in capsys.readouterr().err


class Gone(io.StringIO):
    def flush(self):
        raise BrokenPipeError


def test_a_reader_that_goes_away(shared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Gone())
    assert strip.main([str(shared / "lesson"), "-o", str(tmp_path / "out")]) == 141
    assert capsys.readouterr().err == ""
