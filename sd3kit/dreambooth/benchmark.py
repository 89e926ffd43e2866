"""How fast and how large a training is: this package's command beside diffusers' own script, on the same pictures.

    python -m sd3kit.dreambooth.benchmark --script train_dreambooth_lora_sd3.py --out training.jsonl

Two comparisons: `defaults`, each with its own, and `equal`, the same caching and checkpointing on both sides, so that
one sees what the code is worth and what the settings are. Both train the same loss (`--precondition_outputs=0`). Each
training is a process of its own. Without `--script` only ours runs, and the record says so.
"""

import argparse
import hashlib
import itertools
import json
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..loading.device import environment_alone
from . import subject

OURS = "sd3kit.dreambooth"
SETS = {"defaults": [], "equal": ["--cache_latents", "--gradient_checkpointing"]}


def inside(target: str, arguments: list[str], report: Path) -> None:
    """Run a module or a script in this process, and write the time of each update and the peak memory to `report`.

    The clock is a hook that torch calls after each step of any optimizer, so it needs nothing of what is measured.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times, cuda = [], torch.cuda.is_available()

    def note(*_) -> None:
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    register_optimizer_step_post_hook(note)
    sys.argv = [target, *arguments]
    try:
        if target.endswith(".py"):
            sys.path.insert(0, str(Path(target).parent))
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code:
            raise
    import psutil

    memory = psutil.Process().memory_info()
    host = getattr(memory, "peak_wset", None) or _peak_resident()
    found = {"updates": times, "host_peak": host, "device_peak": torch.cuda.max_memory_allocated() if cuda else None}
    report.write_text(json.dumps(found), encoding="utf-8")


def _peak_resident() -> int:
    """The largest resident memory of this process so far, in bytes (Linux and macOS).

    Linux's `getrusage` is of no use here: a new process starts with the peak of the one that started it.
    """
    if sys.platform == "linux":
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(target: str, arguments: list[str], loss: bool = True) -> dict:
    """Train once in a process of its own.

    Returns:
        `seconds`: of an update, `measure`'s median and spread, the first left out; `device_peak` (None without a
        GPU) and `host_peak` in bytes; `loss`: of what was saved, on noise that no training has seen. Or `failed` with
        the process's last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, out = Path(folder) / "report.json", Path(folder) / "out"
        words = ["--inside", target, "--report", str(report), "--", *arguments, f"--output_dir={out}"]
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, *words], env=environment_alone(), capture_output=True, text=True
        )
        if done.returncode or not report.exists():
            said = [line for line in done.stderr.splitlines() if line.strip()]
            return {"failed": said[-1][:300] if said else f"exit code {done.returncode}"}
        found = json.loads(report.read_text(encoding="utf-8"))
        updates = found.pop("updates")
        times = [b - a for a, b in itertools.pairwise(updates[1:])]
        if not times:
            return {"failed": "fewer than three updates: nothing to time"}
        found["seconds"] = {"median": statistics.median(times), "low": min(times), "high": max(times), "n": len(times)}
        try:
            return found | ({"loss": saved_loss(arguments, out)} if loss else {})
        except Exception as error:  # what was timed is kept
            return found | {"failed": f"its loss could not be measured: {type(error).__name__}: {error}"[:300]}


def saved_loss(arguments: list[str], out: Path) -> float:
    """The flow-matching loss on the pictures of the model with the LoRA that was saved, on fixed noise."""
    import torch
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
    from diffusers.training_utils import free_memory

    from ..loading.pipeline import load
    from . import data
    from .model import encode
    from .settings import parse
    from .train import flow_matching_loss, latents, noise_levels

    settings = parse(arguments)
    pipe = load(settings.pretrained_model_name_or_path, quiet=True)
    pipe.load_lora_weights(str(out), weight_name=LORA_WEIGHT_NAME_SAFE)
    pipe.vae.to(torch.float32)  # as in training
    side = settings.resolution // pipe.vae_scale_factor
    samples = data.Samples([data.instance_rows(settings)], settings, 99, (pipe.vae.config.latent_channels, side, side))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    losses = []
    for n in range(20):
        batch = data.collate([samples[n]])
        with torch.no_grad():
            x0, noise = latents(batch, pipe.vae, pipe.device), batch["noise"].to(pipe.device)
            sigma, timesteps = (t.to(pipe.device) for t in noise_levels(batch["u"].flatten(), scheduler))
            embeds, pooled = encode(pipe, batch["caption"], settings.max_sequence_length)
            x = ((1 - sigma) * x0 + sigma * noise).to(pipe.transformer.dtype)
            velocity = pipe.transformer(x, embeds, pooled, timesteps).sample
        losses.append(flow_matching_loss(velocity, x0, noise, sigma).mean().item())
    del pipe
    free_memory()  # the next training is another process on the same device
    return statistics.fmean(losses)


def arguments(options: argparse.Namespace) -> list[str]:
    """What both sides are given."""
    from ..loading import names

    return [
        f"--pretrained_model_name_or_path={names.resolve(options.model)}",
        f"--instance_data_dir={options.pictures}",
        "--instance_prompt=a sks robot",
        f"--resolution={options.resolution}",
        f"--train_batch_size={options.batch}",
        f"--max_train_steps={options.steps}",
        f"--mixed_precision={options.precision}",
        "--learning_rate=1e-3",
        "--lr_warmup_steps=0",
        "--num_validation_images=0",
        "--precondition_outputs=0",
        "--seed=0",
    ]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sd3kit.dreambooth.benchmark", description=__doc__.split("\n")[0])
    parser.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora_sd3.py of your own copy")
    parser.add_argument("--model", default="nano", help="a name of sd3kit, a folder or a Hub id (%(default)s)")
    parser.add_argument("--pictures", type=Path, default=subject.PICTURES, help="the folder (this project's five)")
    parser.add_argument("--resolution", type=int, default=128, help="pixels of a side (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="pictures an update (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="updates of each training, at least 4 (%(default)s)")
    parser.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no", help="of both (%(default)s)")
    parser.add_argument("--out", type=Path, help="write the records here, as JSON lines")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.inside:
        inside(options.inside, options.rest, options.report)
        return 0
    if options.steps < 4:
        parser.error(f"--steps must be at least 4, not {options.steps}.")
    if options.script and not options.script.is_file():
        parser.error(f"there is no script {options.script}: give the path of diffusers' train_dreambooth_lora_sd3.py.")
    if not options.pictures.is_dir():
        parser.error(f"there is no folder {options.pictures}: give the pictures' folder.")
    from .data import picture_files

    records = []
    with tempfile.TemporaryDirectory() as pictures:
        for picture in picture_files(options.pictures):  # alone: the script opens every file there as a picture
            shutil.copy(picture, pictures)
        options.pictures = pictures
        for setting, more in SETS.items():
            for name, target in (("sd3kit", OURS), ("diffusers' script", options.script)):
                if target is None:
                    found = {"failed": "not run: --script names diffusers' script"}
                else:
                    found = run(str(target), [*arguments(options), *more])
                records.append({"row": f"{setting}, {name}", "settings": setting, "command": name} | found)
                print(line(records[-1]), flush=True)
    if options.out:
        names = ("model", "resolution", "batch", "steps", "precision")
        given = {name: getattr(options, name) for name in names}
        script = [f"--script {options.script.name}"] if options.script else []
        words = [*script, *(f"--{name} {value}" for name, value in given.items()), f"--out {options.out.name}"]
        stamp = given | {"stamp": records.stamp(" ".join(["python -m sd3kit.dreambooth.benchmark", *words]))}
        if options.script:
            stamp["script"] = hashlib.sha256(options.script.read_bytes()).hexdigest()[:16]
        options.out.write_text("".join(json.dumps(r | stamp) + "\n" for r in records), encoding="utf-8")
    return 0


def line(record: dict) -> str:
    """A record in words: settings, command, seconds an update, peak memory and loss, or why it failed."""
    title = f"{record['settings']:<10}{record['command']:<20}"
    if "failed" in record:
        return f"{title}{record['failed']}"
    seconds, memory = record["seconds"]["median"], record["device_peak"] or record["host_peak"]
    return f"{title}{seconds:.3f} s an update, peak {memory / 2**20:.0f} MiB, loss {record['loss']:.4f}"


if __name__ == "__main__":
    sys.exit(main())
