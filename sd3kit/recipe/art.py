"""From open emoji art to training pictures: fetch, check, render, and compose scenes on flat backgrounds.

Only the recipe needs this module; drawing with nano does not. Rendering wants `resvg-py`, fetching wants `npm`.
"""

import base64
import hashlib
import importlib.util
import io
import json
import lzma
import os
import random
import subprocess
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm.auto import tqdm

from ..errors import UserError
from ..files import write_whole
from .scenes import COLOURS, STYLES, SUBJECTS, Scene, Subject

# npm package, version and integrity, as `npm pack --json` prints it.
SOURCES = {
    "3d": (
        "@iconify-json/fluent-emoji@1.2.7",
        "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    ),
    "flat": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "noto": (
        "@iconify-json/noto@1.2.9",
        "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
}
PACKED = "icons.json.xz"
FIRST = "ae59e5cd1c7fd4b5"  # `pins` of files that do not name theirs yet
SIDE = 160  # pixels of a rendered icon
SIZE = 128  # pixels of a picture
CELL = 16  # pixels of a letter's cell: one token of the transformer
# Two sizes, and centres that are whole cells apart: an icon gives the same tokens wherever it stands, so that an icon
# is two patterns to learn and not endlessly many.
LARGE, SMALL = 96, 56
USUAL = 0.75  # how often a single subject is large and in the middle: one layout to expect where the caption says none
# Where the things of a count stand (x, y): two side by side, three as a triangle, four as a square.
PLACES = {2: ((32, 64), (96, 64)), 3: ((64, 32), (32, 96), (96, 96)), 4: ((32, 32), (96, 32), (32, 96), (96, 96))}
# The autoencoder learns from all the art that the three sets share, without people, flags and hands.
_LEFT_OUT = set(
    """
flag skin man woman person people boy girl family men women couple hand child adult button keycap arrow letter
male female kiss baby prince princess mrs santa elf fairy vampire zombie genie mage deaf troll superhero
supervillain guard ninja pregnant breast bald beard hair medium light dark finger thumbs trade-mark
""".split()
)


class ArtError(UserError):
    """The art could not be fetched or is not what was pinned; the message says what to do."""


def pins() -> str:
    """What the rendered and the packed art depend on, in short: neither may outlive its sources."""
    return hashlib.sha256(repr((SOURCES, sorted(_LEFT_OUT), SIDE)).encode()).hexdigest()[:16]


def fetch(folder: Path) -> dict[str, Path]:
    """The three archives in `folder`, downloaded by `npm pack` where absent and checked against their hashes.

    Raises:
        ArtError: no npm, no network, or a file that does not match its hash.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for style, (package, integrity) in SOURCES.items():
        name, _, version = package.rpartition("@")
        path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            try:
                subprocess.run(["npm", "pack", package], cwd=folder, check=True, capture_output=True, text=True)
            except FileNotFoundError:
                raise ArtError(f"npm is needed to fetch {package}: install Node.js, or put {path} there.") from None
            except subprocess.CalledProcessError as error:
                raise ArtError(f"npm could not fetch {package}: {error.stderr.strip().splitlines()[-1]}") from None
        digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        if f"sha512-{digest}" != integrity:
            raise ArtError(f"{path} is not the pinned {package} (its SHA-512 differs): delete it and try again.")
        paths[style] = path
    return paths


def _icon(icons: dict, name: str) -> dict | None:
    alias = icons.get("aliases", {}).get(name)
    return icons["icons"].get(alias["parent"] if alias else name)


def _svg(icons: dict, name: str) -> str:
    icon = _icon(icons, name)
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )


def _render(svg: str) -> np.ndarray:
    import resvg_py  # an optional dependency: the extra `train`

    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(image.convert("RGBA"), ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    pixels = np.asarray(square).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255  # premultiplied, so that scaling leaves no dark or light fringe
    return pixels.round().astype(np.uint8)


def vectors(folder: Path) -> dict[str, dict]:
    """The icons that training uses, as SVG, by style: from what `pack` wrote into the folder, or from the archives."""
    if (packed := folder / PACKED).exists():
        try:
            sets = json.loads(lzma.decompress(packed.read_bytes()))
        except (lzma.LZMAError, EOFError):  # its checksums are xz's
            sets = {"pins": ""}
        if sets.pop("pins", FIRST) != pins():
            raise ArtError(f"{packed} is damaged, or of other art than the pinned: pack it again.")
        return sets
    sets = {}
    for style, path in fetch(folder).items():
        with tarfile.open(path) as archive:
            sets[style] = json.load(archive.extractfile("package/icons.json"))
    shared = [
        name
        for name in sets["3d"]["icons"]
        if not _LEFT_OUT & set(name.split("-")) and all(_icon(icons, name) for icons in sets.values())
    ]
    return {
        style: {k: icons[k] for k in ("width", "height") if k in icons}
        | {"icons": {name: _icon(icons, name) for name in shared}}
        for style, icons in sets.items()
    }


def pack(folder: Path, out: Path) -> Path:
    """Write all the art that training uses into one small file, to carry to a machine without a network."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / PACKED, lzma.compress(json.dumps(vectors(folder) | {"pins": pins()}).encode()))
    return out / PACKED


def _stored_pins(cache: Path) -> str:
    with np.load(cache) as stored:
        return str(stored["pins"]) if "pins" in stored else FIRST


class Art:
    """All the icons, rendered once: `art[icon, style]` is a (160, 160, 4) uint8 array with premultiplied alpha."""

    def __init__(self, folder: Path):
        """Load from `folder`, fetching and rendering (seconds on many cores, a minute on two) the first time."""
        cache = folder / "icons.npz"
        if not cache.exists() or _stored_pins(cache) != pins():
            if importlib.util.find_spec("resvg_py") is None:
                raise ArtError("resvg-py is needed to render the art: `pip install resvg-py` (the extra `train`).")
            sets = vectors(folder)
            keys = [(name, style) for name in sets["3d"]["icons"] for style in STYLES]
            with ProcessPoolExecutor() as pool:
                jobs = pool.map(_render, [_svg(sets[style], name) for name, style in keys], chunksize=32)
                pixels = np.stack(list(tqdm(jobs, desc="rendering the art", total=len(keys), mininterval=5)))
            whole = cache.with_suffix(".part.npz")
            np.savez(whole, pixels=pixels, keys=np.array(keys), pins=pins())
            os.replace(whole, cache)
        with np.load(cache) as stored:
            self.pixels, self.keys = stored["pixels"], [tuple(map(str, key)) for key in stored["keys"]]
        self._index = {key: i for i, key in enumerate(self.keys)}
        self.subjects = SUBJECTS
        missing = [s.icon for s in SUBJECTS if (s.icon, "3d") not in self._index]
        if missing:
            raise ArtError(f"the art lacks {', '.join(missing)}: delete {cache} and try again.")

    def __getitem__(self, key: tuple[str, str]) -> np.ndarray:
        return self.pixels[self._index[key]]

    def __len__(self) -> int:
        return len(self.keys)


def place(canvas: np.ndarray, icon: np.ndarray, size: float, x: float, y: float) -> None:
    """Composite the icon, `size` pixels wide, centred at (x, y), into a float (H, W, 3) canvas of 0..255, in place."""
    n = round(size)
    scaled = Image.frombytes("RGBa", (SIDE, SIDE), icon.tobytes()).resize((n, n), Image.Resampling.BICUBIC)
    pixels = np.frombuffer(scaled.tobytes(), np.uint8).reshape(n, n, 4).astype(np.float32)
    left, top = round(x - n / 2), round(y - n / 2)
    height, width, _ = canvas.shape
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + n, width), min(top + n, height)
    pixels = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
    region = canvas[y0:y1, x0:x1]
    region *= 1 - pixels[..., 3:] / 255
    region += pixels[..., :3]


def cells(text: str) -> dict[tuple[int, int], int]:
    """Where a sign writes: (row, column) of each letter's cell in the picture, and the letter's place in the text.

    One or two lines, each centred; the text's words after the second, and what is beyond eight letters, are not drawn.
    """
    words, found, start = text.split()[:2], {}, 0
    for i, word in enumerate(words):
        start = text.index(word, start)
        across = SIZE // CELL
        left = max(0, (across - len(word)) // 2)
        found |= {(across - 1 - len(words) + i, left + k): start + k for k in range(min(len(word), across - left))}
        start += len(word)
    return found


def sign(text: str) -> Image.Image:
    """The sign alone, an RGBA picture of 128 px: one or two lines of capitals in the cells of the token grid.

    A letter fills one cell of 16 px, so that one token of the transformer holds one letter.
    """
    scale, written = 4, cells(text)
    rows, columns = [row for row, _ in written], [column for _, column in written]
    left, right = max(min(columns) * CELL - 3, 1), min((max(columns) + 1) * CELL + 3, SIZE - 1)
    box = [v * scale for v in (left, min(rows) * CELL - 4, right, (max(rows) + 1) * CELL + 4)]
    image = Image.new("RGBA", (SIZE * scale, SIZE * scale))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle(box, 4 * scale, fill=(255, 253, 245, 255), outline=(70, 50, 40, 255), width=2 * scale)
    font = ImageFont.load_default(17 * scale)  # Aileron, CC0, which Pillow carries
    ink = (25, 25, 30, 255)
    for (row, column), i in written.items():
        centre = ((column + 0.5) * CELL * scale, (row + 0.88) * CELL * scale)
        draw.text(centre, text[i].upper(), font=font, fill=ink, anchor="ms", stroke_width=scale // 2, stroke_fill=ink)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def _paste(canvas: np.ndarray, image: Image.Image) -> None:
    pixels = np.asarray(image).astype(np.float32)
    alpha = pixels[..., 3:] / 255
    canvas *= 1 - alpha
    canvas += pixels[..., :3] * alpha


def draw(scene: Scene, art: Art, rng: random.Random) -> np.ndarray:
    """The scene as a float32 (128, 128, 3) array of 0..255; place, size and the shade of the background vary."""
    canvas = np.empty((SIZE, SIZE, 3), np.float32)
    sides = (slice(0, SIZE // 2), scene.colour), (slice(SIZE // 2, SIZE), scene.other)
    for side, colour in sides if scene.kind == "split" else ((slice(SIZE), scene.colour),):
        canvas[:, side] = np.clip(np.array(COLOURS[colour]) + [rng.uniform(-10, 10) for _ in range(3)], 0, 255)

    def put(subject: Subject, size: int, x: int, y: int) -> None:
        place(canvas, art[subject.icon, scene.style], size, x, y)

    subject = scene.subjects[0]
    if scene.kind == "single":
        size = rng.choice((LARGE, LARGE, SMALL))
        free = (SIZE - size) // 2 // CELL
        if rng.random() < USUAL:
            size, free = LARGE, 0
        put(subject, size, *(SIZE // 2 + CELL * rng.randint(-free, free) for _ in "xy"))
    elif scene.kind == "sign":
        put(subject, LARGE if len(scene.text.split()) == 1 else SMALL, 64, 48)
        _paste(canvas, sign(scene.text))
    elif scene.kind in ("pair", "split"):
        for (x, y), each in zip(PLACES[2], scene.subjects, strict=True):
            put(each, SMALL, x, y)
    else:
        for x, y in PLACES[scene.count]:
            put(subject, SMALL, x, y)
    return canvas.clip(0, 255)


def to_tensor(pictures: list[np.ndarray]) -> torch.Tensor:
    """(N, 3, H, W) in -1..1 from arrays (H, W, 3) of 0..255."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
