"""`fit`: which recipe for a machine, by what was measured and, where nothing was, by the accounting."""

import dataclasses
import math

from .. import records as stored
from ..loading import configs
from .account import GIB
from .recipes import RECIPES

LIBRARIES = 2.0  # GiB of RAM that Python, torch and CUDA take beside the model: 2.04 measured (H200, `default`)
ACCURACY = 1.02  # the accounting is within 2% of every measured peak, see its tests


@dataclasses.dataclass(frozen=True)
class Fit:
    """What `fit` advises.

    Attributes:
        recipe: its name in `sd3kit.measuring.recipes`.
        gives_up: what it costs against the default, in words: the picture, then time.
        seconds: of a picture with a new prompt; None where no time was measured.
        gpu_gb, ram_gb: the peaks in GiB.
        source: where the figures come from.
        quicker: what is quicker and spoils the picture more, in words; or "".
    """

    recipe: str
    gives_up: str
    seconds: float | None
    gpu_gb: float
    ram_gb: float
    source: str
    quicker: str = ""

    def __str__(self) -> str:
        time = "time not measured yet" if self.seconds is None else f"{self.seconds:.3g} s a picture"
        text = f"{self.recipe}: {self.gives_up}; {time}, {self.gpu_gb:.1f} GiB on the GPU, {self.ram_gb:.1f} of RAM"
        return f"{text} ({self.source})." + (f" Quicker: {self.quicker}." if self.quicker else "")


def fit(gpu_gb: float, ram_gb: float, model: str = "medium", records: list[dict] | None = None) -> Fit:
    """The recipe for a machine, for pictures of 1024 x 1024 with guidance and a new prompt each.

    The picture comes first: what keeps it, then what stores weights in fewer bits, and last what leaves the T5 out.
    Among equals time decides: measured times before none, and without one what waits least for bytes that move.

    Args:
        gpu_gb: GiB of free GPU memory, as torch.cuda.mem_get_info says; a "16 GB" T4 has 15 at most.
        ram_gb: GiB of the processor's memory that is free, for the model and the libraries.
        model: "medium", or another of `sd3kit.loading.configs.TRANSFORMER`.
        records: those of `python -m studies.measure memory` on your machine; None is what the package stores. Where a
            recipe was not measured, its peaks are accounted.

    Raises:
        ValueError: sizes that are no positive numbers, or nothing fits; one sentence.
    """
    for name, value in (("gpu_gb", gpu_gb), ("ram_gb", ram_gb)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be a positive number of GiB, not {value!r}.")
    accounted = {r["row"]: r for r in stored.read(stored.RESULTS / "bytes.jsonl") if r["model"] == model}
    if not accounted:
        raise ValueError(f"No bytes are stored for {model!r}: use one of {', '.join(configs.TRANSFORMER)}.")
    measured = _measured(model, records)
    fits, usual = {}, measured.get("default", {}).get("median")
    for name, row in accounted.items():
        known = measured.get(name, {})
        if "raises" in known or "out_of_memory" in known:
            continue
        gpu = known.get("device_peak", ACCURACY * row["device"]) / GIB
        ram = max(row["host"] / GIB + LIBRARIES, known.get("host_peak", 0) / GIB)
        if gpu <= gpu_gb and ram <= ram_gb:
            seconds = known["median"] + known.get("encoding", 0.0) if known else None
            source = f"measured on {known['machine']}" if known else "accounted"
            times = f", {seconds / usual:.1f} times the default's time" if known and usual and name != "default" else ""
            fits[name] = Fit(name, _gives_up(name, row) + times, seconds, gpu, ram, source)
    if not fits:
        least, ram = (min(row[key] for row in accounted.values()) / GIB for key in ("device", "host"))
        raise ValueError(
            f"No recipe fits SD3 {model} into {gpu_gb:g} GiB of GPU memory and {ram_gb:g} of RAM (the least are "
            f"{least:.1f} and {ram + LIBRARIES:.1f}, not together): use nano, or a larger machine such as a Colab T4."
        )

    def work(found: Fit) -> tuple:
        """What is known of a recipe's time without measuring it."""
        plan = RECIPES[found.recipe]
        return ("", "stream", "copy", "load").index(plan.moves), accounted[found.recipe]["moved"]

    def time(found: Fit) -> tuple:
        return found.seconds is None, found.seconds or 0.0, work(found), RECIPES[found.recipe].tiles, found.gpu_gb

    def quicker(found: Fit) -> bool:
        if found.seconds is not None and best.seconds is not None:
            return found.seconds < best.seconds
        return work(found) < work(best)

    best = min(fits.values(), key=lambda found: (_spoilt(found.recipe), *time(found)))
    others = [found for found in fits.values() if _spoilt(found.recipe) > _spoilt(best.recipe) and quicker(found)]
    if not others:
        return best
    other = min(others, key=lambda found: (found.seconds is None, _spoilt(found.recipe), *time(found)))
    return dataclasses.replace(best, quicker=f"{other.recipe}, {other.gives_up}")


def _spoilt(name: str) -> float:
    """How far a recipe is from the default: the bits that weights lose, or the T5.

    What keeps the picture and waits for each layer in each step takes minutes: it comes right before those without T5.
    """
    plan = RECIPES[name]
    if plan.without or (plan.keeps in ("leaf", "block") and plan.moves != "stream"):
        return 16.0 if plan.without else 15.0
    return 16.0 - min(plan.bits.values(), default=16)


def _gives_up(name: str, row: dict) -> str:
    plan = RECIPES[name]
    picture = plan.loses or ("the same picture" + (", but for traces of the decoder's tiles" if plan.tiles > 1 else ""))
    waits = {"": "", "stream": "", "copy": ", and waits for them", "load": " from the disk"}[plan.moves]
    return picture + (f"; moves {row['moved'] / GIB:.0f} GiB to the GPU for a picture{waits}" if row["moved"] else "")


def _measured(model: str, records: list[dict] | None) -> dict[str, dict]:
    """What was measured by recipe; one machine only, since times of two machines do not compare."""
    found = stored.read(stored.RESULTS / "memory.jsonl") if records is None else records
    found = [r for r in found if r.get("model") == model and r.get("size") == 1024 and r.get("device") == "cuda"]
    found = [r for r in found if not r.get("cap_gb")]
    return {r["row"]: r for r in found if r["machine"] == found[-1]["machine"]}
