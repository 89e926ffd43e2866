"""What the tests of `sd3kit.dreambooth` share: a small training, and how its command line is started and read."""

import json
import os
from pathlib import Path

import sd3kit
from sd3kit.dreambooth import subject
from sd3kit.dreambooth.__main__ import main

PICTURES = str(subject.PICTURES)
SMALL = dict(
    pretrained_model_name_or_path="nano",
    instance_data_dir=PICTURES,
    caption_column="text",
    instance_prompt="a sks robot",
    resolution=64,
    max_sequence_length=12,
    train_batch_size=1,
    max_train_steps=2,
    seed=0,
    report_to="none",
)


def words(options: dict) -> list[str]:
    """Options as the words of a command line."""
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items() if value is not None
    ]


def run(out: Path, **options) -> int:
    return main(words(SMALL | {"output_dir": out} | options))


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


def one_sentence(capsys) -> str:
    """What was said on the error stream: one line of ours and no traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("sd3kit: ")]
    assert len(ours) == 1 and not any("Traceback" in line for line in lines), lines
    assert ours[0].endswith(".")
    return ours[0]


def environment(**more) -> dict:
    path = os.pathsep.join([str(Path(sd3kit.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | more
