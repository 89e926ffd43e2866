"""The Hugging Face Hub: a model's files on this machine, or within seconds one sentence that says why not.

`load` and the DreamBooth command use the same functions: `folder` for a pipeline, `file` for one file of it, and
`explain` for what else is asked of the Hub under `guarded`.
"""

import concurrent.futures
import contextlib
import errno
import functools
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from .names import LoadError

PATIENCE = 15.0  # seconds for the first answers; what is downloaded after them shows its progress
OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class NoHub(LoadError):
    """What answers is not a Hub."""


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

    asked = dict.fromkeys(given) | {"use_safetensors": True, "variant": variant}
    download = functools.partial(StableDiffusion3Pipeline.download, source, **asked)
    return _or_copy(name, source, "model_index.json", download, options)


def file(name: str, source: str, path: str, **options: Any) -> Path:
    """One small file of a model: of a folder, or of the Hub as `folder` gives all of them.

    Raises:
        LoadError: as `folder`.
    """
    from huggingface_hub import hf_hub_download

    if os.path.isdir(source):
        return Path(source, path)
    return _or_copy(name, source, path, functools.partial(hf_hub_download, source, path), options)


def _or_copy(name: str, source: str, small: str, download: Callable[..., str], options: dict) -> Path:
    """What `download` gives, after the Hub has given the model's page and one small file of it within patience."""
    try:
        with guarded(first=True):
            within(PATIENCE, lambda: _first_answers(source, small, options))
        with guarded():
            return Path(download(**options))
    except Exception as error:
        sentence = explain(error, name, source)
        if sentence is None:
            raise
        kinds = {type(e).__name__ for e in _chain(error)}
        with contextlib.suppress(Exception):  # whatever it is, the first error is the one to tell
            there = Path(download(**options | {"local_files_only": True}))
            if "OfflineModeIsEnabled" not in kinds:  # which a person has asked for
                why = sentence.partition(": ")[0].partition(", ")[0]
                print(f"sd3kit: {why}; the copy of {name} here is used.", file=sys.stderr)
            return there
        # h11 and httpx quote a header that they refuse, and that may be the token
        raise LoadError(sentence) from (None if "LocalProtocolError" in kinds else error)


def _first_answers(source: str, small: str, options: dict) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    if not options.get("local_files_only"):
        HfApi().model_info(source, revision=options.get("revision"), token=options.get("token"), timeout=10)
    hf_hub_download(source, small, **options)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, which is left behind in its thread if it takes longer.

    Raises:
        TimeoutError: it took longer. Whatever `work` raises.
    """
    done: concurrent.futures.Future = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="sd3kit hub", daemon=True).start()  # an executor's would be waited for at exit
    return done.result(timeout=seconds)


@contextlib.contextmanager
def guarded(first: bool = False) -> Iterator[None]:
    """Watch what huggingface_hub asks meanwhile: no token goes over plain http, and no wait is longer than patience.

    The hooks are those of its HTTP client; they are taken off again. With `first`, an error of the server is not waited
    out either, and an answer that is none of a Hub is `NoHub`.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    before = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)  # nothing public tells it

    def watched():  # also what is made anew after a refused connection
        client = before()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks["request"], _keep_token],
            "response": [*hooks["response"], functools.partial(_no_long_wait, first=first)],
        }
        return client

    set_client_factory(watched)
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        if first:  # JSON, but not a Hub's
            raise NoHub from error
        raise
    finally:
        set_client_factory(before)


def _keep_token(request) -> None:
    if request.url.scheme == "http" and request.headers.pop("authorization", None):
        _say_kept(request.url.host)


@functools.cache  # said once for each host
def _say_kept(host: str) -> None:
    print(
        f"sd3kit: your token is not sent to {host}, since http:// is not encrypted: use https:// in HF_ENDPOINT if it "
        "needs one.",
        file=sys.stderr,
    )


def _no_long_wait(response, first: bool) -> None:
    wait = _wait(response)
    if (first and response.status_code >= 500) or (
        response.status_code == 429 and (first or wait is None or wait > PATIENCE)
    ):
        response.raise_for_status()


def _wait(response) -> int | None:
    """The seconds that an answer asks to wait."""
    after = response.headers.get("retry-after", "").strip()
    window = response.headers.get("ratelimit", "").replace(" ", "").rpartition(";t=")[2]
    return next((int(words) for words in (after, window) if words.isdigit()), None)


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
    ("ENOSPC", "The disk is full while loading {name}: free some space (SD3 Medium needs 16 GB) or set HF_HOME to "
        "another disk."),
    ("EACCES EPERM EROFS", "There is no permission for {path}, where the Hub's models are kept: set HF_HOME to a "
        "folder of your own, or change its permissions."),
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
    ("NoHub JSONDecodeError FileMetadataError UnicodeDecodeError DecodingError TooManyRedirects UnsupportedProtocol "
        "InvalidURL", "What answers at {place} is not a Hub: check HF_ENDPOINT, or the network's sign-in page."),
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
    from huggingface_hub import constants

    chain, place = _chain(error), constants.ENDPOINT
    response = next((r for e in chain if (r := getattr(e, "response", None)) is not None), None)
    status = 0 if response is None else response.status_code
    kinds = {base.__name__ for e in chain for base in type(e).__mro__} | {str(status)}
    kinds |= {errno.errorcode.get(getattr(e, "errno", None), "") for e in chain}
    kinds |= {"http-401"} if status == 401 and place.startswith("http://") else set()
    kinds |= {"5xx"} if status >= 500 else set()
    kinds |= {"Consistency"} if any("onsistency check" in str(e) for e in chain) else set()
    kinds |= {"SSLError"} if any("CERTIFICATE" in str(e) for e in chain) else set()
    kinds |= {"Offline"} if "OfflineModeIsEnabled" in kinds and os.environ.get("HF_HUB_OFFLINE") else set()
    told = next((sentence for names, sentence in SENTENCES if kinds & set(names.split())), None)
    if told is None:
        return None
    wait = None if response is None else _wait(response)
    sentence = told.format(
        name=name, source=source, place=place, page=f"{place}/{source}", status=status,
        hub="the Hub" if place.rstrip("/") == "https://huggingface.co" else f"the Hub at {place}",
        path=next((e.filename for e in chain if getattr(e, "filename", None)), "the cache"),
        wait="later" if wait is None else f"in {wait // 60 + 1} minutes",
        error=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}",
    )  # fmt: skip
    return sentence[0].upper() + sentence[1:] if told.startswith("{hub}") else sentence
