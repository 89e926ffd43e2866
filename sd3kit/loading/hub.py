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
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .names import LoadError

T = TypeVar("T")
PATIENCE = 15.0  # seconds for the first answers; what is downloaded after them shows its progress
OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class Refused(LoadError):
    """The Hub answers, and waiting for it is no use: it asks for a long wait, has an error of its own, or is no Hub."""

    def __init__(self, status: int = 0, wait: str = ""):
        super().__init__(f"{status} {wait}")
        self.status, self.wait = status, wait


def folder(name: str, source: str, variant: str | None = None, given: Collection[str] = (), **options: Any) -> Path:
    """The folder of this machine that holds a pipeline of the Hub; what is missing is downloaded.

    Where the Hub fails, a copy that is on this machine is used, and that is said on standard error.

    Args:
        name: what the person calls it, for the sentences. source: its id, "owner/name".
        given: the parts that need no files.
        **options: those of `OPTIONS`, for huggingface_hub.

    Raises:
        LoadError: in one sentence, within `PATIENCE` seconds or while a download shows its progress.
    """
    from diffusers import StableDiffusion3Pipeline

    asked = dict.fromkeys(given) | {"use_safetensors": True, "variant": variant} | options

    def online() -> Path:
        _first_answers(source, "model_index.json", options)
        with guarded():
            return StableDiffusion3Pipeline.download(source, **asked)

    return _or_copy(
        name, source, online, lambda: StableDiffusion3Pipeline.download(source, **asked | {"local_files_only": True})
    )


def file(name: str, source: str, path: str, **options: Any) -> Path:
    """One small file of a model: of a folder, or of the Hub as `folder` gives all of them.

    Raises:
        LoadError: as `folder`.
    """
    from huggingface_hub import hf_hub_download

    if os.path.isdir(source):
        return Path(source, path)
    return _or_copy(
        name, source,
        lambda: _first_answers(source, path, options),
        lambda: hf_hub_download(source, path, **options | {"local_files_only": True}),
    )  # fmt: skip


def _or_copy(name: str, source: str, online: Callable[[], Any], offline: Callable[[], Any]) -> Path:
    try:
        return Path(online())
    except Exception as error:
        sentence = explain(error, name, source)
        if sentence is None:
            raise
        kinds = {type(e).__name__ for e in _chain(error)}
        if not kinds & {"RevisionNotFoundError", "HFValidationError", "PermissionError"}:
            with contextlib.suppress(Exception):  # whatever it is, the first error is the one to tell
                there = Path(offline())
                if "OfflineModeIsEnabled" not in kinds:  # which a person has asked for
                    why = sentence.partition(": ")[0].partition(", ")[0]
                    print(f"sd3kit: {why}; the copy of {name} here is used.", file=sys.stderr)
                return there
        # h11 and httpx quote a header that they refuse, and that may be the token
        raise LoadError(sentence) from (None if "LocalProtocolError" in kinds else error)


def _first_answers(source: str, path: str, options: dict) -> str:
    """Ask for the model and one small file of it, within patience: what is wrong with a Hub shows here."""
    from huggingface_hub import HfApi, hf_hub_download

    def ask() -> str:
        if not options.get("local_files_only"):
            HfApi().model_info(source, revision=options.get("revision"), token=options.get("token"), timeout=10)
        return hf_hub_download(source, path, **options)

    with guarded(first=True):
        return within(PATIENCE, ask)


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
def guarded(first: bool = False) -> Iterator[None]:
    """Watch what huggingface_hub asks meanwhile: no token goes over plain http, and no wait is longer than patience.

    The hooks are those of its HTTP client; they are taken off again. With `first`, an error of the server is not waited
    out either, and an answer that is none of a Hub is `Refused`.
    """
    from huggingface_hub import get_session

    client = get_session()
    before = {key: list(hooks) for key, hooks in client.event_hooks.items()}
    client.event_hooks = {
        "request": [*before.get("request", []), _keep_token],
        "response": [*before.get("response", []), lambda response: _no_long_wait(response, first)],
    }
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        if first:  # JSON, but not a Hub's
            raise Refused() from error
        raise
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


def _no_long_wait(response, first: bool) -> None:
    if response.status_code == 429:
        wait = response.headers.get("retry-after", "").strip()
        if not wait.isdigit():
            _, _, wait = response.headers.get("ratelimit", "").replace(" ", "").rpartition(";t=")
        if first or not wait.isdigit() or int(wait) > PATIENCE:
            raise Refused(429, wait if wait.isdigit() else "")
    elif first and response.status_code >= 500:
        raise Refused(response.status_code)


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    return chain


# Why the Hub fails and what to do: the names of errors, or the status of its answer, and the sentence; the first that
# fits is told. Errors are known by their classes' names, since huggingface_hub has changed its HTTP library twice.
SENTENCES = (
    ("GatedRepoError", "{name} is gated: accept its licence at {page}, log in once with `hf auth login`, and run this "
        "again."),
    ("DisabledRepoError", "{hub} has disabled {source}: look at {page} for the reason, or use another model."),
    ("RevisionNotFoundError", "{source} has no such revision on the Hub: look at {page}/tree/main for its branches."),
    ("HFValidationError", "{source!r} is no name of a model on the Hub: give owner/name, as its page shows it."),
    ("RemoteEntryNotFoundError", "{source} on the Hub lacks a file of a diffusers pipeline: look at {page}/tree/main, "
        "or use another."),
    ("RepositoryNotFoundError 404", "{hub} has no model {source}, or it is private: check the name, or log in with "
        "`hf auth login`."),
    ("http-401", "{hub} asks for a token, and none is sent over http://: use https:// in HF_ENDPOINT."),
    ("401", "{hub} refuses the token: log in again with `hf auth login`, or unset HF_TOKEN if it is old."),
    ("403", "{hub} does not let you have {source} (403): use a token that may, made at {place}/settings/tokens."),
    ("429", "{hub} has had too many questions from you (429): try again {wait}, or log in with `hf auth login`."),
    ("5xx", "{hub} has an error of its own ({status}): try again in some minutes, or use nano, which needs no Hub."),
    ("TimeoutError TimeoutException Timeout", "{hub} does not answer in time: check the network, try again later, or "
        "use nano, which needs none."),
    ("TooManyRedirects", "{hub} sends each question on in a circle: check HF_ENDPOINT, or the network's sign-in page."),
    ("Refused JSONDecodeError FileMetadataError UnicodeDecodeError DecodingError", "What answers at {place} is not a "
        "Hub: check HF_ENDPOINT, or the network's sign-in page."),
    ("UnsupportedProtocol InvalidURL", "HF_ENDPOINT is {place!r}, which is no address: use https://huggingface.co, or "
        "leave it out."),
    ("LocalProtocolError", "The token holds characters that no token has: copy it again, or log in with "
        "`hf auth login`."),
    ("RemoteProtocolError ReadError WriteError IncompleteRead ChunkedEncodingError XetError Consistency",
        "The download of {name} was cut: run it again, and it goes on where it was."),
    ("Offline", "{name} is not on this machine, and HF_HUB_OFFLINE is set, so the Hub cannot be reached: unset it, or "
        "use nano, which needs none."),
    ("SSLError SSLCertVerificationError", "The certificate of {place} is not trusted here: check the clock and the "
        "network's sign-in page."),
    ("ConnectionError NetworkError ProxyError LocalEntryNotFoundError OfflineModeIsEnabled", "{hub} cannot be reached, "
        "and {name} is not on this machine: check the network, or use nano, which needs none."),
    ("OSError HTTPError HfHubHTTPError", "{hub} did not give {name}, and says no more than {error}: look at {page}."),
)  # fmt: skip


def explain(error: BaseException, name: str, source: str) -> str | None:
    """Why the Hub, the network or the cache failed and what to do, in one sentence; None for an unknown error."""
    chain = _chain(error)
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
    place, custom = _endpoint()
    refused = next((e for e in chain if isinstance(e, Refused)), None)
    answered = next((r.status_code for e in chain if (r := getattr(e, "response", None)) is not None), 0)
    status = refused.status if refused else answered
    kinds = {base.__name__ for e in chain for base in type(e).__mro__} | {str(status)}
    kinds |= {"http-401"} if status == 401 and place.startswith("http://") else set()
    kinds |= {"5xx"} if status >= 500 else set()
    kinds |= {"Consistency"} if any("onsistency check" in str(e) for e in chain) else set()
    kinds |= {"SSLError"} if any("CERTIFICATE" in str(e) for e in chain) else set()
    kinds |= {"Offline"} if "OfflineModeIsEnabled" in kinds and os.environ.get("HF_HUB_OFFLINE") else set()
    told = next((sentence for names, sentence in SENTENCES if kinds & set(names.split())), None)
    if told is None:
        return None
    sentence = told.format(
        name=name, source=source, place=place, page=f"{place}/{source}", status=status,
        hub=f"the Hub at {place}" if custom else "the Hub",
        wait=f"in {int(refused.wait) // 60 + 1} minutes" if refused and refused.wait else "later",
        error=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}",
    )  # fmt: skip
    return sentence[0].upper() + sentence[1:] if told.startswith("{hub}") else sentence


def _endpoint() -> tuple[str, bool]:
    from huggingface_hub import constants

    return constants.ENDPOINT, constants.ENDPOINT.rstrip("/") != "https://huggingface.co"
