"""Writing that leaves nothing torn: whole files, places that are checked before the work, and folders with a lock."""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import UserError

LOCK = ".sd3kit.lock"  # lies in a folder that is written into; the lock is the system's, the file alone means nothing
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EROFS: "the disk is read-only; give another place",
    errno.EACCES: "there is no permission; give another place, or change the folder's permissions",
    errno.ENAMETOOLONG: "its name is too long; give a shorter one",
    errno.ENOENT: "the folder is not there; make it first, or give another place",
    errno.ENOTDIR: "a file is where its folder should be; give another place",
    errno.EEXIST: "a file is where its folder should be; give another place",
    errno.EISDIR: "it is a folder or a device; give the name of a file",
    errno.ELOOP: "its links lead in a circle; give another place",
}


def unwritable(path: str | os.PathLike, error: Exception) -> UserError:
    """The sentence for a place that could not be written: which, why, and what to do."""
    name = os.fspath(path)
    name = name if len(name) <= 160 else f"{name[:100]}...{name[-40:]}"
    reason = _REASONS.get(getattr(error, "errno", 0)) or getattr(error, "strerror", None) or str(error)
    return UserError(f"{name!r} cannot be written: {reason}.")


def write_whole(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a file that is there whole or, after an error or a kill, as it was before.

    It is written beside its place, brought to the disk and moved over the old one, whose permissions it takes; a link
    is followed. Text is written in UTF-8, its line ends as they are.

    Raises:
        UserError: it cannot be written, and why, in one sentence.
    """
    data = data.encode("utf-8", errors="surrogateescape") if isinstance(data, str) else data
    part = None
    try:
        place = _place(path)
        part = place.with_name(f".sd3kit-{os.getpid()}-{secrets.token_hex(4)}.part")
        with open(part, "xb") as file:
            _to_disk(file, data)
        if place.exists():
            shutil.copymode(place, part)
        os.replace(part, place)
    except (OSError, ValueError) as error:  # a ValueError: a name with a zero byte
        raise unwritable(path, error) from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike, *, folder: bool = False) -> None:
    """Say before the work begins that its result could not be written; nothing is left behind.

    A few bytes are written beside the place and removed, since permissions alone do not tell of a full disk.

    Args:
        path: a file, whose folder must be there; or with `folder` a folder, which is there or can be made.

    Raises:
        UserError: the same sentences as `write_whole`; also for an empty path.
    """
    if not os.fspath(path):
        raise UserError("the name of the place to write to is empty: give one.")
    try:
        place = Path(os.path.realpath(path)) if folder else _place(path).parent
        names = []
        while not os.path.lexists(place):
            names.append(place.name)
            place = place.parent
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(place / name)  # tells of a name that is too long
        with tempfile.TemporaryFile(dir=place, prefix=".sd3kit-") as file:
            _to_disk(file, bytes(4096))
    except (OSError, ValueError) as error:
        raise unwritable(path, error) from error


@contextlib.contextmanager
def lock(folder: str | os.PathLike) -> Iterator[None]:
    """Make a folder where it is not there, and hold it: a second command that writes into it is told so at once.

    The lock is the operating system's and ends with the process, however that ends. The processes of one
    `accelerate launch` count as one: the first holds it, so let the others wait for it (`wait_for_everyone`) before
    they write.

    Raises:
        UserError: another command holds the folder, or it cannot be written.
    """
    if os.environ.get("RANK", "0") != "0":  # set by the launcher, for each process its own
        yield
        return
    from filelock import FileLock, Timeout

    check_writable(folder, folder=True)
    held = FileLock(os.path.join(folder, LOCK), timeout=0)
    try:
        os.makedirs(folder, exist_ok=True)
        held.acquire()
    except Timeout:
        where = os.fspath(folder)
        raise UserError(
            f"another command is writing into {where!r}: wait until it has ended, or give another folder."
        ) from None
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        held.release()


def _place(path: str | os.PathLike) -> Path:
    """Where a file really goes, links followed; an error of the system's where no file can be."""
    place = Path(os.path.realpath(path))
    if (place.exists() and not place.is_file()) or os.fspath(path).endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    with contextlib.suppress(FileNotFoundError):
        os.lstat(place)  # tells of a name that is too long, and of a file among the folders
    if place.is_symlink():  # still a link: they lead in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return place


def _to_disk(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
