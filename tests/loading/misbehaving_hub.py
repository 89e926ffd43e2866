"""A small Hub on this machine that misbehaves: the name of the model that is asked for says how."""

import contextlib
import hashlib
import http.server
import json
import socket
import struct
import threading
import time
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: Path  # the pipeline that is served where all is well
    tokens: list  # what came as Authorization

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        """A repository is asked for; its name says how the Hub misbehaves."""
        self.tokens.append(self.headers.get("authorization"))
        mode = json.loads(self.rfile.read(int(self.headers["content-length"])))["name"]
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if mode == "good":
                found = {"url": f"http://{self.headers['host']}/x/good", "name": "x/good"}
                self.answer(body=json.dumps(found).encode(), Content_Type="application/json")
            else:
                getattr(self, mode.replace("-", "_"))()

    def do_GET(self):
        self.tokens.append(self.headers.get("authorization"))
        path = self.path.partition("?")[0].strip("/").split("/")
        asks_api = path[:2] == ["api", "models"]
        mode, rest = (path[3], path[4:]) if asks_api else (path[1], path[2:])
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            late = mode.startswith("late-")  # the model's page is well, its files are not
            if (late and asks_api) or mode == "good":
                self.well(asks_api, rest)
            else:
                getattr(self, mode.removeprefix("late-").replace("-", "_"))()

    def answer(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def well(self, asks_api, rest):
        names = sorted(str(f.relative_to(self.files)) for f in self.files.rglob("*.*") if f.is_file())
        if asks_api and rest[:1] == ["tree"]:
            rows = [{"type": "file", "path": n, "size": (self.files / n).stat().st_size, "oid": "0"} for n in names]
            self.answer(body=json.dumps(rows).encode(), Content_Type="application/json")
        elif asks_api:
            found = {"id": "x/good", "sha": COMMIT, "siblings": [{"rfilename": n} for n in names], "private": False}
            self.answer(body=json.dumps(found).encode(), Content_Type="application/json")
        else:
            file = self.files.joinpath(*rest[2:])
            if not file.is_file():
                return self.no_file()
            body = file.read_bytes()
            etag = hashlib.sha1(body).hexdigest()
            self.answer(body=body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")

    # how it misbehaves

    def not_found(self):
        self.answer(404, X_Error_Code="RepoNotFound")

    def gated(self):
        self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model x is restricted")

    def disabled(self):
        self.answer(403, X_Error_Message="Access to this resource is disabled.")

    def no_revision(self):
        self.answer(404, X_Error_Code="RevisionNotFound")

    def no_file(self):
        self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)

    def refused_token(self):
        self.answer(401, X_Error_Message="Invalid credentials in Authorization header")

    def forbidden(self):
        self.answer(403, b"no")

    def rate(self):
        self.answer(429, Retry_After=3600)

    def rate_window(self):
        self.answer(429, RateLimit='"api";r=0;t=250')

    def rate_again_and_again(self):
        self.answer(429, Retry_After=1)

    def rate_without_word(self):
        self.answer(429)

    def error(self):
        self.answer(500, b"oops")

    def unavailable(self):
        self.answer(503)

    def html(self):
        self.answer(200, b"<html><body>Sign in to the network</body></html>", Content_Type="text/html")

    def no_json(self):
        self.answer(200, b"\xff\xfe{", Content_Type="application/json")

    def a_list(self):
        self.answer(200, b"[]", Content_Type="application/json")

    def an_empty_object(self):
        self.answer(200, b"{}", Content_Type="application/json")

    def cut(self):
        self.answer(200, b'{"id": "x', Content_Length=5000, ETag='"1"', X_Repo_Commit=COMMIT)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
        self.rfile = self.wfile = open("/dev/null", "r+b")

    def no_http(self):
        self.connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def circle(self):
        self.answer(307, Location=self.path)

    def circle_elsewhere(self):
        other = "localhost" if "127.0.0.1" in self.headers["host"] else "127.0.0.1"
        self.answer(302, Location=f"http://{other}:{self.server.server_port}{self.path}")

    def slow(self):
        self.send_response(200)
        self.send_header("Content-Length", "5000")
        self.end_headers()
        for _ in range(60):
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(1)

    def bye(self):
        """From here on nobody listens, also not for the moment that the waiting for questions still lasts."""
        self.server.shutdown()
        self.server.socket.close()
        self.answer(404, X_Error_Code="RepoNotFound", Connection="close")

    def silent(self):
        time.sleep(60)


@contextlib.contextmanager
def serving(files: Path):
    """The address of such a Hub, and the list of the tokens that it was sent."""
    own = type("Own", (Handler,), {"files": files, "tokens": []})

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request, client_address):
            pass  # a client that goes away is what is tested

    server = Server(("127.0.0.1", 0), own)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", own.tokens
    finally:
        server.shutdown()
        server.server_close()
