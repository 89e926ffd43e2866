"""Drawing in threads, so that the notebook stays free: a round of pictures at a time, and the newest round wins.

A change of a setting stops what is being drawn. What happened is said in one line, errors too, and the next try works.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from .drawing import Step, Stopped, checked, latent_to_rgb
from .showing import figures, image_html, side_by_side


def one_line(error: Exception) -> str:
    """An error for the status line: its own first line, after its kind where it is not one of ours."""
    lines = str(error).strip().splitlines()
    first = (lines[0] if lines else "")[:240]
    if "out of memory" in first.lower():
        return "The memory is full: choose a smaller size, or start the kernel anew."
    return first if isinstance(error, ValueError) and first else f"{type(error).__name__}: {first}"


class Rounds:
    """The half of `Explorer` that works; the other half says what to draw, and shows it."""

    def __init__(self):
        self._state = threading.RLock()
        self._stop = threading.Event()  # of the newest round, which alone may show itself
        self._asked: list[dict] | None = None  # what is being drawn
        self._thread: threading.Thread | None = None
        self._look: Callable | None = None
        self._follows = False  # pictures come so fast that previews between them would only flicker

    def start(self) -> None:
        """Draw with the controls as they are; what is being drawn with other settings is stopped."""
        try:
            jobs = self.jobs()
        except ValueError as error:
            self.say(one_line(error), error=True)
            return
        with self._state:
            if jobs == self._asked:
                return  # leaving the prompt's box by a click on Draw asks twice
            self._stop.set()
            self._asked, self._stop = jobs, threading.Event()
            # those of older rounds are at their end, or wait for their turn and hear that they are stopped
            self._thread = threading.Thread(
                target=self._work, args=(jobs, self._stop), name="sd3kit explorer", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End the drawing within one step."""
        with self._state:
            if self._asked is not None:
                self._asked = None
                self._stop.set()
                self.say("Stopping…")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait in a script until the drawing has ended; False where `timeout` seconds were not enough."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def look(self, stop: threading.Event | None = None) -> Callable:
        """The preview's map for this pipeline, fitted when it is first needed; `stop` ends the wait for its turn."""
        if self._look is None:
            self._look = latent_to_rgb(self.pipe, stop)
        return self._look

    @contextlib.contextmanager
    def _showing(self, stop: threading.Event) -> Iterator[None]:
        """Hold the page for the round of this event.

        Raises:
            Stopped: another round, or a return to an older picture, has taken its place.
        """
        with self._state:
            if stop is not self._stop:
                raise Stopped
            yield

    def _work(self, jobs: list[dict[str, Any]], stop: threading.Event) -> None:
        """One round, in its thread; it shows nothing once another has taken its place."""
        failed = False
        try:
            words = self._round(jobs, stop)
        except Stopped:
            words = "Stopped before the first step."
        except Exception as error:
            words, failed = one_line(error), True
        with contextlib.suppress(Stopped), self._showing(stop):
            self._asked, self._bar.value, self._stopper.button_style = None, "", ""
            self.say(words, failed)

    def _round(self, jobs: list[dict[str, Any]], stop: threading.Event) -> str:
        """Draw and show each of the jobs; gives what there is to say of it."""
        start, made = time.perf_counter(), []
        with self._showing(stop):
            self.say("Drawing…")
            self._stopper.button_style = "danger"  # white is readable on its red, not on the orange of "warning"
        for job in jobs:  # before the wait for another explorer's drawing
            checked(self.pipe, {"shift": None} | job)
        look = self.look(stop)
        for number, job in enumerate(jobs, 1):

            def watch(step: Step, job=job, number=number) -> None:
                if self._follows and self.shown:
                    return
                with contextlib.suppress(Stopped), self._showing(stop):
                    which = f"picture {number} of {len(jobs)}, " if len(jobs) > 1 else ""
                    bar = f'<progress max="{step.total}" value="{step.number}" aria-label="Steps drawn"></progress>'
                    self._bar.value = f"{bar} {which}step {step.number} of {step.total}, σ {step.sigma:.2f}"
                    words = f"Preview of step {step.number} of {step.total}: {job['prompt']}; seed {job['seed']}"
                    self._pictures.value = side_by_side([*figures(made), image_html(look(step.latents), words)])

            drawn = self.draw(dict(job), watch, stop)
            with self._showing(stop):
                made.append(drawn)
                if not drawn.stopped:
                    self._keep(drawn, job)
                self.show(made)
            if drawn.stopped:
                return f"Stopped after {drawn.steps} of {drawn.total} steps: this is what there was."
        share = f" (strength {job['strength']:g} of {job['steps']})" if "strength" in job else ""
        many = f"{len(made)} pictures, each " if len(made) > 1 else ""
        return f"Done: {many}{drawn.total} steps{share} in {time.perf_counter() - start:.1f} s."
