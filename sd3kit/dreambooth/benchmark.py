"""How fast and how large a training is: this package's command beside diffusers' own script, and a ladder of its own.

    python -m sd3kit.dreambooth.benchmark --script train_dreambooth_lora_sd3.py --out training.jsonl
    TMPDIR=/dev/shm python -m sd3kit.dreambooth.benchmark --script train_dreambooth_lora_sd3.py --out training.jsonl \\
        --model medium --weights random --resolution 1024 --precision bf16 --steps 12   # on a GPU, without a download

Two comparisons: `defaults`, each with its own (ours caches square pictures' latents), and `equal`, both with caching
and checkpointing. Then the ladder goes on, ours alone, each rung with those before it.
All train the same loss (`--precondition_outputs=0`), each in a process of its own. The script needs torchvision.
"""

import argparse
import functools
import hashlib
import itertools
import json
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..errors import UserError, answer
from ..loading import names
from ..loading.device import environment_alone
from . import subject

OURS, THEIRS = "sd3kit", "diffusers' script"
BOTH, ALONE = (OURS, THEIRS), (OURS,)
LADDER = ["--cache_latents", "--gradient_checkpointing", "--use_8bit_adam", "--base_quantization=nf4"]
# What is trained: the options on top of `arguments`, and by whom.
SETS = {
    "defaults": ([], BOTH),
    "equal": (LADDER[:2], BOTH),
    "8-bit Adam": (LADDER[:3], ALONE),
    "NF4": (LADDER, ALONE),
}


def inside(target: str, arguments: list[str], report: Path) -> None:
    """Run a module or a script in this process, and write the time of each update and the peak memory to `report`.

    The clock is a hook that torch calls after each step of any optimizer, so it needs nothing of what is measured. On a
    GPU it leaves marks in the device's queue, and waits for nothing: a training that keeps the queue full is to gain.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    marks, before, cuda = [], [], torch.cuda.is_available()

    def note(*_) -> None:
        marks.append(torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter())
        if cuda:
            marks[-1].record()
            if len(marks) == 1:  # what loading, encoding and the first update took is kept apart
                before.append(torch.cuda.max_memory_allocated())
                torch.cuda.reset_peak_memory_stats()

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
    found = {"host_peak": peak_resident(), "device_peak": None, "updates": marks}
    if cuda:
        torch.cuda.synchronize()
        later = torch.cuda.max_memory_allocated()
        found |= {"device_peak": max(later, *before), "device_peak_of_updates": later}
        found["updates"] = [marks[0].elapsed_time(mark) / 1000 for mark in marks]
    report.write_text(json.dumps(found), encoding="utf-8")


def peak_resident() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the system is not Linux.

    `getrusage` is of no use here: a new process starts with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text(encoding="ascii"))[1]) if status.exists() else None


def run(target: str, arguments: list[str]) -> dict:
    """Train once in a process of its own.

    Returns:
        `seconds`: of an update, `measure`'s median and spread, the first left out; `device_peak` (None without a
        GPU), of it all and of the updates, and `host_peak` in bytes; `loss`: of what was saved, on noise that no
        training has seen, or `failed` and why there is none.

    Raises:
        MemoryError, RuntimeError: the process's last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, out = Path(folder) / "report.json", Path(folder) / "out"
        words = ["--inside", target, "--report", str(report), "--", *arguments, f"--output_dir={out}"]
        done = subprocess.run(
            [sys.executable, "-m", __spec__.name, *words], env=environment_alone(), capture_output=True, text=True
        )
        if done.returncode or not report.exists():
            last = ([line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"])[-1]
            full = "memory is full" in last or "out of memory" in last
            raise (MemoryError if full else RuntimeError)(last)
        found = json.loads(report.read_text(encoding="utf-8"))
        times = [b - a for a, b in itertools.pairwise(found.pop("updates")[1:])]
        found["seconds"] = {"median": statistics.median(times), "low": min(times), "high": max(times), "n": len(times)}
        try:
            return found | {"loss": saved_loss(arguments, out)}
        except Exception as error:  # what was timed is kept
            return found | {"failed": f"its loss could not be measured: {type(error).__name__}: {error}"[:300]}


def saved_loss(arguments: list[str], out: Path) -> float:
    """The flow-matching loss on the pictures of the model with the LoRA that was saved, on fixed noise."""
    import torch
    from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
    from diffusers.training_utils import free_memory

    from ..loading.pipeline import load
    from . import data
    from .model import Denoiser, encode
    from .settings import parse
    from .train import sample_losses

    settings = parse(arguments)
    pipe = load(settings.pretrained_model_name_or_path, quiet=True)
    pipe.load_lora_weights(str(out), weight_name=LORA_WEIGHT_NAME_SAFE)
    pipe.vae.to(torch.float32)  # as in training
    side = settings.resolution // pipe.vae_scale_factor
    samples = data.Samples([data.instance_rows(settings)], settings, 99, (pipe.vae.config.latent_channels, side, side))
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    batch = data.collate([samples[n] for n in range(20)])
    prompt, losses = settings.instance_prompt, []
    with torch.no_grad():
        prompts = {prompt: encode(pipe, [prompt], settings.max_sequence_length, pipe.device)}
        for n in range(20):
            one = {key: values[n : n + 1] for key, values in batch.items()}
            found = sample_losses(settings, one, Denoiser(pipe.transformer), pipe.vae, scheduler, prompts)
            losses.append(found.mean().item())
    del pipe
    free_memory()  # the next training is another process on the same device
    return statistics.fmean(losses)


def arguments(options: argparse.Namespace, source: str, pictures: Path) -> list[str]:
    """What both sides are given."""
    return [
        f"--pretrained_model_name_or_path={source}",
        f"--instance_data_dir={pictures}",
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


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m sd3kit.dreambooth.benchmark", description=__doc__.split("\n")[0])
    top.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora_sd3.py of your own copy")
    top.add_argument("--model", default="nano", help="a name of sd3kit, a folder or a Hub id (%(default)s)")
    top.add_argument("--weights", choices=("trained", "random"), default="trained", help="random: no download")
    top.add_argument("--resolution", type=int, default=128, help="pixels of a side (%(default)s)")
    top.add_argument("--batch", type=int, default=1, help="pictures an update (%(default)s)")
    top.add_argument("--steps", type=int, default=40, help="updates of each training, at least 4 (%(default)s)")
    top.add_argument("--precision", choices=("no", "fp16", "bf16"), default="no", help="of both (%(default)s)")
    top.add_argument("--sets", nargs="*", choices=tuple(SETS), default=list(SETS), help="some of these, all without")
    top.add_argument(
        "--out", type=Path, default=Path("training.jsonl"), help="the records, as JSON lines (%(default)s)"
    )
    top.add_argument("--inside", help=argparse.SUPPRESS)
    top.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    top.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    return top


def main(words: list[str] | None = None) -> int:
    options = parser().parse_args(words)
    if options.inside:
        inside(options.inside, options.rest, options.report)
        return 0
    return answer(lambda: compare(options))


def compare(options: argparse.Namespace) -> int:
    """Train with each of the chosen sets, those in the file left out; 1 after an error. UserError: a wrong argument."""
    if options.steps < 4 or options.batch < 1 or options.resolution < 64:
        raise UserError("--steps must be at least 4, --batch 1 and --resolution 64.")
    if options.script and not options.script.is_file():
        raise UserError(f"there is no script {options.script}: give diffusers' train_dreambooth_lora_sd3.py.")
    from diffusers.training_utils import free_memory

    from .. import files, records
    from ..loading.pipeline import load

    files.check_writable(options.out)
    known = ("model", "weights", "resolution", "batch", "steps", "precision")
    identity = {name: getattr(options, name) for name in known}
    given = [f"--{name} {shlex.quote(str(value))}" for name, value in identity.items()]
    script = options.script and options.script.read_bytes()
    given = [*([f"--script {options.script.name}"] if script else []), *given]
    command = " ".join(["python -m sd3kit.dreambooth.benchmark", *given])
    identity |= {key: records.stamp("")[key] for key in ("device", "versions")}
    identity["script"] = hashlib.sha256(script).hexdigest()[:16] if script else None
    with tempfile.TemporaryDirectory(prefix="sd3kit-") as folder:
        pictures = Path(folder) / "pictures"
        # alone: the script opens every file there as a picture
        shutil.copytree(subject.PICTURES, pictures, ignore=shutil.ignore_patterns("*.jsonl"))
        source = names.resolve(options.model)
        if options.weights == "random":  # drawn on the device, and written where both sides can load them
            source = f"{folder}/model"
            if options.model != "nano" and shutil.disk_usage(folder).free < 20 * 2**30:
                raise UserError(f"random weights need 20 GiB in {folder}: set TMPDIR to a place with more.")
            load(options.model, weights="random", quiet=True).save_pretrained(source)
            free_memory()
        rows = {}
        for setting in options.sets:
            more, sides = SETS[setting]
            targets = {OURS: "sd3kit.dreambooth", THEIRS: options.script}
            for side in filter(targets.get, sides):
                words = str(targets[side]), [*arguments(options, source, pictures), *more]
                rows[f"{setting}, {side}"] = functools.partial(run, *words)
        found = records.study(list(rows), lambda row: rows[row](), options.out, identity, command)
    for record in found:
        print(line(record))
    return int(any("raises" in record for record in found))


def line(record: dict) -> str:
    """A record in words: settings, command, seconds an update, peak memory and loss, or why it failed."""
    title, why = f"{record['row']:<30}", [record[k] for k in ("failed", "raises", "out_of_memory") if k in record]
    if "seconds" not in record:
        return f"{title}{why[0]}"
    seconds, memory = record["seconds"]["median"], record["device_peak"] or record["host_peak"] or 0
    loss = f"loss {record['loss']:.4f}" if "loss" in record else why[0]
    return f"{title}{seconds:.3f} s an update, peak {memory / 2**20:.0f} MiB, {loss}"


if __name__ == "__main__":
    sys.exit(main())
