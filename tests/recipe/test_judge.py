"""The judge must be right on pictures whose content is known, and wrong on shuffled ones."""

import numpy as np
import pytest
from PIL import Image

from sd3kit.recipe import scenes
from sd3kit.recipe.art import draw
from sd3kit.recipe.evaluate import KINDS, ask, edit_distance, tally


def render(asked, art, rng):
    return [Image.fromarray(draw(scene, art, rng).round().astype(np.uint8)) for scene in asked]


@pytest.mark.parametrize("kind", KINDS)
def test_reads_renders_and_is_not_fooled_by_shuffled_prompts(kind, judge, art, rng):
    asked = ask(kind, 12, judge.subjects, False, 1)
    pictures = render(asked, art, rng)
    right = tally(judge, pictures, asked)
    assert all(figure["share"] >= 0.95 for figure in right.values()), right
    shuffled = tally(judge, pictures, asked[1:] + asked[:1])
    assert all(figure["share"] < 0.6 for figure in shuffled.values()), shuffled


def test_reads_every_word_it_may_be_asked_for(judge, art, rng):
    cat = judge.subjects[0]
    asked = [scenes.Scene("sign", (cat,), "flat", "teal", word) for word in scenes.WORDS]
    read = [judge.text(image) for image in render(asked, art, rng)]
    assert read == scenes.WORDS


def test_a_picture_without_a_sign_has_no_text(judge, art, rng):
    asked = [scenes.Scene("single", (s,), "flat", "white") for s in judge.subjects]
    read = [judge.text(image) for image in render(asked, art, rng)]
    assert sum(len(text) > 1 for text in read) <= len(read) * 0.1


def test_an_empty_picture_shows_nothing(judge):
    empty = Image.new("RGB", (128, 128), scenes.COLOURS["blue"])
    assert judge.background(empty) == "blue"
    assert judge.subject(empty) is None
    assert judge.count(empty) == 0


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "abc", 3), ("hello", "hallo", 1), ("open", "open", 0), ("abc", "cab", 2)]
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == distance == edit_distance(b, a)
