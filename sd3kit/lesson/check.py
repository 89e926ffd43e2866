"""What the lessons' self-checks share. A check never stops a notebook: it says where you are.

An exercise leaves a name at None; a check answers with one line. `problem` in a check's own words names the likely
mistake. `verdict` returns what it says, so that tests can read it.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

NOT_YET = "Not attempted yet: set the name in the cell above and run both cells again."


def verdict(
    answer: Any, right: Callable[[Any], bool], *mistakes: tuple[Callable[[Any], bool], str], otherwise: str
) -> str:
    """Say whether an answer is right, and if not, the likely mistake.

    Args:
        answer: the learner's; None is not attempted.
        right: tells a right answer.
        *mistakes: pairs of a test for a typical wrong answer and what to say to it, tried in order.
        otherwise: what to say to any other wrong answer.

    Returns:
        One line that begins with "Not attempted", "Right" or "Not yet". It is printed too.
    """
    if answer is None:
        said = NOT_YET
    elif _safely(right, answer):
        said = "Right."
    else:
        hint = next((words for test, words in mistakes if _safely(test, answer)), otherwise)
        said = f"Not yet: {hint}"
    print(said)
    return said


def _safely(test: Callable[[Any], bool], answer: Any) -> bool:
    """A test that cannot be applied to what was given (a text in place of a number, say) has not passed."""
    try:
        return bool(test(answer))
    except Exception:
        return False


def guess(value: float | None, answer: float, unit: str = "") -> str:
    """Compare a prediction with the answer, which was measured or counted after it; returns and prints one line."""
    told = f"The answer: {answer:.3g}{unit}."
    if value is None:
        said = f"You made no prediction. {told} Next time guess first: it is how one learns most."
    elif not isinstance(value, numbers.Real) or not math.isfinite(value):
        said = f"A prediction is a number, such as 1.5. {told}"
    else:
        off, size = abs(value - answer), abs(answer)
        least = 0.1 if not unit and size <= 1 else 1e-12  # without a unit it is a share, and 0.02 is near 0
        near = "close" if off < max(size / 4, least) else "in the right region" if off < max(size, least) else ""
        said = f"You guessed {value:g}{unit}: {near or 'far off, so there is something to learn'}. {told}"
    print(said)
    return said
