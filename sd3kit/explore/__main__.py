"""Serve the quick-try page: `python -m sd3kit.explore`. Text to image and image to image for a browser, by Voila."""

import argparse
import ipaddress
import socket
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("page.ipynb")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m sd3kit.explore", description=__doc__)
    top.add_argument("--ip", default="127.0.0.1", help="the address to serve on (%(default)s: this machine only)")
    top.add_argument("--port", type=int, default=8866, help="(%(default)s)")
    top.add_argument("--no-browser", action="store_true", help="do not open a browser")
    return top


def loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def link(address: str, port: int) -> str:
    """Where a browser finds the page; 0.0.0.0 stands for all addresses of this machine and is none itself."""
    host = socket.gethostname() if address in ("", "0.0.0.0", "::") else address
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        from tornado.netutil import bind_sockets
        from voila.app import Voila
    except ImportError:
        print("The page needs Voila: pip install 'sd3kit[lab]'.", file=sys.stderr)
        return 2
    where = f"{options.ip}, port {options.port}"
    try:
        if not 0 < options.port < 2**16:  # the system would take the remainder
            raise OSError(0, "ports go from 1 to 65535")
        for listening in bind_sockets(options.port, options.ip):
            listening.close()
    except OSError as error:
        print(f"The page cannot be served on {where} ({error.strerror}): give another --port or --ip.", file=sys.stderr)
        return 2
    if not loopback(options.ip):
        print(
            f"Serving on {options.ip}, without a password: whoever reaches this address can draw, and each visitor "
            "takes the memory of one seat (see TEACHING.md).",
            file=sys.stderr,
        )
    given = [str(PAGE), f"--Voila.ip={options.ip}", f"--port={options.port}", "--show_tracebacks=False"]
    given.append("--Voila.port_retries=0")  # else Voila looks for a free port itself, which is not the one printed
    if options.no_browser:
        given.append("--no-browser")
    print(f"The page is at {link(options.ip, options.port)} once it has started; Ctrl-C ends it.")
    Voila.launch_instance(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
