"""Writing: whole or not at all, a place checked before the work, and one writer to a folder."""

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from sd3kit import files
from sd3kit.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def bad_places(folder):
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to("loop")
    return {
        folder / ("n" * 300): "name is too long",
        folder: "it is a folder",
        f"{folder}{os.sep}": "it is a folder",
        folder / "no" / "x.png": "folder is not there",
        folder / "file" / "x.png": "a file is where its folder should be",
        folder / "loop": "circle",
        folder / "a\0b": "null",
        "/proc/x.png": "cannot be written",
    }


def test_a_place_that_cannot_be_written_is_one_sentence_and_nothing_is_left(tmp_path):
    for place, words in bad_places(tmp_path).items():
        for write in (files.check_writable, lambda path: files.write_whole(path, b"x")):
            with pytest.raises(UserError, match=words) as caught:
                write(place)
            assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file", "loop"] and (tmp_path / "file").read_text() == "mine"


def test_a_folder_is_checked_without_being_made(tmp_path):
    (tmp_path / "file").touch()
    files.check_writable(tmp_path / "a" / "b", folder=True)
    files.check_writable(tmp_path, folder=True)
    for place, words in (
        (tmp_path / "file", "a file is where"),
        (tmp_path / "file" / "b", "a file is where"),
        (tmp_path / "a" / ("n" * 300) / "b", "too long"),
        ("", "empty"),
    ):
        with pytest.raises(UserError, match=words):
            files.check_writable(place, folder=True)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_after_an_error_the_old_file_is_whole(tmp_path, monkeypatch, number):
    file = tmp_path / "a.json"
    file.write_text("old")

    def fails(fd):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    for write in (files.check_writable, lambda path: files.write_whole(path, "new")):
        with pytest.raises(UserError, match="cannot be written"):
            write(file)
    assert file.read_text() == "old" and names(tmp_path) == ["a.json"]


def test_links_and_permissions_stay(tmp_path):
    file, link = tmp_path / "a.txt", tmp_path / "link.txt"
    file.write_text("old")
    file.chmod(0o640)
    link.symlink_to(file)
    files.write_whole(link, "né\r\n")
    assert link.is_symlink() and file.read_bytes() == "né\r\n".encode()
    assert file.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="only Unix has /dev/null")
def test_a_device_is_never_replaced_by_a_file():
    for write in (files.check_writable, lambda path: files.write_whole(path, b"x")):
        with pytest.raises(UserError, match="or a device"):
            write("/dev/null")


WRITER = """
import sys
from sd3kit import files
while True:
    for letter in "ab":
        files.write_whole(sys.argv[1], letter * 300_000)
"""


def test_kills_leave_the_file_whole(tmp_path):
    file = tmp_path / "text"
    for moment in range(4):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(file)])
        while not file.exists():
            time.sleep(0.01)
        time.sleep(0.03 * moment)
        writer.kill()
        writer.wait()
        text = file.read_text()
        assert text in ("a" * 300_000, "b" * 300_000)


HOLDER = """
import sys, time
from sd3kit import files
with files.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_told_at_once_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "new" / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline().strip() == b"held"
        start = time.monotonic()
        with pytest.raises(UserError, match="another command is writing"), files.lock(folder):
            pass
        assert time.monotonic() - start < 2
    finally:
        holder.kill()
        holder.communicate()
    with files.lock(folder):
        errors = []

        def other():
            try:
                with files.lock(folder):
                    pass
            except UserError as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(errors) == 1
    with files.lock(folder):
        pass


def test_the_processes_of_one_launch_share_a_lock(tmp_path, monkeypatch):
    with files.lock(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with files.lock(tmp_path):
            pass


def test_a_lock_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file is where"), files.lock(tmp_path / "file"):
        pass


SAYS = """
import sys
from sd3kit import errors
def work():
    for number in range(100_000):
        print(number)
sys.exit(errors.answer(work))
"""


def test_a_reader_that_goes_away_gets_no_traceback():
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", '"$0" -c "$1" | head -1', sys.executable, SAYS], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr, done.returncode) == ("0\n", "", 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_standard_output_that_is_full():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", SAYS], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.stderr, done.returncode) == ("sd3kit: The disk is full: free some space.\n", 2)
