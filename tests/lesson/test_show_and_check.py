"""What notebooks show, and how exercises answer."""

import numpy as np
import pytest
from PIL import Image

from sd3kit.lesson import check, show


def images(n):
    return [Image.new("RGB", (128, 128), (i * 20, 0, 0)) for i in range(n)]


def test_grid_keeps_the_order_and_describes_itself():
    picture = show.grid(images(3), labels=["a", "b", "c"], title="Red grows", side=128)
    assert picture.alt == "Red grows. a; b; c"
    across = [picture.image.getpixel((8 + 136 * i + 64, 28 + 64)) for i in range(3)]
    assert across == [(0, 0, 0), (20, 0, 0), (40, 0, 0)]


def test_a_wide_sheet_has_larger_letters_and_a_long_title_wraps():
    """Both must be readable where a sheet is shown 400 pixels wide."""
    row = lambda n, title="": show.grid(images(n), labels=["a"] * n, title=title, side=128).image  # noqa: E731
    assert row(3).height < row(7).height, "the letters under seven pictures are larger"
    long = row(3, "a finding " * 12)
    assert long.width <= 480 and long.height > row(3, "a finding").height


def test_alt_text_is_escaped():
    html = show.grid(images(1), alt='a "<b>"')._repr_html_()
    assert 'alt="a &quot;&lt;b&gt;&quot;"' in html


@pytest.mark.parametrize(
    ("given", "words"),
    [({"images": []}, "at least one"), ({"images": images(2), "labels": ["a"]}, "one label for each")],
)
def test_grid_refuses_what_does_not_fit(given, words):
    with pytest.raises(ValueError, match=words):
        show.grid(**given)


def test_verdicts(capsys):
    mistakes = ((lambda n: n == 56, "that is both predictions."),)
    ask = lambda answer: check.verdict(answer, lambda n: n == 28, *mistakes, otherwise="look again.")  # noqa: E731
    assert ask(None).startswith("Not attempted")
    assert ask(28) == "Right."
    assert ask(56) == "Not yet: that is both predictions."
    assert ask("many") == "Not yet: look again."
    assert capsys.readouterr().out.count("\n") == 4


def test_a_check_survives_an_answer_of_the_wrong_type():
    assert check.verdict("text", lambda f: f(1) == 2, otherwise="give a function.") == "Not yet: give a function."


def test_guesses():
    assert check.guess(None, 3.0).startswith("You made no prediction")
    assert "close" in check.guess(3.2, 3.0)
    assert "far off" in check.guess(30, 3.0)
    assert "close" in check.guess(np.float32(3.2), np.float64(3.0)) and "close" in check.guess(np.int64(3), 3.0)
    assert check.guess(float("nan"), 3.0).startswith("A prediction is a number")
    assert check.guess("three", 3.0).startswith("A prediction is a number")


def test_a_guess_at_a_share_may_miss_by_a_tenth():
    """A share of 0 has no fraction that a guess could be compared with; a time of 0.02 s has."""
    assert "close" in check.guess(0.02, 0.0) and "close" in check.guess(0.12, 0.04)
    assert "far off" in check.guess(0.3, 0.0) and "far off" in check.guess(0.3, 0.1)
    assert "far off" in check.guess(0.1, 0.02, " s") and "far off" in check.guess(1, 0, " of 4 pictures")
    assert "close" in check.guess(0, 0, " of 4 pictures")


@pytest.mark.parametrize("value", [None, "three", 2.4])
def test_a_guess_is_told_the_answer_and_not_how_it_was_found(value):
    """The answer may be counted, and then "measured" would be wrong."""
    said = check.guess(value, 2.48, " GiB")
    assert "The answer: 2.48 GiB." in said and "easured" not in said
