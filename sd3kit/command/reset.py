"""`sd3kit reset`: a lesson as it was published, and the learner's own copy kept beside it."""

import subprocess
from pathlib import Path

from ..errors import UserError

KEPT = "mine"  # the folder of the learner's copies, beside the lessons


def reset(lesson: str, folder: Path) -> tuple[Path, Path]:
    """Put a lesson of a git checkout back; what it holds now is copied first, never overwritten.

    The published one is that of the branch's upstream, as it was last fetched, since a learner may have committed
    answers; where there is no upstream, that of the last commit.

    Args:
        lesson: how its name begins, such as "03".
        folder: where the lessons are.

    Returns:
        The lesson, and the copy: `mine`/NAME-1.ipynb, or the next number that is free.

    Raises:
        UserError: no such lesson, or no checkout to take the published one from; nothing is changed.
    """
    found = [path for path in sorted(folder.glob("*.ipynb")) if path.name.startswith(lesson)]
    if len(found) != 1:
        there = ", ".join(path.stem for path in sorted(folder.glob("[0-9]*.ipynb")))
        raise UserError(f"there is no one lesson {lesson!r} in {folder}: {there or 'it holds none; give --folder'}.")
    (path,) = found
    published = _published(path, "@{upstream}") or _published(path, "HEAD")
    if published is None:
        raise UserError(f"{folder} is not a git checkout that holds {path.name}: download it again.")
    kept = folder / KEPT
    kept.mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            with (copy := kept / f"{path.stem}-{number}.ipynb").open("xb") as file:
                file.write(path.read_bytes())
            break
        except FileExistsError:
            number += 1
    path.write_bytes(published)
    return path, copy


def _published(path: Path, revision: str) -> bytes | None:
    """A file as a revision of its checkout has it; None where there is no such thing, or no git."""
    try:
        command = ["git", "show", f"{revision}:./{path.name}"]
        return subprocess.run(command, cwd=path.parent, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
