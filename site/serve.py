"""Build the page and serve it on this machine: `python site/serve.py`. Press Ctrl+C to end."""

import argparse
import sys
import threading
import webbrowser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from build import DIST, BuildError, build


class Handler(SimpleHTTPRequestHandler):
    """Files, with the headers that let a page share memory between threads."""

    # what Windows' registry says of these is sometimes wrong
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"
    }  # fmt: skip

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")  # a browser asks whether a file changed, and keeps it if not
        super().end_headers()

    def log_message(self, *_):
        pass


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server for this machine alone; port 0 is a free one."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="(a free one)")
    parser.add_argument("--no-browser", action="store_true", help="do not open a browser")
    options = parser.parse_args()
    try:
        build()
    except BuildError as error:
        sys.exit(str(error))
    with server(DIST, options.port) as running:
        address = f"http://127.0.0.1:{running.server_port}/"
        print(f"nano is at {address} until you press Ctrl+C.", flush=True)
        if not options.no_browser:
            threading.Timer(0.3, webbrowser.open, [address]).start()
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
