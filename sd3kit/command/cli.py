"""The command line: `sd3kit generate`, and `sd3kit check`, which says what this machine can run."""

import argparse

from .. import __version__
from ..errors import answer
from . import generate


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sd3kit", description="Learn Stable Diffusion 3, on a small real SD3.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    generate.add_parser(commands)
    commands.add_parser("check", **dict.fromkeys(("help", "description"), "what this machine has and what it can run"))
    return top


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    stopped = "stopped; finished pictures of a folder are kept, and the same command goes on."
    return answer(lambda: run(options), stopped)


def run(options: argparse.Namespace) -> int | None:
    if options.command == "generate":
        return generate.run(options)
    from .machine import check

    return check()
