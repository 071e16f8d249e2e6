"""Looking at every picture of a set once, in processes of their own: on all cores, and a picture that crashes a
decoder ends a process that nothing else depends on."""

import atexit
import hashlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from functools import lru_cache
from typing import NamedTuple

from oms_core.decode import decode
from oms_core.errors import InputError

CHUNK, CHUNK_BYTES = 64, 32 * 2**20  # sent to a process at once
AHEAD = 3  # chunks for each process that are sent before the first answer is waited for
IDLE = 60  # seconds after which the processes end
LONGEST = 15  # seconds of a CPU that a picture may take; the slowest that is allowed takes 5 on a slow one
CRASHES = "it crashes the decoder, or never leaves it; remove it"


class Look(NamedTuple):
    """What is seen of a picture: the SHA-256 of its file, and why it cannot be used, if so."""

    image: str
    reason: str


def look(data: bytes) -> Look:
    """Try to decode a picture."""
    image = sha256(data)
    try:
        decode(data)
    except InputError as error:
        return Look(image, str(error))
    return Look(image, "")


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def look_through(read: Callable[[int], bytes], count: int, together: int = CHUNK, processes: int = 0) -> Iterator[Look]:
    """Look at the pictures 0 ... count - 1, in order.

    Args:
        read: the bytes of a picture; it may raise `InputError`.
        count: how many there are.
        together: how many are sent to a process at once; few of them are soon answered, many of them sooner in all.
        processes: how many look, for all callers who name this number; 0 for one on each core.

    Raises:
        InputError: no process can be started.
    """
    processes = processes or cores()
    pending: deque[tuple[list[bytes | str], Future]] = deque()
    apart = Apart()
    try:
        for chunk in chunks(read, count, together):
            pending.append((chunk, submitted(chunk, processes)))
            if len(pending) > AHEAD * processes:
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


pools: dict[int, Executor] = {}  # by number of processes, each for all threads
atexit.register(pools.clear)  # while the modules that they need are still whole
guard = threading.Lock()


def submitted(chunk: list[bytes | str], processes: int) -> Future:
    """Send a chunk to the processes, to new ones if another chunk has just ended them.

    Raises:
        InputError: no process can be started.
    """
    with guard:
        try:
            if processes in pools:
                return pools[processes].submit(look_at_all, chunk)
        except BrokenExecutor:
            pass
        pools[processes] = started(processes)
        return pools[processes].submit(look_at_all, chunk)


def started(processes: int) -> Executor:
    """New processes, which end when they have had nothing to do for a while.

    Raises:
        InputError: the system refuses.
    """
    from loky import ProcessPoolExecutor

    try:
        pool = ProcessPoolExecutor(processes, timeout=IDLE)
        pool.submit(int)  # they start with the first task
        return pool
    except OSError as error:
        raise InputError("This machine can start no process to look at pictures now; try again later.") from error


@lru_cache(1)
def cores() -> int:
    """How many CPU cores this process may use."""
    from loky import cpu_count

    return cpu_count()


def look_at_all(chunk: list[bytes | str]) -> list[Look]:
    """Runs in a process of its own."""
    return [look_in_time(one) if isinstance(one, bytes) else Look("", one) for one in chunk]


def look_in_time(data: bytes) -> Look:
    """Look at a picture; if that takes too long, the system ends the process, whatever the decoder is at."""
    if not hasattr(signal, "setitimer"):  # Windows
        return look(data)
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    try:
        return look(data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def looked(chunk: list[bytes | str], answer: Future, apart: "Apart") -> list[Look]:
    """What was found; if the process died, perhaps of another chunk, another one looks again."""
    try:
        return answer.result()
    except BrokenExecutor:
        return apart.look(chunk)


class Apart:
    """A process that nobody else uses, a new one after each picture that crashes it."""

    def __init__(self) -> None:
        self.process: Executor | None = None

    def look(self, chunk: list[bytes | str]) -> list[Look]:
        """Look at pictures together, and one by one if that ends the process.

        Raises:
            InputError: no process can be started.
        """
        new = self.process is None
        self.process = self.process or started(1)
        try:
            return self.process.submit(look_at_all, chunk).result()
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
