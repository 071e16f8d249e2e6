"""What the server holds of files that visitors send, until a page takes them: in memory alone, and not for long.

Streamlit keeps a file until its tab is closed and somebody else comes, without any limit, and Starlette's parser puts
what is larger than 1 MB on disk. `install` changes both in a running server.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message
from streamlit import config
from streamlit.runtime import Runtime
from streamlit.runtime.memory_session_storage import MemorySessionStorage
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.uploaded_file_manager import UploadedFileRec

from oms_core.uploads import MOST, QUOTA

HELD = 2**30  # bytes of all visitors
TAKEN_IN = 60.0  # seconds after a visitor's last file in which a page must take them all
LONGEST = 600.0  # seconds after his first
SENT_IN = 300.0  # seconds that a file may be on its way
SWEEP = 5.0  # seconds between two looks for what nobody takes
original = Request._get_form


def install() -> None:
    """Put the limits into the server that runs, if one does; once."""
    MultiPartParser.spool_max_size = largest() + 2**20  # nothing that is let in is put on disk
    files = Runtime.instance().uploaded_file_mgr if Runtime.exists() else None
    if type(files) is not MemoryUploadedFileManager:  # in a test of a page there is no server
        return
    limit(files)
    Request._get_form = parsed
    threading.Thread(target=sweep_forever, args=(files,), name="receiving", daemon=True).start()


def largest() -> int:
    """Bytes of the largest file that Streamlit lets in."""
    return config.get_option("server.maxUploadSize") * 2**20


class Receiving(MemoryUploadedFileManager):
    """Streamlit's files that no page has taken yet, and those that are on their way, within limits.

    Attributes:
        sending: session of each file that is on its way, and the bytes that have come of it.
        came: when the first and the last file of a session came.
        stirred: whether a file came or went since memory was last given back.
    """

    sending: dict[object, tuple[str, int]]
    came: dict[str, tuple[float, float]]
    stirred: bool

    def add_file(self, session_id: str, file: UploadedFileRec) -> None:
        """Hold a file.

        Raises:
            HTTPException: 413, there is no room for it.
        """
        self.refuse_beyond(session_id, len(file.data))
        super().add_file(session_id, file)
        now = time.monotonic()
        self.came[session_id] = self.came.get(session_id, (now, now))[0], now
        self.stirred = True

    def remove_session_files(self, session_id: str) -> None:
        super().remove_session_files(session_id)
        self.came.pop(session_id, None)
        self.stirred = True

    @contextmanager
    def on_its_way(self, session_id: str, size: int) -> Iterator[Callable[[int], None]]:
        """Count a file while it comes: what has come of it, as who only announces one must not keep others out.

        Yields:
            What is to be called with the bytes of each piece.

        Raises:
            HTTPException: 413, there is no room for it; 408, it took too long; 400, it broke off.
        """
        self.refuse_beyond(session_id, size)
        place = object()
        self.sending[place] = session_id, 0

        def came(count: int) -> None:
            self.refuse_beyond(session_id, count, another=False)
            self.sending[place] = session_id, self.sending[place][1] + count

        try:
            yield came
        except TimeoutError as error:
            raise HTTPException(408, "The file took too long.") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "The file broke off.") from error
        finally:
            del self.sending[place]
            self.stirred = True

    def refuse_beyond(self, session_id: str, size: int, another: bool = True) -> None:
        """Refuse bytes of a session, of another file or not, that would go beyond a limit."""
        with self._lock:
            held = [(session, len(one.data)) for session, of in self.file_storage.items() for one in of.values()]
        held += [*self.sending.values()]
        own = [one for session, one in held if session == session_id]
        full = another and len(own) >= MOST
        if full or sum(own) + size > QUOTA or sum(one for _, one in held) + size > HELD:
            raise HTTPException(413, "Too much waits to be taken by a page.")

    def sweep(self, runtime: Runtime) -> None:
        """Drop what no page took in time, or whose tab is closed."""
        now, senders = time.monotonic(), {session for session, _ in [*self.sending.values()]}
        for session, (first, last) in [*self.came.items()]:
            late = now > first + LONGEST or (now > last + TAKEN_IN and session not in senders)
            if late or not runtime.is_active_session(session):
                self.remove_session_files(session)


def limit(files: MemoryUploadedFileManager) -> None:
    """Make a `Receiving` of what Streamlit made, with the files that it holds already."""
    now = time.monotonic()
    files.sending, files.came, files.stirred = {}, dict.fromkeys([*files.file_storage], (now, now)), True
    files.__class__ = Receiving


async def parsed(request: Request, **options: int) -> FormData:
    """What a form holds, as `Request._get_form` finds it, once there is room for it and if it comes in time.

    Raises:
        HTTPException: see `Receiving.on_its_way`.
    """
    size = int(request.headers.get("content-length", largest()))
    receive = request._receive
    with Runtime.instance().uploaded_file_mgr.on_its_way(request.path_params.get("session_id", ""), size) as came:

        async def counted() -> Message:
            message = await receive()
            came(len(message.get("body", b"")))
            return message

        request._receive = counted
        async with asyncio.timeout(SENT_IN):
            return await original(request, **options)


def sweep_forever(files: Receiving) -> None:
    """Drop what nobody takes, let go of visits that are over, and give the memory back, again and again."""
    runtime = Runtime.instance()
    while True:
        time.sleep(SWEEP)
        files.sweep(runtime)
        forgotten = forget_visits(runtime._session_mgr._session_storage)
        if asyncio.run_coroutine_threadsafe(forgotten, runtime._get_async_objs().eventloop).result():
            gc.collect()  # a visit holds itself
            files.stirred = True
        if files.stirred:
            files.stirred = False
            give_back()


async def forget_visits(storage: MemorySessionStorage) -> int:
    """Let go of the closed visits that can no longer be resumed, on the thread that opens and closes them.

    Returns:
        How many they were.
    """
    forgotten = storage._cache.expire()
    for _, visit in forgotten:
        visit.session.shutdown()
        visit.session.session_state.clear()  # Streamlit holds the last visit until another one comes
    return len(forgotten)


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
        trim(0)
