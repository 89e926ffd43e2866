"""The Hugging Face Hub: a model's files on this machine, or within seconds one sentence that says why not.

`load` and the DreamBooth command use the same functions: `folder` for a pipeline, `file` for one file of it, and
`explain` for what else is asked of the Hub under `guarded`.
"""

import contextlib
import contextvars
import errno
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .names import LoadError

T = TypeVar("T")
PATIENCE = 15.0  # seconds for the first answers; what is downloaded after them shows its progress
OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class RateLimited(LoadError):
    """The Hub asks to wait for longer than a person would."""


def folder(name: str, source: str, variant: str | None = None, given: set[str] = frozenset(), **options: Any) -> Path:
    """The folder of this machine that holds a pipeline of the Hub; what is missing is downloaded.

    Where the Hub fails, a copy that is on this machine is used, and the reason is said on standard error.

    Args:
        name: what the person calls it, for the sentences. source: its id, "owner/name".
        given: the parts that need no files.
        **options: those of `OPTIONS`, for huggingface_hub.

    Raises:
        LoadError: in one sentence, within `PATIENCE` seconds or while a download shows its progress.
    """
    from diffusers import StableDiffusion3Pipeline

    def download(**more: Any) -> Path:
        asked = dict.fromkeys(given) | {"use_safetensors": True, "variant": variant} | options | more
        return Path(StableDiffusion3Pipeline.download(source, **asked))

    try:
        with guarded():
            within(PATIENCE, lambda: _first_answers(source, options))
            return download()
    except Exception as error:
        sentence = explain(error, name, source)
        if sentence is None:
            raise
        if not _final(error):
            with contextlib.suppress(Exception):  # whatever it is, the first error is the one to tell
                there = download(local_files_only=True)
                print(f"sd3kit: the copy of {name} on this machine is used, for: {sentence}", file=sys.stderr)
                return there
        raise LoadError(sentence) from (None if _tells_the_token(error) else error)


def file(name: str, source: str, path: str, **options: Any) -> Path:
    """One file of a model of the Hub or of a folder, as `folder` gives all of them; small ones only."""
    from huggingface_hub import hf_hub_download

    if os.path.isdir(source):
        return Path(source, path)
    try:
        with guarded():
            return Path(within(PATIENCE, lambda: hf_hub_download(source, path, **options)))
    except Exception as error:
        sentence = explain(error, name, source)
        if sentence is None:
            raise
        raise LoadError(sentence) from (None if _tells_the_token(error) else error)


def _first_answers(source: str, options: dict) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    if not options.get("local_files_only"):
        HfApi().model_info(source, revision=options.get("revision"), token=options.get("token"), timeout=10)
    hf_hub_download(source, "model_index.json", **options)


def within(seconds: float, work: Callable[[], T]) -> T:
    """The result of `work`, which is left behind in its thread if it takes longer.

    Raises:
        TimeoutError: it took longer. Whatever `work` raises.
    """
    done: queue.Queue = queue.Queue()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            done.put((context.run(work), None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=run, name="sd3kit hub", daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} seconds") from None
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Watch what huggingface_hub asks meanwhile: no token goes over plain http, and no wait is longer than patience.

    The hooks are those of its HTTP client; they are taken off again.
    """
    from huggingface_hub import get_session

    client = get_session()
    before = {key: list(hooks) for key, hooks in client.event_hooks.items()}
    client.event_hooks = {
        "request": [*before.get("request", []), _keep_token],
        "response": [*before.get("response", []), _no_long_wait],
    }
    try:
        yield
    finally:
        client.event_hooks = before


_warned: set[str] = set()


def _keep_token(request) -> None:
    if request.url.scheme == "http" and request.headers.pop("authorization", None):
        if request.url.host not in _warned:
            print(
                f"sd3kit: your token is not sent to {request.url.host}, since http:// is not encrypted: use https:// "
                "in HF_ENDPOINT if it needs one.",
                file=sys.stderr,
            )
        _warned.add(request.url.host)


def _no_long_wait(response) -> None:
    if response.status_code != 429:
        return
    wait = response.headers.get("retry-after", "").strip()
    if not wait.isdigit():
        _, _, wait = response.headers.get("ratelimit", "").replace(" ", "").rpartition(";t=")
    if not wait.isdigit() or int(wait) > PATIENCE:
        raise RateLimited(wait)


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


def _final(error: BaseException) -> bool:
    """Whether a copy on this machine is no answer: the Hub has said no, or the question is wrong."""
    names = {type(e).__name__ for e in _chain(error)}
    return bool(names & {"RevisionNotFoundError", "HFValidationError", "LocalEntryNotFoundError", "PermissionError"})


def _tells_the_token(error: BaseException) -> bool:
    """h11 and httpx quote a header that they refuse, and that may be the token."""
    return any(type(e).__name__ == "LocalProtocolError" for e in _chain(error))


def explain(error: BaseException, name: str, source: str) -> str | None:
    """Why the Hub, the network or the cache failed and what to do, in one sentence; None for an error not known here.

    Errors are known by the names of their classes, since huggingface_hub has changed its HTTP library twice.
    """
    chain = _chain(error)
    kinds = {base.__name__ for e in chain for base in type(e).__mro__}
    status = next((r.status_code for e in chain if (r := getattr(e, "response", None)) is not None), None)
    place, custom = _endpoint()
    hub = f"The Hub at {place}" if custom else "The Hub"
    page = f"{place}/{source}"

    for e in chain:
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            return (
                f"The disk is full while loading {name}: free some space (SD3 Medium needs 16 GB) or set HF_HOME to "
                "another disk."
            )
        if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"There is no permission for {e.filename or 'the cache'}, where the Hub's models are kept: set HF_HOME "
                "to a folder of your own, or change its permissions."
            )
    for e in chain:
        if isinstance(e, RateLimited):
            wait = f"in {int(str(e)) // 60 + 1} minutes" if str(e) else "later"
            return f"{hub} has had too many questions from you (429): try again {wait}, or log in with `hf auth login`."
    if kinds & {"GatedRepoError"}:
        return f"{name} is gated: accept its licence at {page}, log in once with `hf auth login`, and run this again."
    if kinds & {"DisabledRepoError"}:
        return f"{hub} has disabled {source}: look at {page} for the reason, or use another model."
    if kinds & {"RevisionNotFoundError"}:
        return f"{source} has no such revision on the Hub: look at {page}/tree/main for its branches."
    if kinds & {"HFValidationError"}:
        return f"{source!r} is no name of a model on the Hub: give owner/name, as its page shows it."
    if kinds & {"RemoteEntryNotFoundError"}:
        return f"{source} on the Hub lacks a file of a diffusers pipeline: look at {page}/tree/main, or use another."
    if kinds & {"RepositoryNotFoundError"} or status == 404:
        return f"{hub} has no model {source}, or it is private: check the name, or log in with `hf auth login`."
    if status == 401:
        if place.startswith("http://"):
            return f"{hub} asks for a token, and none is sent over http://: use https:// in HF_ENDPOINT."
        return f"{hub} refuses the token: log in again with `hf auth login`, or unset HF_TOKEN if it is old."
    if status == 403:
        return f"{hub} does not let you have {source} (403): use a token that may, made at {place}/settings/tokens."
    if status == 429:
        return f"{hub} has had too many questions from you (429): try again later, or log in with `hf auth login`."
    if status is not None and status >= 500:
        return f"{hub} has an error of its own ({status}): try again in some minutes, or use nano, which needs no Hub."
    if kinds & {"TooManyRedirects"}:
        return f"{hub} sends every question on in a circle: check HF_ENDPOINT, or the network's sign-in page."
    if kinds & {"JSONDecodeError", "FileMetadataError", "UnicodeDecodeError", "DecodingError"}:
        return f"What answers at {place} is not a Hub: check HF_ENDPOINT, or the network's sign-in page."
    if kinds & {"UnsupportedProtocol", "InvalidURL"}:
        return f"HF_ENDPOINT is {place!r}, which is no address: use https://huggingface.co, or leave it out."
    if kinds & {"LocalProtocolError"}:
        return "The token holds characters that no token has: copy it again, or log in with `hf auth login`."
    if any(isinstance(e, OSError) and "onsistency" in str(e) for e in chain) or kinds & {
        "RemoteProtocolError", "ReadError", "WriteError", "IncompleteRead", "ChunkedEncodingError", "XetError",
    }:  # fmt: skip
        return f"The download of {name} was cut: run it again, and it goes on where it was."
    if kinds & {"OfflineModeIsEnabled"} and os.environ.get("HF_HUB_OFFLINE"):
        return (
            f"{name} is not on this machine, and HF_HUB_OFFLINE is set, so the Hub cannot be reached: unset it, or use "
            "nano, which needs none."
        )
    if kinds & {"SSLError", "SSLCertVerificationError"} or any("CERTIFICATE" in str(e) for e in chain):
        return f"The certificate of {place} is not trusted here: check the clock and the network's sign-in page."
    if kinds & {"TimeoutError", "TimeoutException", "Timeout"}:
        return f"{hub} does not answer in time: check the network, try again later, or use nano, which needs none."
    if kinds & {"ConnectionError", "NetworkError", "ProxyError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}:
        return (
            f"{name} is not on this machine and {hub[0].lower() + hub[1:]} cannot be reached: check the network, or "
            "use nano, which needs none."
        )
    if isinstance(error, OSError) or kinds & {"HTTPError", "HfHubHTTPError"}:
        words = (str(error).strip().splitlines() or [""])[0][:200]
        return f"{name} could not be fetched from the Hub ({type(error).__name__}: {words}): look at {page}."
    return None


def _endpoint() -> tuple[str, bool]:
    from huggingface_hub import constants

    return constants.ENDPOINT, constants.ENDPOINT.rstrip("/") != "https://huggingface.co"
