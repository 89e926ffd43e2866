"""Processes for tests, forked from one that has torch, diffusers and sd3kit loaded: that costs ten seconds only once.

`run("sd3kit", "generate", ...)` does what `python -m sd3kit generate ...` does, and `run("-c", code, ...)` what
`python -c` does; `launch` starts several that belong together. What is printed while a library is loaded, and what the
environment says before that, needs a true process.

They run on the CPU: the libraries ask CUDA for its devices as they are loaded, and after that a fork cannot use it.
"""

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

_server: list[subprocess.Popen] = []
LOADED = "import sd3kit.command.generate, sd3kit.dreambooth.train, sd3kit.dreambooth.__main__, sd3kit.explore"


def run(*words, env=None, timeout=300) -> subprocess.CompletedProcess:
    (done,) = launch(*words, processes=1, env=env, timeout=timeout)
    return done


def launch(*words, processes=2, env=None, timeout=300) -> list[subprocess.CompletedProcess]:
    """The processes of one launch, as torch's own launcher would start them; each with its exit code and its words."""
    words, base = [str(word) for word in words], os.environ | {"SD3KIT_DEVICE": "cpu"} | (env or {})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for rank in range(processes):
            own = shared | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            names = [os.path.join(folder, f"{name}{rank}") for name in ("out", "err")]
            jobs.append({"words": words, "env": base | {k: str(v) for k, v in own.items()}, "files": names})
        codes = _forked(jobs, timeout) if hasattr(os, "fork") else _started(jobs, timeout)
        said = [[Path(name).read_text(encoding="utf-8", errors="replace") for name in job["files"]] for job in jobs]
    return [subprocess.CompletedProcess(words, code, *own) for code, own in zip(codes, said, strict=True)]


def _started(jobs, timeout):
    """Where there is no fork, which is on Windows: true processes."""
    running = []
    for job in jobs:
        words = job["words"] if job["words"][0] == "-c" else ["-m", *job["words"]]
        out, err = (open(name, "w") for name in job["files"])
        running.append(subprocess.Popen([sys.executable, *words], env=job["env"], stdout=out, stderr=err))
    return [process.wait(timeout) for process in running]


def _forked(jobs, timeout):
    if not _server or _server[0].poll() is not None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        _server[:] = [subprocess.Popen([sys.executable, __file__], env=env, start_new_session=True, **pipes)]
        atexit.register(_server[0].stdin.close)
    server = _server[0]
    server.stdin.write((json.dumps(jobs) + "\n").encode())
    server.stdin.flush()
    if not select.select([server.stdout], [], [], timeout)[0]:
        os.killpg(server.pid, signal.SIGKILL)  # and its children
        server.wait()
        raise TimeoutError(f"{jobs[0]['words']} took more than {timeout} seconds")
    return json.loads(server.stdout.readline())


def serve():
    exec(LOADED)
    import gc

    gc.freeze()
    while line := sys.stdin.readline():
        jobs, pids = json.loads(line), []
        for job in jobs:
            pid = os.fork()
            if not pid:
                child(job)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(codes), flush=True)


def child(job):
    code = 1
    try:
        for number, name in enumerate(job["files"], 1):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.clear()
        os.environ.update(job["env"])
        sys.path[:0] = [""]
        words = job["words"]
        if words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<code>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
