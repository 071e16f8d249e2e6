"""Looking at every picture of a set once, in processes of their own: on all cores, and a picture that crashes a
decoder ends a process that nothing else depends on."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, Future
from typing import NamedTuple

from oms_core.decode import decode
from oms_core.errors import InputError

CHUNK, CHUNK_BYTES = 64, 32 * 2**20  # sent to a process at once
AHEAD = 8  # chunks that are sent before the first answer is waited for
IDLE = 60  # seconds after which the processes end
CRASHES = "it crashes the decoder; remove it"


class Look(NamedTuple):
    """What is seen of a picture: the SHA-256 of its file, and why it cannot be used, if so."""

    image: str
    reason: str


def look(read: Callable[[], bytes]) -> Look:
    """Read a picture and try to decode it."""
    image = ""
    try:
        data = read()
        image = sha256(data)
        decode(data)
    except InputError as error:
        return Look(image, str(error))
    return Look(image, "")


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def look_through(read: Callable[[int], bytes], count: int) -> Iterator[Look]:
    """Look at the pictures 0 ... count - 1, in order.

    Args:
        read: the bytes of a picture; it may raise `InputError`.
        count: how many there are.
    """
    pending: deque[tuple[list[bytes | str], Future | None]] = deque()
    for chunk in chunks(read, count):
        pending.append((chunk, submitted(chunk)))
        if len(pending) > AHEAD:
            yield from looked(*pending.popleft())
    while pending:
        yield from looked(*pending.popleft())


def chunks(read: Callable[[int], bytes], count: int) -> Iterator[list[bytes | str]]:
    """The pictures in lists of a bounded size; in place of one that cannot be read stands the reason."""
    chunk: list[bytes | str] = []
    for number in range(count):
        try:
            chunk.append(read(number))
        except InputError as error:
            chunk.append(str(error))
        if len(chunk) == CHUNK or sum(map(len, chunk)) > CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def submitted(chunk: list[bytes | str]) -> Future | None:
    """Send a chunk to the processes; None if another chunk has just ended them."""
    from loky import get_reusable_executor

    try:
        return get_reusable_executor(timeout=IDLE).submit(look_at_all, chunk)
    except BrokenExecutor:
        return None


def look_at_all(chunk: list[bytes | str]) -> list[Look]:
    """Runs in a process of its own."""
    return [look(lambda one=one: one) if isinstance(one, bytes) else Look("", one) for one in chunk]


def looked(chunk: list[bytes | str], answer: Future | None) -> list[Look]:
    """What was found; if the process died, perhaps of another chunk, each picture is looked at alone."""
    try:
        return answer.result() if answer else [*alone(chunk)]
    except BrokenExecutor:
        return [*alone(chunk)]


def alone(chunk: list[bytes | str]) -> Iterator[Look]:
    """Look at pictures one by one in a process that nobody else uses, a new one after each that crashes it."""
    from loky import ProcessPoolExecutor

    process = ProcessPoolExecutor(1)
    for one in chunk:
        try:
            yield process.submit(look_at_all, [one]).result()[0]
        except BrokenExecutor:
            yield Look(sha256(one), CRASHES)
            process = ProcessPoolExecutor(1)
    process.shutdown()
