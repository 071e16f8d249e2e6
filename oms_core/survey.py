"""Looking at every picture of a set once, in processes of their own: on all cores, and a picture that crashes a
decoder ends a process that nothing else depends on. What a visitor sends is decoded there for good: what comes back
is a PNG of the same pixels."""

import atexit
import hashlib
import io
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from oms_core.decode import MAX_BYTES, decode
from oms_core.errors import InputError

CHUNK, CHUNK_BYTES = 64, 32 * 2**20  # sent to a process at once
IDLE = 60  # seconds after which the processes end
LONGEST = 15  # seconds of a CPU that a picture may take; the slowest that is allowed takes 5 on a slow one
IN_TIME = 5.0  # seconds of a CPU in which a picture that is kept must be decoded
GIVES_WAY = 10  # niceness of the processes that look at what visitors send
CRASHES = "it crashes the decoder, or never leaves it; remove it"
SLOW = f"it takes more than {IN_TIME:.0f} seconds to decode; save it again"


class Look(NamedTuple):
    """What is seen of a picture: the SHA-256 of its file, and why it cannot be used, if so."""

    image: str
    reason: str


class Kept(NamedTuple):
    """A picture that was decoded for good.

    Attributes:
        image, reason: see `Look`.
        png: the picture in mode L or RGB; empty if it cannot be used.
        notes: what was changed on the way, see `oms_core.decode.decode`.
        seconds: of a CPU that it took.
    """

    image: str
    reason: str
    png: bytes = b""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


Seen = Look | Kept


class Lookers(NamedTuple):
    """Processes that look at pictures, for all callers who name equal ones.

    Attributes:
        processes: how many; 0 for one on each core.
        ahead: chunks for each process that a caller sends before its first answer is waited for.
        together: pictures of a chunk; few of them are soon answered, many of them sooner in all.
        nice: by how much they give way to other processes.
    """

    processes: int = 0
    ahead: int = 3
    together: int = CHUNK
    nice: int = 0


OWNERS = Lookers()
VISITORS = Lookers(processes=2, ahead=1, together=1, nice=GIVES_WAY)


def look(data: bytes) -> Look:
    """Try to decode a picture."""
    image = sha256(data)
    try:
        decode(data)
    except InputError as error:
        return Look(image, str(error))
    return Look(image, "")


def keep(data: bytes) -> Kept:
    """Decode a picture, which must not take long, and write its pixels anew."""
    image, started = sha256(data), time.process_time()
    try:
        with in_time(IN_TIME):
            picture, notes = decode(data)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)
        if buffer.tell() > MAX_BYTES:
            raise InputError(f"its pixels take more than {MAX_BYTES >> 20} MB; make it smaller")
    except InputError as error:
        return Kept(image, str(error), seconds=time.process_time() - started)
    return Kept(image, "", buffer.getvalue(), (*notes,), time.process_time() - started)


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """Stop what takes longer than some seconds of a CPU, as soon as it comes back to Python.

    Raises:
        InputError: it took longer.
    """

    def stop(*_: object) -> None:
        raise InputError(SLOW)

    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)  # again and again: a decoder may swallow the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def look_through(
    read: Callable[[int], bytes], count: int, see: Callable[[bytes], Any] = look, lookers: Lookers = OWNERS
) -> Iterator[Any]:
    """Look at the pictures 0 ... count - 1, in order.

    Args:
        read: the bytes of a picture; it may raise `InputError`.
        count: how many there are.
        see: what is done with each, `look` or `keep`.
        lookers: who looks.

    Yields:
        What `see` returns; a `Look` in place of what could not be read, or ended its process.

    Raises:
        InputError: no process can be started.
    """
    lookers = lookers._replace(processes=lookers.processes or cores())
    pending: deque[tuple[list[bytes | str], Future]] = deque()
    apart = Apart(see, lookers)
    try:
        for chunk in chunks(read, count, lookers.together):
            pending.append((chunk, submitted(chunk, see, lookers)))
            if len(pending) > lookers.ahead * lookers.processes:
                yield from looked(*pending.popleft(), apart)
        while pending:
            yield from looked(*pending.popleft(), apart)
    finally:
        apart.close()


def chunks(read: Callable[[int], bytes], count: int, together: int) -> Iterator[list[bytes | str]]:
    """The pictures in lists of a bounded size; in place of one that cannot be read stands the reason."""
    chunk: list[bytes | str] = []
    for number in range(count):
        try:
            chunk.append(read(number))
        except InputError as error:
            chunk.append(str(error))
        if len(chunk) == together or sum(map(len, chunk)) > CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


pools: dict[Lookers, Executor] = {}  # each for all threads
atexit.register(pools.clear)  # while the modules that they need are still whole
guard = threading.Lock()


def submitted(chunk: list[bytes | str], see: Callable[[bytes], Seen], lookers: Lookers) -> Future:
    """Send a chunk to the processes, to new ones if another chunk has just ended them.

    Raises:
        InputError: no process can be started.
    """
    with guard:
        try:
            if lookers in pools:
                return pools[lookers].submit(look_at_all, chunk, see)
        except BrokenExecutor:
            pass
        pools[lookers] = started(lookers)
        return pools[lookers].submit(look_at_all, chunk, see)


def started(lookers: Lookers) -> Executor:
    """New processes, which end when they have had nothing to do for a while.

    Raises:
        InputError: the system refuses.
    """
    from loky import ProcessPoolExecutor

    try:
        pool = ProcessPoolExecutor(lookers.processes, timeout=IDLE, initializer=give_way, initargs=(lookers.nice,))
        pool.submit(int)  # they start with the first task
        return pool
    except OSError as error:
        raise InputError("This machine can start no process to look at pictures now; try again later.") from error


def give_way(nice: int) -> None:
    """Runs once in each process."""
    if hasattr(os, "nice"):  # not on Windows
        os.nice(nice)


@lru_cache(1)
def cores() -> int:
    """How many CPU cores this process may use."""
    from loky import cpu_count

    return cpu_count()


def look_at_all(chunk: list[bytes | str], see: Callable[[bytes], Seen]) -> list[Seen]:
    """Runs in a process of its own."""
    return [look_in_time(one, see) if isinstance(one, bytes) else Look("", one) for one in chunk]


def look_in_time(data: bytes, see: Callable[[bytes], Seen]) -> Seen:
    """Look at a picture; if that takes too long, the system ends the process, whatever the decoder is at."""
    if not hasattr(signal, "setitimer"):  # Windows
        return see(data)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        return see(data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def looked(chunk: list[bytes | str], answer: Future, apart: "Apart") -> list[Seen]:
    """What was found; if the process died, perhaps of another chunk, another one looks again."""
    try:
        return answer.result()
    except BrokenExecutor:
        return apart.look(chunk)


class Apart:
    """A process that nobody else uses, a new one after each picture that crashes it.

    Args:
        see, lookers: see `look_through`.
    """

    def __init__(self, see: Callable[[bytes], Seen], lookers: Lookers) -> None:
        self.see, self.lookers = see, lookers._replace(processes=1)
        self.process: Executor | None = None

    def look(self, chunk: list[bytes | str]) -> list[Seen]:
        """Look at pictures together, and one by one if that ends the process.

        Raises:
            InputError: no process can be started.
        """
        new = self.process is None
        self.process = self.process or started(self.lookers)
        try:
            return self.process.submit(look_at_all, chunk, self.see).result()
        except BrokenExecutor:
            self.process = None
        if len(chunk) > 1:
            return [self.look([one])[0] for one in chunk]
        if not new:  # what came before may have damaged it
            return self.look(chunk)
        return [Look(sha256(one), CRASHES) if isinstance(one, bytes) else Look("", one) for one in chunk]

    def close(self) -> None:
        if self.process:
            self.process.shutdown()
