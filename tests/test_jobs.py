"""Long work for many viewers: done once, in order, on one thread, stopped when nobody looks, never silent."""

from __future__ import annotations

import gc
import logging
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from oms_core import jobs
from oms_core.compute import Progress, Tick
from oms_core.errors import InputError
from oms_core.jobs import Job, Service

SOON = 10.0  # seconds after which a test that waits has failed


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ended(job: Job) -> Job:
    wait_for(lambda: not job.live)
    return job


class Steps:
    """Work of so many batches, each of which waits until it is let go."""

    def __init__(self, total: int = 1000) -> None:
        self.total, self.done, self.passed = total, 0, 0  # batches begun, and those whose tick let the work go on
        self.begun = threading.Event()
        self.allowed = threading.Semaphore(0)
        self.over = False

    def __call__(self, tick: Tick) -> None:
        self.begun.set()
        for place in range(self.total):
            assert self.allowed.acquire(timeout=SOON)
            if self.over:
                return
            self.done += 1
            tick(Progress(place + 1, self.total, {"NA": pd.DataFrame({"image": [f"{place}"], "d": [place]})}))
            self.passed += 1

    def go(self, batches: int = 1) -> None:
        """Let so many batches go."""
        self.allowed.release(batches)

    def end(self) -> None:
        self.over = True
        self.allowed.release(self.total)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def steps() -> Iterator[Callable[..., Steps]]:
    """Makes work that is let go batch by batch; what still waits at the end of a test is ended."""
    made: list[Steps] = []

    def make(total: int = 1000) -> Steps:
        made.append(Steps(total))
        return made[-1]

    yield make
    for work in made:
        work.end()


class Clock(SimpleNamespace):
    """A clock that is set by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(jobs, "time", clock)
    return clock


def nothing(tick: Tick) -> None:
    """Work that is done at once."""


# Once, in order, on one thread


def test_sixteen_viewers_who_ask_together_share_one_job(service: Service, steps: Callable[..., Steps]) -> None:
    work, called, barrier = steps(3), [], threading.Barrier(16)

    def counted(tick: Tick) -> None:
        called.append(threading.get_ident())
        work(tick)

    def ask() -> Job:
        barrier.wait(SOON)
        return service.submit("key", counted)

    with ThreadPoolExecutor(16) as viewers:
        found = [viewer.result(SOON) for viewer in [viewers.submit(ask) for _ in range(16)]]
    assert len({id(job) for job in found}) == 1
    work.go(3)
    assert ended(found[0]).state == "done"
    assert len(called) == 1
    assert service.submit("key", counted) is found[0]  # done work is not done again
    assert len(called) == 1


def test_other_work_waits_its_turn_on_the_same_thread(service: Service) -> None:
    order, threads, active = [], set(), []
    gate = threading.Event()

    def work(number: int) -> Callable[[Tick], None]:
        def run(tick: Tick) -> None:
            assert gate.wait(SOON)
            active.append(number)
            order.append(number)
            threads.add(threading.get_ident())
            tick(Progress(1, 1, {}))
            assert active == [number]
            active.remove(number)

        return run

    submitted = [service.submit(f"{number}", work(number), f"viewer {number}") for number in range(20)]
    gate.set()
    assert {ended(job).state for job in submitted} == {"done"}
    assert order == [*range(20)]
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_many_threads_submitting_at_once_start_one_worker(service: Service) -> None:
    barrier, threads = threading.Barrier(16), []

    def submit(number: int) -> Job:
        barrier.wait(SOON)
        return service.submit(f"{number}", lambda tick: threads.append(threading.get_ident()), f"viewer {number}")

    with ThreadPoolExecutor(16) as viewers:
        found = [viewer.result(SOON) for viewer in [viewers.submit(submit, number) for number in range(16)]]
    assert all(ended(job).state == "done" for job in found)
    assert len(threads) == 16
    assert len(set(threads)) == 1


def test_the_worker_does_not_keep_the_program_alive(service: Service) -> None:
    service.submit("key", nothing)
    assert service.worker.daemon


def test_jobs_that_go_before_are_counted_with_the_running_one(service: Service, steps: Callable[..., Steps]) -> None:
    works = [steps(1) for _ in range(4)]
    found = [service.submit(f"{place}", work) for place, work in enumerate(works)]
    assert works[0].begun.wait(SOON)
    assert [service.position(job) for job in found] == [0, 1, 2, 3]
    works[0].go()
    assert works[1].begun.wait(SOON)
    assert [service.position(job) for job in found] == [0, 0, 1, 2]
    found[2].cancel()
    assert [service.position(job) for job in found] == [0, 0, 0, 1]  # who has left is not waited for


# Progress


def test_distances_come_in_while_the_job_runs(service: Service, steps: Callable[..., Steps]) -> None:
    work = steps(5)
    job = service.submit("key", work)
    assert work.begun.wait(SOON)
    assert (job.state, job.done, job.so_far("NA")) == ("running", 0, None)
    for count in (1, 2):
        work.go()
        wait_for(lambda count=count: work.passed == count)
        assert (job.done, job.total) == (count, 5)
        assert job.so_far("NA").d.tolist() == [*range(count)]
        assert job.so_far("NA").index.tolist() == [*range(count)]
    assert job.so_far("PIA") is None
    work.go(3)
    assert ended(job).state == "done"
    assert job.so_far("NA").d.tolist() == [0, 1, 2, 3, 4]


def test_the_rate_is_pictures_per_second_of_the_run_alone(
    service: Service, steps: Callable[..., Steps], clock: Clock
) -> None:
    work = steps(10)
    job = service.submit("key", work)
    assert work.begun.wait(SOON)
    clock.now = 4.0
    work.go(8)
    wait_for(lambda: work.passed == 8)
    assert job.rate == 2
    clock.now = 5.0
    work.go(2)
    assert ended(job).rate == 2
    clock.now = 1000.0
    assert job.rate == 2  # and it stays


# Stopping


def test_a_cancelled_job_stops_at_its_next_batch_and_keeps_what_came_in(
    service: Service, steps: Callable[..., Steps]
) -> None:
    work = steps()
    job = service.submit("key", work)
    work.go(3)
    wait_for(lambda: work.passed == 3)
    job.cancel()
    work.go(100)
    assert ended(job).state == "cancelled"
    assert work.done == 4
    assert job.error == ""
    assert job.so_far("NA").d.tolist() == [0, 1, 2, 3]


def test_a_cancelled_job_that_waits_is_never_begun(service: Service, steps: Callable[..., Steps]) -> None:
    first, second = steps(1), steps(1)
    service.submit("first", first)
    job = service.submit("second", second)
    job.cancel()
    first.go()
    assert ended(job).state == "cancelled"
    assert not second.begun.is_set()


def test_a_job_that_nobody_looks_at_stops(service: Service, steps: Callable[..., Steps], clock: Clock) -> None:
    work = steps()
    job = service.submit("key", work)
    work.go()
    wait_for(lambda: work.passed == 1)
    clock.now += jobs.PATIENCE + 0.1
    work.go(100)
    assert ended(job).state == "cancelled"
    assert work.done == 2
    assert len(job.so_far("NA")) == 2


def test_patience_is_what_it_says_by_the_real_clock(
    service: Service, steps: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "PATIENCE", 0.02)
    work = steps()
    job = service.submit("key", work)
    wait_for(lambda: job.abandoned)
    work.go(100)
    assert ended(job).state == "cancelled"
    assert work.done <= 1


@pytest.mark.parametrize("look", ["touch", "submit"])
def test_a_job_that_somebody_looks_at_goes_on(
    service: Service, steps: Callable[..., Steps], clock: Clock, look: str
) -> None:
    work = steps()
    job = service.submit("key", work)
    for count in range(1, 6):
        clock.now += jobs.PATIENCE - 0.1
        if look == "touch":
            job.touch()
        else:
            assert service.submit("key", work) is job
        work.go()
        wait_for(lambda count=count: work.passed == count)
    assert job.state == "running"
    clock.now += jobs.PATIENCE + 0.1
    work.go()
    assert ended(job).state == "cancelled"


def test_what_nobody_waits_for_any_more_takes_no_place_in_the_queue(
    service: Service, steps: Callable[..., Steps], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "WAITING", 3)
    work = steps()
    running = service.submit("running", work)
    assert work.begun.wait(SOON)
    left = [service.submit(f"{number}", nothing) for number in range(3)]
    with pytest.raises(InputError):
        service.submit("one more", nothing)
    clock.now += jobs.PATIENCE + 0.1
    running.touch()
    job = service.submit("one more", nothing)
    assert {other.state for other in left} == {"cancelled"}
    assert service.position(job) == 1
    work.go()
    wait_for(lambda: work.passed == 1)
    assert running.state == "running"
    work.end()
    assert ended(job).state == "done"


@pytest.mark.parametrize("outcome", ["cancelled", "failed"])
def test_what_was_stopped_or_failed_runs_again_when_asked_again(
    service: Service, steps: Callable[..., Steps], outcome: str
) -> None:
    def fail(tick: Tick) -> None:
        raise InputError("no")

    work = steps()
    job = service.submit("key", fail if outcome == "failed" else work)
    job.cancelled = outcome == "cancelled"
    work.go()
    assert ended(job).state == outcome
    again = service.submit("key", nothing)
    assert again is not job
    assert ended(again).state == "done"
    assert service.find("key") is again


def test_asking_again_while_a_job_is_being_stopped_does_not_join_it(
    service: Service, steps: Callable[..., Steps]
) -> None:
    work = steps()
    job = service.submit("key", work)
    assert work.begun.wait(SOON)
    job.cancel()
    again = service.submit("key", nothing)
    assert again is not job
    assert service.submit("key", nothing) is again
    work.go()
    assert ended(job).state == "cancelled"
    assert ended(again).state == "done"


# Short questions


def asked(service: Service, work: Callable[[], object], viewer: str = "") -> Future:
    """Put a question on another thread while the worker is busy; return once it waits."""
    answer: Future = Future()

    def ask() -> None:
        try:
            answer.set_result(service.ask(work, viewer))
        except BaseException as error:
            answer.set_exception(error)

    waiting = len(service.questions)
    threading.Thread(target=ask, daemon=True).start()
    wait_for(lambda: len(service.questions) > waiting)
    return answer


def test_a_question_is_answered_between_two_batches_of_a_long_job(
    service: Service, steps: Callable[..., Steps]
) -> None:
    work = steps()
    job = service.submit("key", work)
    work.go()
    wait_for(lambda: work.passed == 1)
    answers = [asked(service, lambda k=k: (k, threading.get_ident(), work.done), f"viewer {k}") for k in range(3)]
    assert not any(answer.done() for answer in answers)
    work.go()
    found = [answer.result(SOON) for answer in answers]
    assert found == [(k, service.worker.ident, 2) for k in range(3)]
    assert job.state == "running"
    work.go()
    wait_for(lambda: work.passed == 3)


def test_a_question_is_answered_at_once_when_nothing_runs(service: Service) -> None:
    assert service.ask(lambda: threading.current_thread().name) == "device"
    job = service.submit("key", nothing)
    assert ended(job).state == "done"
    assert service.ask(threading.get_ident) == service.worker.ident


def test_a_question_goes_before_the_jobs_that_wait(service: Service, steps: Callable[..., Steps]) -> None:
    first, second = steps(1), steps(1)
    service.submit("first", first)
    service.submit("second", second)
    assert first.begun.wait(SOON)
    answer = asked(service, second.begun.is_set)
    first.go()
    assert answer.result(SOON) is False


def test_an_exception_of_a_question_goes_to_who_asked_and_harms_nobody_else(
    service: Service, steps: Callable[..., Steps]
) -> None:
    def fail() -> None:
        raise InputError("no such picture")

    with pytest.raises(InputError, match="no such picture"):
        service.ask(fail)
    with pytest.raises(SystemExit):
        service.ask(lambda: (_ for _ in ()).throw(SystemExit(1)))
    work = steps(2)
    job = service.submit("key", work)
    assert work.begun.wait(SOON)
    answer = asked(service, fail)
    other = asked(service, lambda: 5)
    work.go(2)
    assert isinstance(answer.exception(SOON), InputError)
    assert other.result(SOON) == 5
    assert ended(job).state == "done"


# Taking turns


def test_viewers_take_turns_whatever_each_has_waiting(service: Service, steps: Callable[..., Steps]) -> None:
    first, order = steps(1), []
    service.submit("first", first, "greedy")
    assert first.begun.wait(SOON)
    keys = [("greedy", k) for k in range(3)] + [("modest", 0), ("late", 0), ("modest", 1)]
    found = [
        service.submit(f"{viewer} {k}", lambda tick, viewer=viewer, k=k: order.append((viewer, k)), viewer)
        for viewer, k in keys
    ]
    assert [service.position(job) for job in found] == [1, 4, 6, 2, 3, 5]
    first.go()
    assert {ended(job).state for job in found} == {"done"}
    assert order == [("greedy", 0), ("modest", 0), ("late", 0), ("greedy", 1), ("modest", 1), ("greedy", 2)]


def test_a_viewer_with_enough_waiting_is_refused_and_keeps_nobody_out(
    service: Service, steps: Callable[..., Steps]
) -> None:
    work = steps(1)
    service.submit("running", work, "greedy")
    assert work.begun.wait(SOON)
    for k in range(jobs.WAITING_EACH):
        service.submit(f"{k}", nothing, "greedy")
    with pytest.raises(InputError, match="of your runs are waiting; cancel one, or wait until one has begun"):
        service.submit("one more", nothing, "greedy")
    job = service.submit("small", nothing, "modest")
    assert service.position(job) == 2
    work.go()
    assert ended(job).state == "done"
    wait_for(lambda: not len(service.queue))
    assert ended(service.submit("one more", nothing, "greedy")).state == "done"


def test_who_joins_a_run_that_waits_does_not_wait_for_the_turn_of_who_came_first(
    service: Service, steps: Callable[..., Steps]
) -> None:
    work = steps(1)
    service.submit("running", work, "greedy")
    assert work.begun.wait(SOON)
    found = [service.submit(f"{k}", nothing, "greedy") for k in range(3)]
    assert service.submit("2", nothing, "modest") is found[2]
    assert [service.position(job) for job in found] == [1, 3, 2]
    found[2].leave("greedy")
    assert not found[2].cancelled
    work.go()
    assert {ended(job).state for job in found} == {"done"}


def test_a_long_job_goes_on_between_two_questions_of_one_viewer(service: Service, steps: Callable[..., Steps]) -> None:
    work = steps()
    service.submit("key", work)
    assert work.begun.wait(SOON)
    answers = [asked(service, lambda: work.done, "greedy") for _ in range(3)]
    other = asked(service, lambda: work.done, "modest")
    work.go(3)
    assert [answer.result(SOON) for answer in answers] == [1, 2, 3]
    assert other.result(SOON) == 1


def test_questions_are_bounded_for_a_viewer_and_for_all(
    service: Service, steps: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "QUESTIONS", jobs.QUESTIONS_EACH + 2)
    work = steps()
    service.submit("key", work)
    assert work.begun.wait(SOON)
    answers = [asked(service, lambda: "yes", "greedy") for _ in range(jobs.QUESTIONS_EACH)]
    with pytest.raises(InputError, match="of your questions are waiting; ask again when one is answered"):
        service.ask(lambda: "no", "greedy")
    answers += [asked(service, lambda: "yes", f"modest {k}") for k in range(2)]
    with pytest.raises(InputError, match="questions are waiting; ask again in a minute"):
        service.ask(lambda: "no", "late")
    work.go(jobs.QUESTIONS_EACH)
    assert {answer.result(SOON) for answer in answers} == {"yes"}


def test_what_prepares_the_worker_comes_before_each_piece_of_work(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    service = Service(lambda: done.append("prepared"))
    service.ask(lambda: done.append("question"))
    ended(service.submit("key", lambda tick: done.append("job")))
    assert done == ["prepared", "question", "prepared", "job"]
    broken = Service(lambda: (_ for _ in ()).throw(ImportError("torch is broken")))
    assert "went wrong" in failed(broken, InputError("never raised"))
    with pytest.raises(ImportError):
        broken.ask(lambda: None)


# What goes wrong


def failed(service: Service, error: BaseException) -> str:
    """The sentence that a viewer sees after an exception in a job."""

    def fail(tick: Tick) -> None:
        raise error

    job = ended(service.submit("key", fail))
    assert job.state == "failed"
    return job.error


def problems(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the log says beyond that jobs begin and end."""
    return [record for record in caplog.records if record.levelno > logging.INFO]


def test_what_a_user_can_put_right_is_shown_as_it_is(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    assert failed(service, InputError("There is no model 'x'; name another.")) == "There is no model 'x'; name another."
    assert not problems(caplog)


@pytest.mark.parametrize("error", [ValueError("/home/someone/secret"), KeyError("secret"), SystemExit("secret")])
def test_what_should_not_happen_is_shown_as_a_number_that_the_log_explains(
    service: Service, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    sentences = [failed(service, error) for _ in range(2)]
    assert not any("secret" in sentence or type(error).__name__ in sentence for sentence in sentences)
    numbers = [re.fullmatch(r"Something went wrong .* under ([0-9a-f]{8})\.", sentence)[1] for sentence in sentences]
    assert numbers[0] != numbers[1]
    for number, record in zip(numbers, problems(caplog), strict=True):
        assert record.levelno == logging.ERROR
        assert number in record.getMessage()
        assert record.exc_info[1] is error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB)."),
        MemoryError("secret"),
    ],
    ids=["cuda", "mps", "numpy"],
)
def test_a_want_of_memory_names_the_batch_size(
    service: Service, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    sentence = failed(service, error)
    assert sentence == "The device ran out of memory; choose a smaller batch size and run again."
    assert not problems(caplog)


def test_a_failed_job_holds_nothing_that_it_used(service: Service) -> None:
    class Large:
        """Stands for the tensors of a batch."""

    seen = []

    def fail(tick: Tick) -> None:
        batch = Large()
        seen.append(weakref.ref(batch))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert ended(service.submit("key", fail)).state == "failed"
    service.ask(lambda: None)  # by now the worker has left the job
    gc.collect()
    assert seen[0]() is None


def test_the_worker_lives_on_after_whatever_a_job_raises(service: Service) -> None:
    workers = set()
    for error in (InputError("no"), ValueError("no"), MemoryError(), SystemExit(1)):
        failed(service, error)
        workers.add(service.worker)
    assert len(workers) == 1
    assert ended(service.submit("other", nothing)).state == "done"
    assert service.worker.is_alive()


# How much is kept


def test_a_full_queue_is_refused_in_one_sentence_and_empties_again(
    service: Service, steps: Callable[..., Steps]
) -> None:
    work = steps(1)
    running = service.submit("running", work)
    assert work.begun.wait(SOON)
    waiting = [service.submit(f"{number}", nothing, f"viewer {number}") for number in range(jobs.WAITING)]
    with pytest.raises(InputError) as refused:
        service.submit("one more", nothing)
    assert str(refused.value) == f"{jobs.WAITING} runs are waiting; try again when some have finished."
    assert service.find("one more") is None
    assert service.submit("running", nothing) is running  # joining needs no place
    assert service.submit("5", nothing) is waiting[5]
    work.go()
    assert ended(waiting[-1]).state == "done"
    assert ended(service.submit("one more", nothing)).state == "done"


def test_the_oldest_of_what_is_over_is_forgotten(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "REMEMBERED", 3)
    for number in range(10):
        ended(service.submit(f"{number}", nothing))
    assert [number for number in range(10) if service.find(f"{number}")] == [6, 7, 8, 9]


def test_what_ran_again_is_remembered_as_new(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "REMEMBERED", 2)
    failed(service, InputError("no"))
    ended(service.submit("other", nothing))
    ended(service.submit("key", nothing))
    for number in range(2):
        ended(service.submit(f"{number}", nothing))
    assert service.find("other") is None
    assert service.find("key") is not None


def test_a_live_job_is_never_forgotten(
    service: Service, steps: Callable[..., Steps], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "REMEMBERED", 0)
    work = steps(1)
    job = service.submit("key", work)
    for number in range(5):
        service.submit(f"{number}", nothing, f"viewer {number}")
    assert service.find("key") is job
    work.go()
    assert ended(job).state == "done"
    assert Service().find("key") is None


def test_a_viewer_who_leaves_does_not_stop_what_another_watches() -> None:
    service, started, go_on = Service(), threading.Event(), threading.Event()

    def work(tick: Tick) -> None:
        started.set()
        go_on.wait(30)
        tick(Progress(1, 1, {}))

    job = service.submit("key", work, "first")
    assert service.submit("key", work, "second") is job
    assert started.wait(30)
    assert not job.leave("first")
    assert not job.cancelled
    assert job.leave("second")
    go_on.set()
    service.ask(lambda: None)
    assert job.state == "cancelled"
