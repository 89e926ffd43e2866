"""The static page: the files of this folder, nano as ONNX, and two libraries from npm at a pinned version and hash.

`python site/build.py` writes site/dist, or the folder that it is given. Any web host can serve it from any folder. What
is there already and still right is not made again.
"""

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from sd3kit.errors import UserError
from sd3kit.files import check_writable

HERE = Path(__file__).resolve().parent
DIST = HERE / "dist"
PAGE = [
    "index.html", "style.css", "app.js", "worker.js", "sampler.js", "random.js", "tokens.js", "words.js", "png.js",
    "gallery.js", "paint.js", "isolate.js",
]  # fmt: skip
# npm package, version and integrity as `npm pack --json` prints it, and the files that the page loads.
LIBRARIES = (
    (
        "onnxruntime-web@1.30.0",
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        [
            "ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm", "ort.webgpu.min.mjs",
            "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm",
        ],
    ),
    (
        "@huggingface/tokenizers@0.2.0",
        "sha512-LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        ["tokenizers.min.mjs"],
    ),
)  # fmt: skip


class BuildError(RuntimeError):
    """The page could not be built; the message says what to do."""


def fetch(folder: Path) -> None:
    """The libraries' files in `folder`, each package downloaded by `npm pack` and checked against its hash.

    Raises:
        BuildError: no npm, no network, or a file that does not match its hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package, integrity, files in LIBRARIES:
        mark = folder / f"{package.rpartition('/')[2]}.txt"
        if mark.exists() and mark.read_text() == integrity and all((folder / file).exists() for file in files):
            continue
        name, _, version = package.rpartition("@")
        path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        try:
            subprocess.run([_npm(), "pack", package], cwd=folder, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            raise BuildError(f"npm could not fetch {package}: {error.stderr.strip().splitlines()[-1]}") from None
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        if f"sha512-{digest}" != integrity:
            raise BuildError(f"{path} is not the pinned {package} (its SHA-512 differs): delete it and try again.")
        with tarfile.open(path) as archive:
            for file in files:
                (folder / file).write_bytes(archive.extractfile(f"package/dist/{file}").read())
        path.unlink()
        mark.write_text(integrity)


def _npm() -> str:
    found = shutil.which("npm")
    if found is None:
        raise BuildError("npm is needed for the page's two libraries: install Node.js.")
    return found


def _state() -> str:
    """A hash of what the export is made of: weights, the recipe's words, the models' own settings, and its code."""
    folders = (HERE.parent / "sd3kit" / name for name in ("nano", "nano-turbo", "recipe"))
    total = hashlib.sha256()
    settings = HERE.parent / "sd3kit" / "loading" / "configs.py"
    for path in [HERE / "export.py", settings, *(path for folder in folders for path in sorted(folder.rglob("*")))]:
        if path.suffix in (".py", ".json", ".safetensors", ".webp"):
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def build(folder: Path = DIST) -> Path:
    """Write the page into a folder.

    Raises:
        BuildError: as in `fetch`.
    """
    fetch(folder / "vendor")
    for name in PAGE:
        shutil.copyfile(HERE / name, folder / name)
    for name in ("LICENSE", "THIRD_PARTY_NOTICES.md"):
        shutil.copyfile(HERE.parent / name, folder / f"{Path(name).stem}.txt")
    mark, state = folder / "model" / "made.txt", _state()
    if not mark.exists() or mark.read_text() != state:
        print("Exporting nano to ONNX: about half a minute.", file=sys.stderr, flush=True)
        sys.path.insert(0, str(HERE))
        from export import export

        export(folder / "model")
        mark.write_text(state)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=DIST, help="where the page goes (%(default)s)")
    folder = parser.parse_args().folder
    try:
        check_writable(folder, folder=True)
        print(build(folder))
    except UserError as error:
        parser.error(str(error))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
