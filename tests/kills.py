"""What writes, with faked work, killed at ten random moments: `python kills.py THING FOLDER` (run by test_kills.py).

A thing is two functions: `work` writes through the product's own functions and goes on where it was stopped; `whole`
looks at what is there and asserts that nothing of it is torn or lost; it is given True after an end without a kill.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

ROWS = [{"n": n} for n in range(60)]


def slowly(row):
    time.sleep(0.002)
    return {"value": row["n"] ** 2}


class Generate:
    """`sd3kit generate` of a file of prompts."""

    count = 40

    def __init__(self, folder):
        (folder / "prompts.txt").write_text("a fox\na cat\n")
        self.out = folder / "out"
        self.words = ["generate", "--prompts", str(folder / "prompts.txt"), "--count", str(self.count)]

    def work(self):
        import types

        from sd3kit import explore
        from sd3kit.command import cli
        from sd3kit.loading import pipeline

        def draw(pipe, prompt, seed, **settings):
            noise = torch.randint(256, (96, 96, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
            drawn = {"prompt": prompt, "seed": seed, **settings, "size": 96}
            return explore.Drawn(Image.fromarray(noise.numpy()), drawn, 1, 1, 1)

        explore.text_to_image, pipeline.load = draw, lambda *_, **__: types.SimpleNamespace()
        assert cli.main([*self.words, "-o", str(self.out)]) == 0

    def whole(self, ended):
        from sd3kit import explore

        pictures = sorted(self.out.glob("*.png"))
        for path in pictures:
            number, seed = path.stem.split("-")
            Image.open(path).load()
            settings = explore.from_png(path)
            assert (settings["prompt"], settings["seed"]) == (["a fox", "a cat"][int(number) - 1], int(seed))
        if (self.out / "settings.json").exists():
            assert json.loads((self.out / "settings.json").read_text())["steps"] == 28
        if ended:
            rows = [json.loads(line) for line in (self.out / "metadata.jsonl").read_text().splitlines()]
            assert [row["file_name"] for row in rows] == [path.name for path in pictures]
            assert len(rows) == 2 * self.count and not list(self.out.glob("*.part"))
        return len(pictures)


class Records:
    """A benchmark's rows, as `studies.measure` stores them."""

    def __init__(self, folder):
        self.path, self.most = folder / "rows.jsonl", 0

    def work(self):
        from sd3kit import records

        records.study(ROWS, slowly, self.path, {"model": "x"}, "make it")

    def whole(self, ended):
        from sd3kit import records

        rows = [record["row"] for record in records.read(self.path)]
        assert all(row in ROWS for row in rows) and len({row["n"] for row in rows}) == len(rows) >= self.most
        assert not ended or rows == ROWS
        self.most = len(rows)  # none is lost again
        return self.most


class Study(Records):
    """A study of the lessons."""

    def __init__(self, folder):
        self.path, self.most = folder / "squares.jsonl", 0

    def work(self):
        sys.path.append(str(Path(__file__).parents[1]))
        from studies import store

        store.run("squares", store.Study("squares", ROWS, slowly), self.path.parent)


class Reset:
    """`notebooks/reset.py`, and the learner's answers that it must keep."""

    def __init__(self, folder):
        self.folder, self.lesson, self.said = folder, folder / "03_flow.ipynb", folder / "said"
        self.lesson.write_text("published " * 999)
        for words in (
            ["init", "-q"],
            ["add", "."],
            ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
        ):
            subprocess.run(["git", *words], cwd=folder, check=True)

    def work(self):
        from notebooks.reset import reset
        from sd3kit import files

        for _ in range(20):
            files.write_whole(self.lesson, f"answers {time.time_ns()} " * 999)
            files.write_whole(self.said, self.lesson.read_text())
            reset("03", self.folder)

    def whole(self, ended):
        now = self.lesson.read_text()
        kept = [path.read_text() for path in (self.folder / "mine").glob("*.ipynb")]
        assert all(text == text[: len(text) // 999] * 999 for text in [now, *kept])
        assert not self.said.exists() or self.said.read_text() in kept or now.startswith("answers")
        assert not ended or now.startswith("published")
        return len(kept)


class Training:
    """Checkpoints and LoRA of the training command: every number of step n is n."""

    def __init__(self, folder):
        self.out, self.files = folder / "out", set()
        self.out.mkdir()

    def work(self):
        from accelerate import Accelerator
        from diffusers import SD3Transformer2DModel

        from sd3kit.dreambooth import Settings, model, saving

        settings = Settings(output_dir=str(self.out), checkpoints_total_limit=2, lora_layers="attn.to_q")
        accelerator = Accelerator(cpu=True)
        learning = model.Denoiser(
            SD3Transformer2DModel(
                sample_size=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
                caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=4,
            )
        )  # fmt: skip
        model.make_trainable(settings, learning)
        learning = accelerator.prepare(learning)
        accelerator.register_for_checkpointing(torch.optim.lr_scheduler.LambdaLR(
            torch.optim.AdamW([p for p in learning.parameters() if p.requires_grad]), lambda step: 1.0
        ))  # fmt: skip
        saving.use_small_checkpoints(settings, accelerator)
        found = saving.checkpoints(self.out)
        step = saving.checkpoint_step(found[-1]) if found else 0
        for left in (*self.out.glob(".checkpoint-*"), *self.out.glob(".result.part")):
            shutil.rmtree(left)
        for _ in range(20):
            step += 1
            with torch.no_grad():
                for parameter in learning.parameters():
                    parameter.fill_(step)
            saving.save_checkpoint(settings, accelerator, learning, step, 0)
            saving.save_result(settings, accelerator, learning, step, torch.float32)

    def whole(self, ended):
        from sd3kit.dreambooth import saving

        there = sorted(p for p in self.out.glob("checkpoint-*"))
        for folder in there:
            step, names = saving.checkpoint_step(folder), sorted(path.name for path in folder.iterdir())
            self.files.add(tuple(names))
            assert json.loads((folder / "progress.json").read_text())["step"] == step
            for name in ("trained.safetensors", "pytorch_lora_weights.safetensors"):
                assert {float(v) for t in load_file(folder / name).values() for v in t.unique()} == {step}
        assert len(self.files) < 2, self.files
        result = self.out / "pytorch_lora_weights.safetensors"
        if result.exists():
            assert len({float(v) for t in load_file(result).values() for v in t.unique()}) == 1
        assert not ended or len(there) == 2
        return max((saving.checkpoint_step(folder) for folder in there), default=0)


THINGS = {"generate": Generate, "records": Records, "study": Study, "reset": Reset, "training": Training}


def forked(work) -> int:
    child = os.fork()
    if not child:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def main(name: str, folder: Path) -> None:
    thing, moments, codes, seen = THINGS[name](folder), random.Random(), [], []
    for _ in range(10):
        child = forked(thing.work)
        time.sleep(moments.uniform(0, 0.25))
        os.kill(child, signal.SIGKILL)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        seen.append(thing.whole(False))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(forked(thing.work), 0)[1]))
    seen.append(thing.whole(True))
    print(json.dumps([codes, seen]))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
