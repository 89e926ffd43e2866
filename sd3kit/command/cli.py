"""The command line: `sd3kit generate`, `check` (what this machine can run) and `reset`."""

import argparse
from pathlib import Path

from .. import __version__
from ..errors import answer
from . import generate


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sd3kit", description="Learn Stable Diffusion 3, on a small real SD3.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    generate.add_parser(commands)
    commands.add_parser("check", help="what this machine has and what it can run")
    reset = commands.add_parser("reset", help="put a lesson back as it was published, and keep your copy")
    reset.add_argument("lesson", help="how its name begins, such as 03")
    reset.add_argument("--folder", type=Path, default=Path("notebooks"), help="where the lessons are (%(default)s)")
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    stopped = "stopped; finished pictures of a folder are kept, and the same command goes on."
    return answer(lambda: run(options), stopped)


def run(options: argparse.Namespace) -> int | None:
    if options.command == "generate":
        return generate.run(options)
    if options.command == "reset":
        from .reset import reset

        lesson, copy = reset(options.lesson, options.folder)
        return print(f"{lesson} is as it was published; yours is {copy}")
    from .machine import check

    return check()
