"""`sd3kit measure`: its arguments; what it does is in `sd3kit.measuring.bench`, which is slower to import."""

from pathlib import Path

from ..loading.names import MODELS


def add_parser(commands) -> None:
    """Add `measure` to the command line's subparsers."""
    parser = commands.add_parser("measure", help="measure memory or speed, and store the records of the lessons")
    parser.add_argument("study", choices=("memory", "speed", "bytes"))
    parser.add_argument("--model", help=f"{', '.join(MODELS)}, a folder or a Hub id (SD3KIT_MODEL, or nano)")
    parser.add_argument("--weights", choices=("trained", "random"), default="trained", help="random needs no download")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these recipes or speed-ups")
    parser.add_argument("--steps", type=int, default=20, help="of one picture (%(default)s)")
    parser.add_argument("--size", type=int, help="pixels of each side (the model's own)")
    parser.add_argument("--calls", type=int, default=10, help="timed calls (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="calls before them (%(default)s)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="(what suits the model)")
    parser.add_argument("--cap-gb", type=float, help="let the process have only so many GiB of a CUDA device")
    parser.add_argument("--out", type=Path, help="the file of records (the package's own); run again to resume")
