"""Which weights a figure was measured with: a digest that goes into its record, so that a stale one is seen."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..loading.names import NANO, TURBO


def weights(parts: Sequence[str] = ("",), folder: Path = NANO) -> str:
    """Twelve digits that tell these parts' weights from any others; by default those of all parts.

    "vae:encoder" are those tensors of a part whose names begin so: a decoder that learns on leaves the latents alone.
    """
    from safetensors.numpy import load_file

    digest = hashlib.sha256()
    for part, _, inside in sorted(part.partition(":") for part in parts):
        for path in sorted((folder / part).rglob("*.safetensors")):
            if not inside:
                digest.update(path.read_bytes())
                continue
            for name, values in sorted(load_file(path).items()):
                digest.update(values.tobytes() if name.startswith(inside) else b"")
    return digest.hexdigest()[:12]


def of(source: str) -> str:
    """The digest of what `resolve` found, a folder's or, for nano-turbo, nano's with it; "trained" for the Hub's."""
    if source == str(TURBO):
        return weights(("", f"../{TURBO.name}"))
    return weights(folder=Path(source)) if Path(source).is_dir() else "trained"
