"""`sd3kit reset`: a lesson as it was published, and the learner's own copy kept beside it."""

import subprocess
from pathlib import Path

from .generate import UserError

KEPT = "mine"  # the folder of the learner's copies, beside the lessons


def reset(lesson: str, folder: Path) -> tuple[Path, Path]:
    """Put a lesson of a git checkout back to its last commit; what it holds now is copied first, never overwritten.

    Args:
        lesson: how its name begins, such as "03".
        folder: where the lessons are.

    Returns:
        The lesson, and the copy: `mine`/NAME-1.ipynb, or the next number that is free.

    Raises:
        UserError: no such lesson, or no checkout to take the published one from; nothing is changed.
    """
    found = sorted(folder.glob(f"{lesson}*.ipynb"))
    if len(found) != 1:
        there = ", ".join(path.stem for path in sorted(folder.glob("[0-9]*.ipynb")))
        raise UserError(f"there is no one lesson {lesson!r} in {folder}: {there or 'it holds none; give --folder'}.")
    (path,) = found
    try:
        shown = subprocess.run(["git", "show", f"HEAD:./{path.name}"], cwd=folder, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{folder} is not a git checkout that holds {path.name}: download it again.") from error
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
    path.write_bytes(shown.stdout)
    return path, copy
