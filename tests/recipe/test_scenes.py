"""Captions and the hold-out: what is trained, what is never trained, and how it is said."""

import pytest

from sd3kit.recipe import scenes

KINDS = ("single", "sign", "pair", "split", "count")
FIRST = scenes.SUBJECTS[:32]


@pytest.mark.parametrize("kind", KINDS)
def test_training_never_sees_what_is_held_out(kind, rng):
    trained = [scenes.random_scene(rng, FIRST, kind) for _ in range(300)]
    asked = [scenes.random_scene(rng, FIRST, kind, held_out=True, spell=0) for _ in range(100)]
    assert not any(scenes.is_held_out(scene) for scene in trained)
    assert all(scenes.is_held_out(scene) for scene in asked)


def test_about_a_tenth_of_the_single_subjects_is_held_out():
    every = [scenes.Scene("single", (s,), t, c) for s in FIRST for t in scenes.STYLES for c in scenes.COLOURS]
    share = sum(map(scenes.is_held_out, every)) / len(every)
    assert 0.07 < share < 0.14


def test_the_announcements_picture_is_held_out_in_every_style_and_colour():
    cat = next(s for s in FIRST if s.name == "cat")
    assert all(
        scenes.is_held_out(scenes.Scene("sign", (cat,), style, colour, "hello world"))
        for style in scenes.STYLES
        for colour in scenes.COLOURS
    )


def test_a_pair_is_held_out_in_both_orders():
    for a in FIRST[:12]:
        for b in FIRST[12:24]:
            scene = scenes.Scene("pair", (a, b), "3d", "red")
            assert scenes.is_held_out(scene) == scenes.is_held_out(scenes.Scene("pair", (b, a), "flat", "blue"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_says_everything_that_the_scene_holds(kind, rng):
    for _ in range(50):
        scene = scenes.random_scene(rng, scenes.SUBJECTS, kind)
        text = scenes.caption(scene)
        assert scene.colour in text and scene.style in text
        assert scene.text in text
        if kind == "count":
            assert scenes.COUNTS[scene.count] in text
        else:
            assert all(subject.name in text for subject in scene.subjects)


def test_left_and_right_are_told_apart():
    cat, fox = FIRST[0], FIRST[2]
    text = scenes.caption(scenes.Scene("pair", (fox, cat), "3d", "red"))
    assert text.index("fox") < text.index("cat")


def test_the_listed_hold_out_is_the_one_in_force(judge):
    listed = scenes.HELD_OUT.read_text(encoding="utf-8").splitlines()
    assert listed == scenes.held_out(judge.subjects)


def test_names_are_unique():
    names = [name for subject in scenes.SUBJECTS for name in subject.names]
    assert len(names) == len(set(names))
    assert len(scenes.SUBJECTS) >= 240


def test_plurals():
    by_name = {s.name: s for s in scenes.SUBJECTS}
    for name, plural in {
        "fox": "foxes",
        "strawberry": "strawberries",
        "fish": "fish",
        "mouse": "mice",
        "cat": "cats",
    }.items():
        assert f"three {plural}" in scenes.caption(scenes.Scene("count", (by_name[name],), "3d", "red", count=3))
