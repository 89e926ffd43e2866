"""What a person can mend, and how a command line says so."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable


class UserError(RuntimeError):
    """Something went wrong that a person can mend; the message is one sentence that says what to do.

    Command lines print it after the command's name and end with a non-zero exit code.
    """


def answer(command: Callable[[], int | None], stopped: str = "stopped; what was finished is kept.") -> int:
    """Run a command line's work; whatever a person, a disk or a reader does is one sentence and an exit code.

    Returns:
        What the command returns, or 0; 2 after a `UserError` or a full disk, 130 after Ctrl-C, and 141, as the shell's
        own tools, where the reader of standard output has gone (`| head -1`).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # a path is printed whatever the terminal can show
    try:
        code = command() or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it can still be answered
        return code
    except UserError as error:
        sentence, code = str(error), 2
    except KeyboardInterrupt:
        sentence, code = stopped, 130
    except BrokenPipeError:
        _nowhere()
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _nowhere()
        sentence, code = "The disk is full: free some space.", 2
    print(f"sd3kit: {sentence}", file=sys.stderr)
    return code


def _nowhere() -> None:
    """Let what is still buffered for standard output go, so that the interpreter's own last flush is no error."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
