"""The loss of diffusers' script beside ours, for the same inputs: `python -m sd3kit.dreambooth.parity SCRIPT`.

The script runs as it is, on nano, for a few updates. What it hands to the transformer and to the backward pass is
looked at on the way: from the same latents, noise and predictions `flow_matching_loss` must give the same number.
"""

import argparse
import hashlib
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel

from .. import records
from ..errors import UserError, answer
from ..loading.names import NANO
from . import subject
from .train import flow_matching_loss


def watched(script: Path, words: list[str], precondition: bool) -> list[dict]:
    """Run a script and return what each of its updates said: `theirs`, `ours`, and how far its noisy latents are from
    (1 - sigma) x0 + sigma noise at most.

    Raises:
        UserError: the script ended before an update, or never drew noise as it should.
    """
    seen, found = {}, []
    randn_like, forward, backward = torch.randn_like, SD3Transformer2DModel.forward, Accelerator.backward

    def drawn(x, **more):
        seen["x0"], seen["noise"] = x, randn_like(x, **more)
        return seen["noise"]

    def predicted(self, *args, **more):
        seen["said"] = forward(self, *args, **more)
        seen["x"], seen["t"] = more["hidden_states"], more["timestep"]
        return seen["said"]

    def lost(self, loss, **more):
        with torch.no_grad():
            x0, noise, sigma = seen["x0"], seen["noise"], (seen["t"] / 1000).view(-1, 1, 1, 1)
            ours = flow_matching_loss(seen["said"][0], x0, noise, sigma, precondition=precondition).mean()
            off = (seen["x"] - (1 - sigma) * x0 - sigma * noise).abs().max()
        found.append({"theirs": loss.item(), "ours": ours.item(), "noisy latents off by": off.item()})
        return backward(self, loss, **more)

    before = sys.argv
    try:
        torch.randn_like, SD3Transformer2DModel.forward, Accelerator.backward = drawn, predicted, lost
        sys.argv = [str(script), *words]
        runpy.run_path(str(script), run_name="__main__")
    except (SystemExit, KeyError, ImportError) as error:
        raise UserError(f"{script.name} did not run as diffusers' script does ({error}).") from error
    finally:
        torch.randn_like, SD3Transformer2DModel.forward, Accelerator.backward = randn_like, forward, backward
        sys.argv = before
    if not found:
        raise UserError(f"{script.name} made no update, so there is no loss to compare.")
    return found


def compare(script: Path, out: Path, updates: int = 3) -> int:
    """Both of the script's losses, with `--precondition_outputs` 0 and 1, as rows of a file; 1 where one differs."""
    if not script.is_file():
        raise UserError(f"there is no script {script}: give diffusers' train_dreambooth_lora_sd3.py.")
    differs = 0
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"  # alone: the script opens every file there as a picture
        shutil.copytree(subject.PICTURES, pictures, ignore=shutil.ignore_patterns("*.jsonl"))
        options = dict(
            pretrained_model_name_or_path=NANO, instance_data_dir=pictures, instance_prompt="a sks robot", seed=0,
            resolution=128, train_batch_size=2, max_train_steps=updates, checkpointing_steps=10_000,
        )  # fmt: skip

        def measure(row: str) -> dict:
            more = {"precondition_outputs": int(row[-1]), "output_dir": f"{folder}/{row[-1]}"}
            words = [f"--{name}={value}" for name, value in (options | more).items()]
            return {"updates": watched(script, words, bool(more["precondition_outputs"]))}

        rows = [f"same inputs, precondition_outputs={n}" for n in (0, 1)]
        same = {"model": "nano", "script": hashlib.sha256(script.read_bytes()).hexdigest()[:16]}
        command = f"python -m sd3kit.dreambooth.parity {script.name}"
        for record in records.study(rows, measure, out, same, command, tries=False):
            pairs = [(pair["theirs"], pair["ours"]) for pair in record["updates"]]
            differs += any(abs(a - b) > 1e-4 * abs(a) for a, b in pairs)
            print(f"{record['row']}: the script's loss and ours", *(f"{a:.6f} {b:.6f}" for a, b in pairs), sep="; ")
    return int(differs > 0)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sd3kit.dreambooth.parity", description=__doc__.split(":")[0])
    parser.add_argument("script", type=Path, help="diffusers' train_dreambooth_lora_sd3.py of your own copy")
    parser.add_argument("--out", type=Path, default=Path("parity.jsonl"), help="the records (%(default)s)")
    options = parser.parse_args(words)
    return answer(lambda: compare(options.script, options.out))


if __name__ == "__main__":
    sys.exit(main())
