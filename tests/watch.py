"""Who opens, lists or changes files, and who starts processes, seen through Python's audit events."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from oms_core.errors import InputError
from oms_core.survey import OWNERS, Look, Lookers, look

CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime",
    "shutil.copyfile", "shutil.move", "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp", "sqlite3.connect",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect",
}  # fmt: skip
LOOKS = {"os.scandir", "os.listdir", "os.walk", "os.chdir", "glob.glob", "glob.glob/2"}
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Seen(NamedTuple):
    """One event.

    Attributes:
        event: the name that Python gives it.
        path: its first argument as text.
        writes: whether it may change something.
        thread: who did it.
    """

    event: str
    path: str
    writes: bool
    thread: int


watchers: list[list[Seen]] = []


def note(event: str, given: tuple[Any, ...]) -> None:
    """The hook; it stays for good, and does nothing while nobody watches."""
    if not watchers or (event != "open" and event not in CHANGES and event not in LOOKS):
        return
    path = given[0] if given else ""
    writes = event in CHANGES
    if event == "open":
        mode, flags = given[1], given[2]
        writes = bool(flags & TO_WRITE) if isinstance(flags, int) else bool({*(mode or "")} & {*"wax+"})
    path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    for seen in watchers:
        seen.append(Seen(event, path, writes, threading.get_ident()))


sys.addaudithook(note)


@contextmanager
def watched() -> Iterator[list[Seen]]:
    """What is opened, listed or changed meanwhile, by any thread."""
    seen: list[Seen] = []
    watchers.append(seen)
    try:
        yield seen
    finally:
        watchers[:] = [other for other in watchers if other is not seen]


def look_here(
    read: Callable[[int], bytes], count: int, see: Callable[[bytes], Any] = look, lookers: Lookers = OWNERS
) -> Iterator[Any]:
    """As `oms_core.survey.look_through`, but in this process, where what the decoder does is seen."""
    for number in range(count):
        try:
            yield see(read(number))
        except InputError as error:
            yield Look("", str(error))
