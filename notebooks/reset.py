"""`python notebooks/reset.py 03`: a lesson as it was published, and the learner's own copy kept beside it.

It works in a git checkout alone, and so is no part of the package.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

from sd3kit import files
from sd3kit.errors import UserError, answer

KEPT = "mine"  # the folder of the learner's copies, beside the lessons: those that `make lab` opens, and kept ones


def reset(lesson: str, folder: Path) -> tuple[Path, Path]:
    """Put a lesson of a git checkout back; what it holds now is copied first, never overwritten.

    Where there is a working copy in `mine`, which `make lab` opens, it is that which is put back, without outputs.
    The published one is that of the branch's upstream, as it was last fetched, since a learner may have committed
    answers; where there is no upstream, that of the last commit.

    Args:
        lesson: how its name begins, such as "03".
        folder: where the lessons are.

    Returns:
        The lesson, and the copy: `mine`/NAME-1.ipynb, or the next number that is free.

    Raises:
        UserError: no such lesson, no checkout to take the published one from, or no place to write; nothing is lost.
    """
    found = [path for path in sorted(folder.glob("*.ipynb")) if path.name.startswith(lesson)]
    if len(found) != 1:
        there = ", ".join(path.stem for path in sorted(folder.glob("[0-9]*.ipynb")))
        raise UserError(f"there is no one lesson {lesson!r} in {folder}: {there or 'it holds none; give --folder'}.")
    (path,) = found
    published = _published(path, "@{upstream}") or _published(path, "HEAD")
    if published is None:
        raise UserError(f"{folder} is not a git checkout that holds {path.name}: download it again.")
    if (working := folder / KEPT / path.name).exists():
        path, published = working, _without_outputs(published)
    try:
        own = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}), so no copy of it could be kept.") from error
    files.check_writable(path)
    files.check_writable(folder / KEPT, folder=True)
    (folder / KEPT).mkdir(exist_ok=True)
    copies = (folder / KEPT / f"{path.stem}-{number}.ipynb" for number in itertools.count(1))
    copy = next(place for place in copies if not os.path.lexists(place))
    files.write_whole(copy, own)
    if copy.read_bytes() != own:  # the lesson is touched only when the copy is there
        raise UserError(f"the copy {copy} is not what was written: look at the disk; the lesson is as it was.")
    files.write_whole(path, published)
    return path, copy


def _published(path: Path, revision: str) -> bytes | None:
    """A file as a revision of its checkout has it; None where there is no such thing, or no git."""
    try:
        command = ["git", "show", f"{revision}:./{path.name}"]
        return subprocess.run(command, cwd=path.parent, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def _without_outputs(notebook: bytes) -> bytes:
    """A lesson as `make lab` gives it to a learner, who guesses before seeing."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python notebooks/reset.py", description=__doc__.splitlines()[0])
    parser.add_argument("lesson", help="how its name begins, such as 03")
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).parent, help="where the lessons are (%(default)s)"
    )
    options = parser.parse_args(arguments)

    def work() -> None:
        lesson, copy = reset(options.lesson, options.folder)
        print(f"{lesson} is as it was published; yours is {copy}")

    return answer(work)


if __name__ == "__main__":
    sys.exit(main())
