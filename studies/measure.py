"""The records that lessons 04 and 05 show, made again by one command, or your machine's rows beside them.

python -m studies.measure memory --model nano            every recipe of `sd3kit.measuring.recipes`
python -m studies.measure speed --model medium --weights random --size 512 1024
"""

import argparse
import logging
import math
import os
import shlex
import sys

from sd3kit.errors import UserError, answer
from sd3kit.loading.names import MODELS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m studies.measure",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=("memory", "speed"))
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder or a Hub id (SD3KIT_MODEL, or nano)")
    parser.add_argument("--weights", choices=("trained", "random"), default="trained", help="random needs no download")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="only these recipes or speed-ups; all of them must work"
    )
    parser.add_argument("--steps", type=int, default=20, help="of one picture (%(default)s)")
    parser.add_argument("--size", type=int, nargs="+", help="pixels of each side, one size or more (the model's own)")
    parser.add_argument("--calls", type=int, default=10, help="timed calls (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="calls before them (%(default)s)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="(what suits the model)")
    parser.add_argument("--cap-gb", type=float, help="let the process have only so many GiB of a CUDA device")
    parser.add_argument("--out", help="the file of records (the package's own); run again to resume")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Measure what the options ask for, and print the table.

    Returns:
        The exit code. A whole table is a trial: what cannot work on a machine is a result, and the code is 0. Rows that
        were named with --rows are asked for: where one of them fails the code is 1.

    Raises:
        UserError, LoadError: a wrong argument, a place that cannot be written, a model that cannot be loaded; before
            anything is measured.
    """
    # what the libraries note for those who develop them; read when they are imported
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error"}
    quiet |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    for name, level in quiet.items():
        os.environ.setdefault(name, level)
    import torch

    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)

    from sd3kit import records
    from sd3kit.files import check_writable
    from sd3kit.measuring.recipes import RECIPES
    from sd3kit.measuring.speedups import SPEEDUPS

    from .tables import failure, measured, table

    names = {"memory": RECIPES, "speed": SPEEDUPS}[options.study]
    chosen = list(dict.fromkeys(options.rows or names))
    for row in chosen:
        if row not in names:
            raise UserError(f"there is no row {row!r} in {options.study}: use some of {', '.join(names)}.")
    for name, least, most in (("steps", 1, 1000), ("calls", 1, 10_000), ("warmup", 0, 1000)):
        if not least <= getattr(options, name) <= most:
            raise UserError(f"--{name} must be {least} to {most}, not {getattr(options, name)}.")
    for size in options.size or ():
        if size % 16 or not 64 <= size <= 8192:
            raise UserError(f"--size must be divisible by 16, at least 64 and at most 8192, not {size}.")
    cap = options.cap_gb
    if cap is not None and (not torch.cuda.is_available() or not math.isfinite(cap) or cap <= 0):
        raise UserError("--cap-gb needs a CUDA device and a positive size: without one there is nothing to cap.")
    out = records.RESULTS / f"{options.study}.jsonl" if options.out is None else options.out
    check_writable(out)
    records.read(out)
    options.model = options.model or os.environ.get("SD3KIT_MODEL") or "nano"
    made = measured(options, chosen, out, command(options))
    print(table(made, options.study))
    failed = [r["row"] for r in made if failure(r)]
    if failed and (options.rows or len(failed) == len(made)):
        print(f"sd3kit: failed, as the table says: {', '.join(failed)}.", file=sys.stderr)
        return 1
    return 0


def command(options: argparse.Namespace) -> str:
    """The command that makes the records again."""
    given = []
    for name in ("model", "weights", "steps", "size", "calls", "warmup", "dtype", "cap_gb"):
        value = getattr(options, name)
        if value is not None:
            words = map(str, value) if isinstance(value, list) else [shlex.quote(str(value))]
            given += [f"--{name.replace('_', '-')}", *words]
    return " ".join(["python -m studies.measure", options.study, *given])


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return answer(lambda: run(options), "stopped; the same command goes on with the rows that are missing.")


if __name__ == "__main__":
    sys.exit(main())
