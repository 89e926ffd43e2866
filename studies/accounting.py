"""Peaks of the real models by recipe, accounted on the meta device: `python -m studies.accounting` stores them.

What is not accounted: the memory of the CUDA context (some 0.5 GB), and fragmentation. The same on every machine.
"""

import argparse
import sys
from pathlib import Path

from sd3kit import records
from sd3kit.errors import UserError, answer
from sd3kit.files import check_writable
from sd3kit.loading import configs
from sd3kit.measuring.account import GIB, PARTS, _part, activations, layers, weights
from sd3kit.measuring.plan import ENCODERS, Recipe
from sd3kit.measuring.recipes import RECIPES

from .bench import versions
from .tables import failure


def _largest_layer(model: str, part: str) -> int:
    return max((4 if wide else 2) * sum(t.numel() for t in own) for _, _, own, wide in layers(model, part))


def peaks(model: str = "medium", recipe: str = "default", size: int = 1024, steps: int = 20) -> dict:
    """Accounted peaks of a recipe for one guided picture in float16, in bytes.

    Returns:
        `device` (the GPU), `stage` (the part that sets its peak, or "loading"), `loading` (the GPU's peak before the
        first picture), `host` (the processor's memory, without libraries: what is loaded there first, or waits there),
        and `moved` (what goes onto the GPU for one picture).

    Raises:
        ValueError: a model or recipe that is not known.
    """
    if recipe not in RECIPES:
        raise ValueError(f"There is no recipe {recipe!r}: use one of {', '.join(RECIPES)}.")
    if model not in configs.TRANSFORMER:
        raise ValueError(f"There is no model {model!r} to account: use one of {', '.join(configs.TRANSFORMER)}.")
    plan = RECIPES[recipe]
    parts = [part for part in PARTS if part not in plan.without]
    held = {part: weights(model, part, plan.bits.get(part, 16), plan.every_linear, plan.skips) for part in parts}
    alive = {part: activations(model, part, size // (plan.tiles if part == "vae" else 1)) for part in parts}
    on_device = {part: _resident(plan, model, part, held) + alive[part] for part in parts}
    on_device["loading"] = loading = _loading(plan, model, held)
    stage = max(on_device, key=on_device.get)
    host, moved = _host(plan, model, parts), _moved(plan, held, steps)
    return {"device": on_device[stage], "stage": stage, "loading": loading, "host": host, "moved": moved}


def _resident(plan: Recipe, model: str, part: str, held: dict[str, int]) -> int:
    """Bytes of weights on the device while a part runs."""
    if plan.keeps == "all":
        return sum(held.values())
    if plan.keeps == "stage":
        encoding = part in ENCODERS
        return sum(size for name, size in held.items() if (name in ENCODERS) == encoding)
    if plan.keeps == "rest":
        rest = sum(size for name, size in held.items() if name not in ENCODERS)
        return rest + (_largest_layer(model, part) if part in ENCODERS else 0)
    if plan.keeps == "part":
        # the negative prompt is encoded after the prompt: the T5 is still there when the CLIPs run again
        return held[part] + (held.get("text_encoder_3", 0) if part in ("text_encoder", "text_encoder_2") else 0)
    if plan.keeps == "block" and part == "transformer":
        return held[part] // len(_part(model, part).transformer_blocks) * 2  # one block, and what is in no block
    return _largest_layer(model, part)


def _loading(plan: Recipe, model: str, held: dict[str, int]) -> int:
    """The most bytes on the device while a pipeline is loaded; a layer is there in 16 bits before it has fewer."""
    if plan.keeps in ("part", "block", "leaf"):
        return 0
    there, most = 0, 0
    for part in sorted(held, key=lambda part: part not in plan.bits):  # what has fewer bits is loaded first
        if plan.keeps == "rest" and part in ENCODERS:
            continue
        packed = part in plan.bits and part in plan.straight
        there = (0 if plan.keeps == "stage" and part == "transformer" else there) + held[part]
        most = max(most, there + (_largest_layer(model, part) if packed else 0))
    return most


def _host(plan: Recipe, model: str, parts: list[str]) -> int:
    """Bytes in the processor's memory: a pipeline is loaded there in full, then moved or made smaller."""
    full = {part: weights(model, part) for part in parts if part not in plan.straight}
    if plan.moves == "stream":  # from pinned memory, which torch gives out in powers of two
        full |= {part: _pinned(model, part) for part in full if plan.keeps != "rest" or part in ENCODERS}
    if plan.keeps == "stage":
        encoders = sum(size for part, size in full.items() if part in ENCODERS)
        return max(encoders, sum(full.values()) - encoders)
    return sum(full.values())


def _pinned(model: str, part: str) -> int:
    sizes = [(4 if wide else 2) * t.numel() for _, _, own, wide in layers(model, part) for t in own]
    return sum(1 << (size - 1).bit_length() for size in sizes)


def _moved(plan: Recipe, held: dict[str, int], steps: int) -> int:
    """Bytes that go onto the device for a guided picture: the prompt and the empty one are encoded one by one."""
    encoders = sum(size for part, size in held.items() if part in ENCODERS)
    rest = sum(held.values()) - encoders
    return {
        "all": 0,
        "stage": encoders + rest,
        "rest": 2 * encoders,
        "part": encoders + held["text_encoder"] + held["text_encoder_2"] + rest,  # the T5 stays for the empty prompt
        "block": 2 * encoders + steps * held["transformer"] + held["vae"],
        "leaf": 2 * encoders + steps * held["transformer"] + held["vae"],
    }[plan.keeps]


def store(models: list[str], size: int, out: str | Path) -> int:
    """Account every recipe for these models, and print the peaks; 1 where one of them failed, else 0.

    Raises:
        UserError: a model whose configuration is not known, or the file cannot be written.
    """
    if unknown := set(models) - configs.TRANSFORMER.keys():
        raise UserError(f"bytes are accounted for {', '.join(configs.TRANSFORMER)}, not for {min(unknown)!r}.")
    if size % 16 or not 64 <= size <= 8192:
        raise UserError(f"--size must be divisible by 16, at least 64 and at most 8192, not {size}.")
    check_writable(out)
    records.read(out)  # before the first model is accounted
    failed = 0
    for model in models:
        identity = {"study": "bytes", "model": model, "size": size, "dtype": "float16", "versions": versions()}
        made = records.study(
            list(RECIPES), lambda row, m=model: peaks(m, row, size), out, identity, "python -m studies.accounting"
        )
        for r in made:
            failed |= bool(said := failure(r))
            said = said or f"GPU {r['device'] / GIB:6.2f} GiB, RAM {r['host'] / GIB:6.2f} GiB"
            print(f"{model:<16}{r['row']:<32} {said}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studies.accounting", description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=list(configs.TRANSFORMER), help="(all that are known)")
    parser.add_argument("--size", type=int, default=1024, help="pixels of each side (%(default)s)")
    parser.add_argument("--out", default=records.RESULTS / "bytes.jsonl", help="(%(default)s)")
    options = parser.parse_args(arguments)
    return answer(lambda: store(options.model, options.size, options.out))


if __name__ == "__main__":
    sys.exit(main())
