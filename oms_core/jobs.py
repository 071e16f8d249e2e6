"""Long work for many viewers: one worker owns the device, equal work is done once.

The worker lives in this module, not in a page's cache that any visitor can clear. A job is known by its key;
who asks for a job that is under way joins it. A job that nobody has looked at for a while stops, and what it
finished is kept on disk. Short questions pass between the batches of a long job. Viewers take turns: whoever asks
for much waits longer himself, and nobody else does.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import zip_longest
from typing import Any, Generic, TypeVar

import pandas as pd

from oms_core import libraries
from oms_core.compute import Columns, Progress, Tick, table_of
from oms_core.device import out_of_memory
from oms_core.errors import InputError

log = logging.getLogger(__name__)
WAITING, WAITING_EACH = 64, 4  # jobs in the queue, and those of one viewer
QUESTIONS, QUESTIONS_EACH = 64, 4  # short questions that wait, and those of one viewer
REMEMBERED = 64  # jobs that are over
PATIENCE = 15.0  # seconds a job goes on without a viewer
LIVE = ("queued", "running")
T = TypeVar("T")


class Stopped(Exception):
    """Raised inside a job that was cancelled or left alone."""


class Job:
    """One piece of long work.

    Attributes:
        state: queued, running, done, cancelled or failed.
        done, total: pictures.
        stage: what is done to them, see `Progress`.
        signals: distances by attack, growing while batches come in.
        error: one sentence, if it failed.
    """

    def __init__(self, key: str, work: Callable[[Tick], Any], viewer: str = "") -> None:
        self.key = key
        self.work: Callable[[Tick], Any] | None = work
        self.state, self.error = "queued", ""
        self.done, self.total, self.stage = 0, 0, ""
        self.signals: dict[str, list[Columns]] = {}
        self.started = self.ended = time.monotonic()
        self.cancelled = False
        self.seen: dict[str, float] = {}  # when each viewer last looked
        self.touch(viewer)

    def touch(self, viewer: str = "") -> None:
        """Say that somebody still looks."""
        self.seen[viewer] = time.monotonic()

    def cancel(self) -> None:
        """Stop within a batch; what is finished is kept."""
        self.cancelled = True

    def leave(self, viewer: str) -> bool:
        """A viewer asks to stop: granted at once, unless somebody else still looks.

        Returns:
            Whether the job stops.
        """
        self.seen.pop(viewer, None)
        if self.abandoned:
            self.cancel()
        return self.cancelled

    def end(self, state: str, error: str = "") -> None:
        """It is over, and holds no longer what its work needed."""
        self.work, self.ended, self.error = None, time.monotonic(), error
        self.state = state  # last: who sees it may read the rest

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def abandoned(self) -> bool:
        return self.cancelled or all(time.monotonic() - seen > PATIENCE for seen in list(self.seen.values()))

    @property
    def rate(self) -> float:
        """Pictures per second so far."""
        return self.done / max(1e-9, self.took)

    @property
    def took(self) -> float:
        """Seconds so far, or until it was over."""
        return (time.monotonic() if self.live else self.ended) - self.started

    def so_far(self, attack: str) -> pd.DataFrame | None:
        """The distances of an attack that have come in."""
        parts = list(self.signals.get(attack, []))
        return table_of(parts) if parts else None


class Line(Generic[T]):
    """What waits, in turns: the first of each viewer, then the second of each. It may wait for several viewers."""

    def __init__(self) -> None:
        self.waiting: OrderedDict[str, deque[T]] = OrderedDict()  # by viewer; the next in turn stands first

    def add(self, viewer: str, one: T) -> None:
        """Let something wait for a viewer, behind what waits for him already."""
        own = self.waiting.setdefault(viewer, deque())
        if one not in own:
            own.append(one)

    def take(self) -> T | None:
        """The next in turn, which then waits for nobody; None if nothing waits."""
        if not self.waiting:
            return None
        viewer, own = next(iter(self.waiting.items()))
        self.waiting.move_to_end(viewer)
        one = own[0]
        self.remove(one)
        return one

    def remove(self, one: T) -> None:
        """Let something wait for nobody any more."""
        for viewer, own in [*self.waiting.items()]:
            if one in own:
                own.remove(one)
            if not own:
                del self.waiting[viewer]

    def of(self, viewer: str) -> int:
        """How many wait for a viewer."""
        return len(self.waiting.get(viewer, ()))

    def __iter__(self) -> Iterator[T]:
        """In the order in which they are taken if nothing else comes."""
        turns = zip_longest(*self.waiting.values())
        return iter(dict.fromkeys(one for turn in turns for one in turn if one is not None))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Service:
    """The queue and its one worker.

    Args:
        prepare: called on the worker's thread before each piece of work.
    """

    def __init__(self, prepare: Callable[[], None] = lambda: None) -> None:
        self.prepare = prepare
        self.changed = threading.Condition()
        self.jobs: OrderedDict[str, Job] = OrderedDict()
        self.queue: Line[Job] = Line()
        self.questions: Line[tuple[Callable[[], Any], Future]] = Line()
        self.running: Job | None = None
        self.worker: threading.Thread | None = None

    def submit(self, key: str, work: Callable[[Tick], Any], viewer: str = "") -> Job:
        """Start a job, or join the one with this key that is under way (and is not being stopped) or done.

        Args:
            key: equal keys mean equal work.
            work: called with a tick that it must call after each batch.
            viewer: who asks, see `Job.touch`.

        Raises:
            InputError: too many jobs are waiting, of all or of this viewer.
        """
        with self.changed:
            self._drop_abandoned()
            job = self.jobs.get(key)
            if job is None or job.cancelled or job.state in ("cancelled", "failed"):
                job = self._queued(key, work, viewer)
            elif job in self.queue and self.queue.of(viewer) < WAITING_EACH:
                self.queue.add(viewer, job)  # who joins need not wait for the turn of who came first
            job.touch(viewer)
            return job

    def _queued(self, key: str, work: Callable[[Tick], Any], viewer: str) -> Job:
        """A new job at the end of a viewer's line."""
        if self.queue.of(viewer) >= WAITING_EACH:
            raise InputError(f"{WAITING_EACH} of your runs are waiting; cancel one, or wait until one has begun.")
        if len(self.queue) >= WAITING:
            raise InputError(f"{WAITING} runs are waiting; try again when some have finished.")
        job = self.jobs[key] = Job(key, work, viewer)
        self.jobs.move_to_end(key)
        self.queue.add(viewer, job)
        self._forget()
        self._wake()
        return job

    def ask(self, work: Callable[[], Any], viewer: str = "") -> Any:
        """Run something short on the worker's thread, between two batches of a long job, and wait for it.

        Raises:
            InputError: too many questions are waiting, of all or of this viewer; or what `work` raises.
        """
        answer: Future = Future()
        with self.changed:
            if self.questions.of(viewer) >= QUESTIONS_EACH:
                raise InputError(f"{QUESTIONS_EACH} of your questions are waiting; ask again when one is answered.")
            if len(self.questions) >= QUESTIONS:
                raise InputError(f"{QUESTIONS} questions are waiting; ask again in a minute.")
            self.questions.add(viewer, (work, answer))
            self._wake()
        return answer.result()

    def find(self, key: str) -> Job | None:
        """The job with this key, if it is remembered."""
        return self.jobs.get(key)

    def position(self, job: Job) -> int:
        """How many jobs go before a queued one, the running one included."""
        with self.changed:
            self._drop_abandoned()
            waiting = [*self.queue]
            return waiting.index(job) + (self.running is not None) if job in waiting else 0

    def _wake(self) -> None:
        if self.worker is None or not self.worker.is_alive():
            self.worker = threading.Thread(target=self._work, name="device", daemon=True)
            self.worker.start()
        self.changed.notify_all()

    def _drop_abandoned(self) -> None:
        """End the queued jobs that nobody waits for any more."""
        for job in [job for job in self.queue if job.abandoned]:
            self.queue.remove(job)
            job.end("cancelled")

    def _forget(self) -> None:
        over = [key for key, job in self.jobs.items() if not job.live]
        for key in over[: max(0, len(over) - REMEMBERED)]:
            del self.jobs[key]

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self.queue and not self.questions:
                    self.changed.wait()
            self._answer()
            with self.changed:
                self.running = self.queue.take()
            if self.running is not None:
                self._run(self.running)
                self.running = None

    def _answer(self) -> None:
        """Answer one short question of each viewer who waits; a job goes on between two of one viewer."""
        with self.changed:
            turns = len(self.questions.waiting)
        for _ in range(turns):
            with self.changed:
                asked = self.questions.take()
            if asked is not None:
                self._answer_one(*asked)

    def _answer_one(self, work: Callable[[], Any], answer: Future) -> None:
        try:
            self.prepare()
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    def _run(self, job: Job) -> None:
        job.state, job.started = "running", time.monotonic()
        name = hashlib.sha256(job.key.encode()).hexdigest()[:8]
        log.info("Job %s starts", name)

        def tick(progress: Progress) -> None:
            job.done, job.total, job.stage = progress.done, progress.total, progress.stage
            for attack, rows in progress.signals.items():
                job.signals.setdefault(attack, []).append(rows)
            self._answer()
            if job.abandoned:
                raise Stopped

        try:
            if job.abandoned:
                raise Stopped
            self.prepare()
            job.work(tick)
            outcome, error = "done", ""
        except Stopped:
            outcome, error = "cancelled", ""
        except InputError as problem:
            outcome, error = "failed", str(problem)
        except BaseException as problem:  # whatever it is, the viewers are told and the worker lives on
            outcome, error = "failed", explain(problem)
        job.end(outcome, error)
        log.info("Job %s is %s after %d of %d pictures, %.1f s", name, outcome, job.done, job.total, job.took)


def explain(problem: BaseException) -> str:
    """One sentence for a visitor; the details go to the log under the same number."""
    if out_of_memory(problem):
        return "The device ran out of memory; choose a smaller batch size and run again."
    number = uuid.uuid4().hex[:8]
    log.exception("Job failed [%s]", number, exc_info=problem)
    return f"Something went wrong that should not; the server's log has the details under {number}."


SERVICE = Service(libraries.load_engine)
