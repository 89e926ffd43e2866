"""Work in a thread: the newest job wins, nothing queues."""

import threading
from collections.abc import Callable

Job = Callable[[threading.Event], None]


class Worker:
    """Runs jobs one at a time in a thread that lives only while there is work.

    A new job stops the one that runs, through the event that each job is given, and takes the place of one that waits.
    """

    def __init__(self, failed: Callable[[Exception], None]):
        """`failed` is told of a job's error, in the thread; the next job runs all the same."""
        self._failed = failed
        self._state = threading.Condition()
        self._waiting: tuple[Job, threading.Event] | None = None
        self._stop = threading.Event()
        self._running = False

    def submit(self, job: Job) -> None:
        with self._state:
            self._waiting = job, threading.Event()
            self._stop.set()
            if not self._running:
                self._running = True
                threading.Thread(target=self._work, name="sd3kit explorer", daemon=True).start()

    def stop(self) -> None:
        """Ask the running job to end, and the waiting one as soon as it starts."""
        with self._state:
            self._stop.set()
            if self._waiting is not None:
                self._waiting[1].set()

    @property
    def running(self) -> bool:
        with self._state:
            return self._running

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is nothing to do; False where `timeout` seconds were not enough."""
        with self._state:
            return self._state.wait_for(lambda: not self._running, timeout)

    def _work(self) -> None:
        while True:
            with self._state:
                if self._waiting is None:
                    self._running = False
                    self._state.notify_all()
                    return
                (job, stop), self._waiting = self._waiting, None
                self._stop = stop
            try:
                job(stop)
            except Exception as error:
                self._failed(error)
