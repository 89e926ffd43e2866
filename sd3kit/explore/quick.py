"""The quick-try page: text to image and image to image for a browser, served by Voila."""

import argparse
import socket
import sys
from pathlib import Path

from ..errors import UserError, answer
from .image import ImageToImage
from .text import TextToImage

PAGE = Path(__file__).with_name("page.ipynb")


def page(model: str | None = None):
    """The page as a widget, for someone with no interest in code.

    Args:
        model: as in `sd3kit.load`.

    Raises:
        LoadError: the model cannot be loaded.
    """
    from ..loading.pipeline import load

    pipe = load(model, quiet=True)
    text = TextToImage(pipe)
    title = (
        "<h1>Try Stable Diffusion 3</h1><p>Say what to draw, or choose an idea, and press Draw. The same seed and the "
        "same words give the same picture. What you type goes to the machine that serves this page, and no further.</p>"
    )
    both = text.ui.column([text.ui.HTML(title), text.box, ImageToImage(pipe, source=text).box])
    both.add_class("sd3kit-page")
    return both


def loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


def main(arguments: list[str] | None = None) -> int:
    """`python -m sd3kit.explore`: serve the page until Ctrl-C."""
    top = argparse.ArgumentParser(prog="python -m sd3kit.explore", description=__doc__)
    top.add_argument("--ip", default="127.0.0.1", help="the address to serve on (%(default)s: this machine only)")
    top.add_argument("--port", type=int, default=8866, help="(%(default)s)")
    top.add_argument("--no-browser", action="store_true", help="do not open a browser")
    options = top.parse_args(arguments)
    return answer(lambda: _serve(options), stopped="stopped.")


def _serve(options: argparse.Namespace) -> None:
    try:
        from tornado.netutil import bind_sockets
        from voila.app import Voila
    except ImportError as error:
        raise UserError("the page needs Voila: pip install 'sd3kit[lab]'.") from error
    try:
        if not 0 < options.port < 2**16:  # the system would take the remainder
            raise OSError(0, "ports go from 1 to 65535")
        for listening in bind_sockets(options.port, options.ip):
            listening.close()
    except OSError as error:
        where = f"{options.ip}, port {options.port} ({error.strerror})"
        raise UserError(f"the page cannot be served on {where}: give another --port or --ip.") from error
    host = options.ip
    if not loopback(host):
        print(
            f"Serving on {host}, without a password: whoever reaches this address can draw, and each visitor takes the "
            "memory of one seat (see TEACHING.md).",
            file=sys.stderr,
        )
        # 0.0.0.0 stands for all addresses of this machine and is none itself
        host = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
    host = f"[{host}]" if ":" in host else host
    print(f"The page is at http://{host}:{options.port}/ once it has started; Ctrl-C ends it.")
    given = [str(PAGE), f"--Voila.ip={options.ip}", f"--port={options.port}", "--show_tracebacks=False"]
    given.append("--Voila.port_retries=0")  # else Voila looks for a free port itself, which is not the one printed
    Voila.launch_instance(given + ["--no-browser"] * options.no_browser)
