"""What one visitor can take from the others: memory, the disk, the device, and their turn. Little, and not for long."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
from browser import Served, serving
from PIL import Image
from streamlit.runtime.app_session import AppSession
from streamlit.runtime.memory_session_storage import MemorySessionStorage
from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager
from streamlit.runtime.session_manager import SessionInfo
from streamlit.runtime.state import SessionState
from streamlit.runtime.uploaded_file_manager import UploadedFileRec
from streamlit.runtime.websocket_session_manager import WebsocketSessionManager
from test_uploads import JPEG, TAKEN, built, packed, saved
from wire import SOON, Wire

from oms_core import libraries, survey, uploads
from oms_core.compute import unkept
from oms_core.decode import Profile, decode
from oms_core.edits import Edit, with_edit
from oms_core.errors import InputError
from oms_core.images import ImageSet, collected
from oms_core.layouts import Listed, Rows
from oms_core.location import Location
from oms_core.run import Run, about, plan
from oms_core.survey import SLOW, Kept, Look, keep, look
from oms_core.uploads import Album, as_seen, received
from pages.common import receiving
from pages.common.pictures import small

ROOT = Path(__file__).resolve().parent.parent
FRESH = int(os.environ.get("OMS_FRESH", "2"))  # servers that are started to be asked at once
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident size is read from /proc")
MB = 2**20


# A real server with small limits, which notes every file that is opened to be written

NARROW = f"""
import os, sys
if "streamlit" in sys.orig_argv:
    import oms_core.uploads, pages.common.receiving as receiving
    receiving.QUOTA, receiving.HELD, receiving.MOST = {64 * MB}, {80 * MB}, 12
    receiving.TAKEN_IN, receiving.SENT_IN, receiving.SWEEP = 3.0, 1.0, 0.1
    log = os.open(os.environ["WRITES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def note(event, given):
        if event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR):
            os.write(log, (str(given[0]) + "\\n").encode())
        if event.startswith("tempfile."):
            os.write(log, (event + "\\n").encode())
    sys.addaudithook(note)
    open(os.devnull, "w").close()  # which is noted
"""


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "sitecustomize.py").write_text(NARROW)
    path = os.pathsep.join([str(folder), str(ROOT)])
    with serving(folder, PYTHONPATH=path, WRITES=str(folder / "writes"), OMP_NUM_THREADS="1") as served:
        yield served, folder / "writes"


@pytest.fixture
def visit(narrow: tuple[Served, Path]) -> Iterator[Callable[[], Wire]]:
    """Opens the start page, as often as it is called."""
    visits: list[Wire] = []

    def open_page() -> Wire:
        visits.append(Wire(narrow[0].address))
        visits[-1].run()
        return visits[-1]

    yield open_page
    for one in visits:
        one.close()


def resident(process: int) -> float:
    """MB of memory that a process has."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB


def wait_for(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_upload_of_any_size_opens_no_file(narrow: tuple[Served, Path], visit: Callable[[], Wire]) -> None:
    one = visit()
    before = narrow[1].read_text().splitlines()
    for size in (1000, 5 * MB, 50 * MB):
        assert one.put(os.urandom(size)) == 204
    assert narrow[1].read_text().splitlines() == before
    assert os.devnull in before


def test_files_that_no_page_takes_are_bounded_for_a_visitor_and_for_all(visit: Callable[[], Wire]) -> None:
    one, other = visit(), visit()
    wait_for(lambda: one.put(bytes(30 * MB)) == 204)
    assert one.put(bytes(30 * MB)) == 204
    assert one.put(bytes(30 * MB)) == 413
    assert other.put(bytes(30 * MB)) == 413  # all together
    assert other.put(bytes(10 * MB)) == 204
    small_ones = [other.put(b"x") for _ in range(14)]
    assert small_ones == [204] * 11 + [413] * 3
    one.close()
    wait_for(lambda: visit().put(bytes(40 * MB)) == 204)  # who closed the tab holds nothing


@LINUX
def test_what_no_page_takes_is_freed_without_another_visitor(
    narrow: tuple[Served, Path], visit: Callable[[], Wire]
) -> None:
    one = visit()
    wait_for(lambda: one.put(b"x") == 204)
    process = narrow[0].process
    wait_for(lambda: one.put(b"x") == 413)  # the visitor's twelve
    wait_for(lambda: one.put(bytes(MB)) == 204)  # dropped in time
    before = resident(process)
    assert one.put(os.urandom(60 * MB)) == 204
    assert resident(process) > before + 50
    wait_for(lambda: resident(process) < before + 15)


def test_a_file_that_comes_too_slowly_is_given_up(narrow: tuple[Served, Path], visit: Callable[[], Wire]) -> None:
    one = visit()
    headers, body = one.form(bytes(1000))
    headers |= {"Host": f"127.0.0.1:{narrow[0].port}", "Content-Length": str(len(body))}
    lines = [f"PUT {one.places(1)[0]} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    with socket.create_connection(("127.0.0.1", narrow[0].port), timeout=SOON) as slow:
        slow.sendall("\r\n".join([*lines, "", ""]).encode() + body[:500])
        assert b" 408 " in slow.recv(1000).splitlines()[0]


def test_files_that_are_only_announced_keep_nobody_out_and_break_off_quietly(
    narrow: tuple[Served, Path], visit: Callable[[], Wire]
) -> None:
    open_ones = []
    for one in (visit(), visit(), visit(), visit()):
        headers, _ = one.form(b"")
        headers |= {"Host": f"127.0.0.1:{narrow[0].port}", "Content-Length": str(60 * MB)}
        lines = [f"{name}: {value}" for name, value in headers.items()]
        for place in one.places(4):
            open_ones.append(socket.create_connection(("127.0.0.1", narrow[0].port), timeout=SOON))
            open_ones[-1].sendall("\r\n".join([f"PUT {place} HTTP/1.1", *lines, "", "--"]).encode())
    assert visit().put(b"x") == 204
    for connection in open_ones:
        connection.close()
    assert visit().put(b"x") == 204
    assert "Traceback" not in narrow[0].log.read_text()


# What the limits rest on in Streamlit


def test_streamlit_is_as_the_limits_expect_it() -> None:
    manager = MemoryUploadedFileManager("/upload")
    assert {"file_storage", "_lock"} <= vars(manager).keys()
    assert callable(receiving.original)


class Open:
    """A server of which some tabs are open."""

    def __init__(self, *sessions: str) -> None:
        self.sessions = sessions

    def is_active_session(self, session: str) -> bool:
        return session in self.sessions


@pytest.fixture
def files() -> receiving.Receiving:
    manager = MemoryUploadedFileManager("/upload")
    receiving.limit(manager)
    return manager


def test_files_that_came_before_the_limits_are_dropped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = MemoryUploadedFileManager("/upload")
    put(manager, "early", "a", 10)
    receiving.limit(manager)
    now = time.monotonic() + receiving.TAKEN_IN + 1
    monkeypatch.setattr(receiving.time, "monotonic", lambda: now)
    manager.sweep(Open("early"))
    assert not manager.file_storage


def test_a_visit_that_can_not_be_resumed_is_forgotten_without_another_visitor() -> None:
    session = MagicMock(AppSession, id="one", session_state=SessionState())
    session.session_state["uploads"] = "pictures"
    storage = MemorySessionStorage(ttl_seconds=0.01)
    storage.save(SessionInfo(client=None, session=session))
    manager = WebsocketSessionManager(storage, None, None, None)
    time.sleep(0.02)
    with ThreadPoolExecutor(1) as apart:  # a browser of another test may have a loop on this thread
        assert apart.submit(asyncio.run, receiving.forget_visits(manager._session_storage)).result() == 1
    assert "uploads" not in session.session_state
    session.shutdown.assert_called_once_with()


def put(files: receiving.Receiving, session: str, name: str, size: int) -> None:
    files.add_file(session, UploadedFileRec(name, name, "", bytes(size)))


def test_a_sweep_drops_what_is_late_or_whose_tab_is_closed(
    files: receiving.Receiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(receiving.time, "monotonic", lambda: now[0])
    for session in ("closed", "late", "sends", "new"):
        put(files, session, "a", 10)
    now[0] = receiving.TAKEN_IN + 1
    put(files, "new", "b", 10)
    with files.on_its_way("sends", 10):
        files.sweep(Open("late", "sends", "new"))
        assert {*files.file_storage} == {"sends", "new"}
        now[0] = receiving.LONGEST + 1
        put(files, "new", "c", 10)
        files.sweep(Open("late", "sends", "new"))
    assert not files.file_storage
    assert not files.came


def test_what_is_on_its_way_takes_room_and_gives_it_back(
    files: receiving.Receiving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "QUOTA", 100)
    with files.on_its_way("one", 60) as came:
        with files.on_its_way("one", 60):
            pass  # what is only announced takes no room
        came(60)
        with pytest.raises(receiving.HTTPException) as refused, files.on_its_way("one", 60):
            pass
        assert refused.value.status_code == 413
        with pytest.raises(receiving.HTTPException):
            came(41)
        with files.on_its_way("other", 60):
            pass
    put(files, "one", "a", 100)
    with pytest.raises(receiving.HTTPException), files.on_its_way("one", 1):
        pass
    with pytest.raises(receiving.HTTPException):
        put(files, "one", "b", 1)


# Pictures are decoded once


def raw(files: list[tuple[str, bytes]]) -> ImageSet:
    """The same pictures as they were sent, decoded whenever they are needed."""
    rows = Rows([Listed(name) for name, _ in files], lambda number: files[number][1])
    return collected("raw", rows, [look(data) for _, data in files])


PROFILES = [Profile((8, 8), 1), Profile((12, 16), 3), Profile((64, 64), 3)]


@pytest.mark.parametrize("name", [name for name in TAKEN if not built(name).startswith(b"PK")])
def test_what_is_kept_of_a_picture_has_its_pixels_and_its_identity(name: str) -> None:
    data = built(name)
    found, sent = received([("x", data)]), raw([("x", data)])
    assert [*found.table.image] == [*sent.table.image]
    assert found.read(0) != data or data.startswith(b"\x89PNG")
    kept, (expected, notes) = decode(found.read(0)), decode(data)
    assert kept[1] == []
    assert kept[0].mode == expected.mode
    assert np.array_equal(kept[0], expected)
    assert found.table.notes[0] == "; ".join(notes)
    for profile in PROFILES:
        assert np.array_equal(found.pixels(profile), sent.pixels(profile))
        assert np.array_equal(as_seen(found, profile).pixels(profile), sent.pixels(profile))


def test_nothing_of_what_was_sent_is_kept() -> None:
    data, archive = JPEG + b"!", packed(("a.png", built("a PNG")))
    before = [sys.getrefcount(one) for one in (data, archive)]
    found = received([("a.jpg", data), ("b.zip", archive)])
    assert len(found) == 2
    assert [sys.getrefcount(one) for one in (data, archive)] == before


def test_scores_are_those_of_the_pictures_as_they_were_sent(pipeline: Path, pictures: Path) -> None:
    rng = np.random.default_rng(0)
    photos = [saved(rng.integers(0, 256, (40, 60, 3), np.uint8), "JPEG", quality=60 + k) for k in range(3)]
    files = [(f"{k}.jpg", data) for k, data in enumerate([*photos, JPEG])]
    planned = plan(Run(Location(pipeline), Location(pictures), ("NA", "PIA"), steps=2))
    profile, found = planned.model.profile, received(files)
    first, *others = (unkept(about(planned, one)) for one in (raw(files), found, as_seen(found, profile)))
    for other in others:
        for attack in first:
            pd.testing.assert_frame_equal(first[attack], other[attack], check_exact=True)


def test_a_picture_that_is_slow_to_decode_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = JPEG[:2] + b"\xff" * (8 * MB) + b"\xfe\0\3x" + JPEG[2:]
    assert decode(padded)[0].size == (16, 12)  # it is a picture
    monkeypatch.setattr(survey, "IN_TIME", 0.1)
    assert keep(padded).reason == SLOW
    assert keep(JPEG).png  # and the next one is not hindered


def test_the_pictures_of_an_upload_may_take_so_much_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(data: bytes) -> Kept:
        return keep(data)._replace(seconds=uploads.EFFORT / 1.5)

    def look_one_by_one(read: Callable[[int], bytes], count: int, *_: object) -> Iterator[Kept | Look]:
        for number in range(count):
            try:
                yield slow(read(number))
            except InputError as error:
                yield Look("", str(error))

    monkeypatch.setattr(uploads, "look_through", look_one_by_one)
    found = received([(f"{k}.png", saved(np.full((4, 4), k, np.uint8))) for k in range(4)])
    assert [*found.table.file] == ["0.png", "1.png"]
    assert {*found.rejected.reason} == {
        "left out, as the pictures before it took 30 seconds to decode; use smaller ones, or fewer"
    }


def test_what_visits_keep_is_bounded_for_each_and_for_all_and_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    noise = [
        (f"{k}.jpg", saved(rng.integers(0, 256, (200, 200, 3), np.uint8), "JPEG", quality=5)) for k in range(4)
    ]  # the pixels take many times the file
    size = len(keep(noise[0][1]).png)
    before = Album.held
    monkeypatch.setattr(uploads, "QUOTA", int(2.5 * size))
    first = received(noise)
    assert len(first) == 2
    assert "in all; use smaller pictures or fewer" in first.rejected.reason[0]
    monkeypatch.setattr(uploads, "HELD", before + int(3.5 * size))
    second = received(noise)
    assert len(second) == 1
    assert "the pictures of all visitors fill the memory" in second.rejected.reason[0]
    del first, second
    assert Album.held == before


def test_the_picture_of_an_edit_is_made_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    images = received([("a.jpg", JPEG)])
    one = with_edit(images, images.table.image[0], Edit(flip=True))
    first = one.read(0)
    monkeypatch.setattr("oms_core.edits.decode", None)  # on the device's thread nothing is edited any more
    assert one.read(0) == first


# Small copies


@pytest.mark.parametrize("size", [(4000, 3000), (129, 4), (2600, 130), (300, 300), (128, 1)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_copy_of_a_large_picture_is_small(size: tuple[int, int], mode: str) -> None:
    copy = small(Image.new(mode, size, "white"))
    assert max(copy.shape[:2]) <= 128
    assert min(copy.shape[:2]) >= 1
    assert copy.min() == 255
    ratio = copy.shape[1] / copy.shape[0]
    assert ratio == pytest.approx(size[0] / size[1], rel=0.3)


def test_of_a_small_picture_the_pixels_are_repeated() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (28, 20), np.uint8)
    copy = small(Image.fromarray(picture))
    assert np.array_equal(copy, picture.repeat(4, axis=0).repeat(4, axis=1))


PAGING = """
import os, sys
import numpy as np
from pages.common.pictures import thumbnail
from oms_core.images import open_images
from oms_core.location import Location
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
name = Location(sys.argv[1])
images = open_images(name).table.image
def page(rows):
    for row in rows:
        assert max(thumbnail(name, row, images[row]).shape) <= 128
page(range(4))
before = resident()
page(range(4, 16))
print(before, resident())
"""


@LINUX
def test_paging_through_photos_keeps_small_copies(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for k in range(16):
        folder = tmp_path / "photos" / ("member" if k % 2 else "nonmember")
        folder.mkdir(parents=True, exist_ok=True)
        blocks = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((4000, 3000))
        blocks.save(folder / f"{k}.jpg", quality=60)
    command = [sys.executable, "-W", "ignore", "-c", PAGING, str(tmp_path / "photos")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(float, done.stdout.split())
    assert after < before + 20  # each of the twelve takes 36 MB decoded


# One import, one lock


def test_modules_are_imported_by_one_thread_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_one.py").write_text("import time\ntime.sleep(0.3)\nwhole = True\n")
    (tmp_path / "slow_two.py").write_text("import slow_one\nassert slow_one.whole\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(libraries, "loaded", set())
    inside, most, real = [], [], libraries.import_module

    def counted(name: str) -> None:
        inside.append(name)
        most.append(len(inside))
        real(name)
        inside.pop()

    monkeypatch.setattr(libraries, "import_module", counted)
    threads = [threading.Thread(target=libraries.load, args=names) for names in (["slow_one"], ["slow_two"]) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert {*most} == {1}
    with pytest.raises(ImportError):
        libraries.load("no_such_module")


LAZY = re.compile(r" +(?:from|import) (?:diffusers|transformers|sklearn|scipy|xgboost)\b")


def test_every_import_of_a_large_library_in_a_function_is_loaded_first() -> None:
    wrong = []
    for path in sorted((ROOT / "oms_core").rglob("*.py")):
        before = ""
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if LAZY.match(line) and "libraries.lo" not in before and "TYPE_CHECKING:" not in before:
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
            before = line if not line.strip().startswith(("from ", "import ")) else before
    assert [line.partition(":")[0] for line in wrong] == ["oms_core/assemble.py"]  # of the command line alone


@pytest.mark.parametrize("start", range(FRESH))
def test_the_first_two_visitors_of_a_fresh_server_press_run_at_once(start: int, tmp_path: Path) -> None:
    with serving(tmp_path, OMP_NUM_THREADS="1") as served:
        visits = [
            Wire(served.address, "Attacks", f"model=ddpm-digits&limit=20&t={61 + start}"),
            Wire(served.address, "Convergence", f"model=sd-fashion&limit=20&t={61 + start}"),
        ]
        barrier = threading.Barrier(len(visits))

        def go(one: Wire) -> None:
            one.run()
            barrier.wait(SOON)
            one.press("Run")
            wait_for(lambda: one.run() or "Cancel" not in one.buttons())

        with ThreadPoolExecutor(len(visits)) as together:
            assert [*together.map(go, visits)] == [None, None]
        for one in visits:
            assert "went wrong" not in one.words()
            assert "Run" not in one.buttons()  # all is known
            one.close()
        log = served.log.read_text()
    assert "cannot import name" not in log
    assert "Traceback" not in log
    assert log.count("is done after") == 2
