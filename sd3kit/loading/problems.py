"""Every way in which loading fails, in one sentence with the next step."""

import errno
from pathlib import Path


def explain(error: BaseException, name: str, source: str) -> str | None:
    """What went wrong when loading and what to do about it, in one sentence; None for an error not known here."""
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError

    chain = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    page = f"https://huggingface.co/{source}"
    local = Path(source).is_dir()
    if any(isinstance(e, OSError) and e.errno == errno.ENOSPC for e in chain):
        return (
            f"The disk is full while loading {name}: free some space (SD3 Medium needs 16 GB) or set HF_HOME to "
            "another disk."
        )
    if has(hub.GatedRepoError):
        return f"{name} is gated: accept its licence at {page}, log in once with `hf auth login`, and run this again."
    if has(hub.RepositoryNotFoundError):
        return f"The Hub has no model {source}, or it is private: check the name, or log in with `hf auth login`."
    if has(SafetensorError) or any("safetensors" in str(e).lower() and "header" in str(e).lower() for e in chain):
        where = source if local else "its folder in the Hub cache"
        return f"A weights file of {name} is damaged: delete {where} and load it again."
    unreachable = has(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if unreachable or any("connect" in type(e).__name__.lower() for e in chain):
        return (
            f"{name} is not on this machine and the Hub cannot be reached: check the network, or use nano, which "
            "needs none."
        )
    if has(OSError) and local:
        return f"The folder {source} lacks a file of its pipeline ({str(chain[0]).splitlines()[0]}): save it again."
    if has(OSError):
        return f"{name} could not be loaded from the Hub: check the name and the network ({page})."
    return None
