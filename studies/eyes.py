"""A check of nano with people's eyes: sixty pictures of held-out prompts, named by somebody who does not know them.

    python -m studies.eyes draw FOLDER      ten sheets of six numbered pictures, and `asked.json`, which the reader must
                                            not see; two minutes on two cores
    python -m studies.eyes compare FOLDER   the shares that the reader of `studies/eyes.json` named rightly, beside the
                                            judge's for the same pictures

The reader writes for each picture its number `i`, the `subject` in a word, the `style`, the background's `colour`, the
`text` on a sign, and whether they would call the drawing `damaged`. These are the `rows` of `studies/eyes.json`; its
`weights`, which drawing prints, say of which nano the pictures were.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from sd3kit import files, load, records
from sd3kit.errors import UserError, answer
from sd3kit.loading.names import own_settings
from sd3kit.recipe import digest, evaluate, scenes
from sd3kit.recipe.judge import Judge

ANSWERS = Path(__file__).with_name("eyes.json")
SIDE = 400  # pixels at which a picture is shown


def asked(judge: Judge) -> list[scenes.Scene]:
    """The sixty scenes, in the order of their numbers."""
    found = [
        scene for kind, n in (("single", 44), ("sign", 16)) for scene in evaluate.ask(kind, n, judge.subjects, True, 60)
    ]
    random.Random(60).shuffle(found)
    return found


def row(scene: scenes.Scene) -> dict[str, str]:
    """What was asked, by the names that the reader answers with."""
    return {
        "subject": scene.subjects[0].name, "style": scene.style, "colour": scene.colour, "text": scene.text
    }  # fmt: skip


def draw(folder: Path) -> None:
    """Draw with nano's own steps and guidance; each row of `asked.json` has what was asked and what the judge saw."""
    files.check_writable(folder, folder=True)
    judge, settings, weights = Judge(), own_settings("nano"), digest.weights()
    wanted = asked(judge)
    made = evaluate.pictures(
        load("nano"), [scenes.caption(scene) for scene in wanted], seed=600,
        num_inference_steps=settings["steps"], guidance_scale=settings["guidance"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, len(made), 6):
        sheet = Image.new("RGB", (3 * (SIDE + 20), 2 * (SIDE + 50)), "lightgray")
        for j, image in enumerate(made[first : first + 6]):
            corner = j % 3 * (SIDE + 20) + 10, j // 3 * (SIDE + 50) + 36
            sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), corner)
            ImageDraw.Draw(sheet).text((corner[0], corner[1] - 22), str(first + j), "black", font_size=18)
        sheet.save(folder / f"sheet{first // 6}.png")
    pairs = zip(made, wanted, strict=True)
    rows = [row(scene) | {"judge": evaluate.judge_scene(judge, image, scene)} for image, scene in pairs]
    files.write_whole(folder / "asked.json", json.dumps({"weights": weights, "rows": rows}, indent=1))
    print(f'{folder} has the sheets; the answers are {{"weights": "{weights}", "rows": [...]}} in {ANSWERS}.')


def compare(folder: Path) -> dict[str, dict[str, dict]]:
    """For each thing that was asked: the share that the reader named rightly, and the judge's, with intervals.

    Raises:
        UserError: the folder holds no pictures, or the answers are about those of other weights.
    """
    if not (folder / "asked.json").is_file():
        raise UserError(f"{folder} holds no asked.json: draw into it first.")
    asked, answers = (json.loads(path.read_text(encoding="utf-8")) for path in (folder / "asked.json", ANSWERS))
    if asked["weights"] != answers["weights"]:
        raise UserError(
            f"the pictures in {folder} are of the weights {asked['weights']}, the answers in {ANSWERS} of "
            f"{answers['weights']}: let somebody name these pictures anew."
        )
    rows, said, found = asked["rows"], {row["i"]: row for row in answers["rows"]}, {}
    for name, judged in (("subject", "subject"), ("style", "style"), ("colour", "background"), ("text", "text")):
        among = [i for i, row in enumerate(rows) if row[name]]
        found[judged] = {
            "reader": records.share([said[i][name].lower() == rows[i][name] for i in among]),
            "judge": records.share([rows[i]["judge"][judged] for i in among]),
        }
    found["not damaged"] = {"reader": records.share([not said[i]["damaged"] for i in range(len(rows))])}
    return found


def told(folder: Path) -> None:
    for name, shares in compare(folder).items():
        print(
            name,
            *(f"{who} {s['share']:.0%} ({s['low']:.0%} to {s['high']:.0%}, n = {s['n']})" for who, s in shares.items()),
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m studies.eyes", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("draw", "compare"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    return answer(lambda: {"draw": draw, "compare": told}[options.what](options.folder), "stopped; nothing is kept.")


if __name__ == "__main__":
    sys.exit(main())
