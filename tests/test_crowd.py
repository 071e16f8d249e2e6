"""Many visitors, long days and hostile ones: one job per run, flat memory, and nothing to be had from outside."""

from __future__ import annotations

import ast
import os
import re
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import SHOTS, WAIT, Served, Visitor, serving
from PIL import Image
from streamlit.testing.v1 import AppTest
from watch import watched

from pages.common.context import Context

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [ROOT / "app.py", *sorted((ROOT / "pages").rglob("*.py"))]
PAGES = ["app.py", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "pages").glob("*.py")))]
CROWD = int(os.environ.get("OMS_CROWD", "4"))  # visitors, an even number from 4; each takes some seconds of a core
LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the resident size is read from /proc")


# Many visitors of one server

GATE = """
import os, time
from oms_core import compute
whole, begun = compute.signals_of, []
def signals_of(*given):
    begun.append(len(begun))
    while len(begun) > 2 and not os.path.exists(os.environ["GATE"]):
        time.sleep(0.05)
    return whole(*given)
compute.signals_of = signals_of
"""


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """A server that computes two batches and no more, until a file is there."""
    folder = tmp_path_factory.mktemp("gated")
    (folder / "sitecustomize.py").write_text(GATE)
    path = os.pathsep.join([str(folder), str(ROOT)])
    freed_at_once = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed is no longer resident
    with serving(folder, GATE=str(folder / "gate"), PYTHONPATH=path, **freed_at_once) as served:
        yield served, folder / "gate"


@pytest.mark.browser
def test_all_who_press_run_together_start_one_job_per_run_and_see_the_same(
    browser: Any, gated: tuple[Served, Path]
) -> None:
    served, gate = gated
    host = Visitor(browser, served.address)
    host.open("Convergence?t=70&limit=20")
    host.press("Run")  # one batch: it loads the libraries and the model before the others come
    host.says("the median residual of members is")
    pages = [host.context.new_page() for _ in range(CROWD)]  # each tab is a visit of its own
    groups = {50: pages[::2], 60: pages[1::2]}
    for t, group in groups.items():
        for page in group:
            page.set_default_timeout(2 * WAIT)
            page.goto(f"{served.address}/Convergence?t={t}&limit=400", wait_until="commit")
    buttons = [page.get_by_role("button", name="Run", exact=True) for page in pages]
    for button in buttons:
        button.wait_for()
    for button in buttons:
        button.click()
    for page in groups[50]:
        page.get_by_text(re.compile(r"\d+ of 400 pictures, \d+ per second")).first.wait_for()
    for page in groups[60]:
        page.get_by_text("Waiting; 1 run goes first.").first.wait_for()
    for number in (0, 1, CROWD - 1):
        pages[number].screenshot(path=SHOTS / f"crowd-{number}.png")
    for group in groups.values():
        group.pop(0).close()
    groups[50][0].get_by_role("button", name="Cancel").click()
    groups[50][0].get_by_text("Somebody else watches this run, so it goes on.").wait_for()
    gate.touch()
    for group in groups.values():
        for page in group:
            page.get_by_text("So far:").or_(page.get_by_role("button", name="Cancel")).first.wait_for(state="hidden")
        found = {page.get_by_text("the median residual of members is").first.inner_text() for page in group}
        assert len(found) == 1, found
        assert not any(page.query_selector_all("[data-testid=stException]") for page in group)
    host.leave()
    log = served.log.read_text()
    started = re.findall(r"Job (\w+) starts", log)
    assert len(started) == len({*started}) == 1 + len(groups)
    for name in started[1:]:
        assert f"Job {name} is done after 400 of 400 pictures" in log


# What the server lets in


def config() -> dict[str, Any]:
    return tomllib.loads((ROOT / ".streamlit" / "config.toml").read_text())


SAFE = {
    ("server", "address"): "127.0.0.1",
    ("server", "allowedHosts"): ["localhost", "127.0.0.1"],
    ("server", "enableCORS"): True,
    ("server", "enableXsrfProtection"): True,
    ("server", "enableStaticServing"): False,
    ("server", "maxUploadSize"): 64,
    ("client", "showErrorDetails"): "none",
    ("browser", "gatherUsageStats"): False,
}


@pytest.mark.parametrize(("section", "name"), SAFE)
def test_the_configuration_is_the_safe_one(section: str, name: str) -> None:
    assert config()[section][name] == SAFE[section, name]


@pytest.mark.parametrize(("section", "name"), SAFE)
def test_streamlit_knows_every_setting_that_safety_rests_on(section: str, name: str) -> None:
    from streamlit import config as streamlit

    assert f"{section}.{name}" in streamlit.get_config_options()


def test_the_server_listens_on_this_computer_alone(server: str) -> None:
    port = int(server.rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=10).close()
    for address in ("127.0.0.2", "::1"):  # they are this computer too, and would answer if it listened everywhere
        with pytest.raises(OSError, match=r"refused|unreachable|assign|timed out|not supported|route"):
            socket.create_connection((address, port), timeout=10)


def put(address: str, data: bytes, *headers: tuple[str, str]) -> int:
    """The status of an upload to a session that does not exist."""
    boundary = uuid.uuid4().hex
    body = f'--{boundary}\r\nContent-Disposition: form-data; name="x"; filename="x.png"\r\n\r\n'.encode()
    request = urllib.request.Request(
        f"{address}/_stcore/upload_file/{uuid.uuid4()}/{uuid.uuid4()}",
        body + data + f"\r\n--{boundary}--\r\n".encode(),
        {"Content-Type": f"multipart/form-data; boundary={boundary}", **dict(headers)},
        method="PUT",
    )
    try:
        return urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as refusal:
        return refusal.code


def test_an_upload_needs_the_token_of_its_visitor_and_a_living_session(server: str) -> None:
    answer = urllib.request.urlopen(f"{server}/_stcore/health", timeout=30)
    cookie = answer.headers["Set-Cookie"].partition(";")[0]
    name, _, token = cookie.partition("=")
    assert name == "_streamlit_xsrf"
    assert put(server, b"x") == 403
    assert put(server, b"x", ("Cookie", cookie)) == 403  # as another site's form would send it
    assert put(server, b"x", ("X-Xsrftoken", token)) == 403
    assert put(server, b"x", ("Cookie", cookie), ("X-Xsrftoken", "2|" + "0" * len(token))) == 403
    assert put(server, b"x", ("Cookie", cookie), ("X-Xsrftoken", token)) == 400


@pytest.mark.parametrize(
    "path", ["app/static/../../app.py", "static/../../../../etc/passwd", "media/../../app.py", "..%2f..%2fetc/passwd",
             "component/x/../../../../etc/passwd", "media/%2e%2e/%2e%2e/etc/passwd", "static//etc/passwd"]
)  # fmt: skip
def test_no_address_leads_out_of_what_is_served(server: str, path: str) -> None:
    host, _, port = server.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:  # a client would tidy the path
        connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert answer
    for secret in (b"root:", b"def main"):
        assert secret not in answer


# What a visitor types

WORDS = [
    "/etc/passwd", "../../../../etc/passwd", "..", ".", "/", "~", "~root/.ssh/id_rsa", "file:///etc/passwd",
    "http://169.254.169.254/latest", "hub:evil/data", "evil/model", "\\\\evil\\share", "C:\\Windows\\win.ini",
    "/proc/self/environ", "/dev/zero", "member=/etc,nonmember=/tmp", "x.npz@/etc", "ideal:/etc", "ddpm-digits@../..",
    "ddpm-digits/../../x", "%2e%2e%2f", "a\0b", "$(id)", "`id`", "'; DROP TABLE x; --", "![x](http://evil/i.png)",
    "<script>alert(1)</script>", "{{7*7}}", "%s%n", "=cmd|' /C calc'!A0", "\u202eabc", "😀" * 50, "n" * 5000,
]  # fmt: skip


def visited(page: str, **address: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    for name, value in address.items():
        test.query_params[name] = value
    if page != "app.py":
        test.switch_page(page)
    return test.run()


def strangers(seen: list[Any], cache: Path) -> list[str]:
    """Paths outside this project, its cache and Python."""
    homes = [ROOT, cache, Path(sys.prefix), Path(sys.base_prefix), *map(Path, sys.path)]
    known = tuple(str(home.resolve()) for home in homes if str(home) not in ("", "."))
    system = {"/etc/mime.types"}  # which Python reads once
    paths = {os.path.abspath(one.path) for one in seen if one.path and not one.path.isdecimal()}
    return sorted(
        path for path in paths - system if not path.startswith(known) and not os.path.realpath(path).startswith(known)
    )


@pytest.fixture(scope="module")
def bait(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a model and like pictures, which the owner did not open."""
    folder = tmp_path_factory.mktemp("bait")
    (folder / "member").mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


@pytest.mark.parametrize("visit", range(2 * len(PAGES)))
def test_no_words_of_a_visitor_become_a_path(visit: int, bait: Path, cache_folder: Path) -> None:
    import oms_core.families.ddpm  # noqa: F401  # slow libraries, which a page begins to import behind its paint

    page, words, names = PAGES[visit // 2], [str(bait), *WORDS], [*Context.__dataclass_fields__]
    address = {name: words[(2 * visit + place) % len(words)] for place, name in enumerate(names)}
    if visit % 2:
        address["captions"] = f"text:{address['captions']}"
    with watched() as seen:
        test = visited(page, **address)
    assert not test.exception
    context = test.session_state["context"]
    assert (context.model, context.images, context.attack) == ("ddpm-digits", "", "NA")
    assert sum("which is ignored" in warning.value for warning in test.warning) >= len(names) - 2
    assert strangers(seen, cache_folder) == []
    assert not [one for one in seen if one.event in ("subprocess.Popen", "os.system", "socket.connect", "os.exec")]
    typed = [word for word in address.values() if len(word) > 2]
    assert not [one for one in seen if any(word in one.path for word in typed)]


@pytest.mark.parametrize("word", ["/etc/passwd", "../../../etc/passwd", "![x](http://evil/i.png)", "\u202eabc"])
def test_a_caption_of_ones_own_is_words_and_nothing_else(word: str, cache_folder: Path) -> None:
    test = visited("pages/3_Attacks.py", model="sd-fashion", captions="text:a photo", limit="20")
    with watched() as seen:
        test.text_input(key="own caption").set_value(word).run()
    assert not test.exception
    assert test.session_state["context"].captions == f"text:{word}"
    assert not [one for one in seen if word in one.path]
    assert strangers(seen, cache_folder) == []


def uses(path: Path, *names: str) -> set[str]:
    """Which of these attributes of Streamlit a file uses."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {f"st.{node.attr}" for node in nodes if isinstance(node, ast.Attribute)} & {f"st.{name}" for name in names}


def test_the_address_is_read_in_one_place_and_words_are_typed_in_one() -> None:
    named = {path: path.relative_to(ROOT).as_posix() for path in SHOWN}
    assert {named[path] for path in SHOWN if uses(path, "query_params")} == {"pages/common/context.py"}
    typed = {named[path] for path in SHOWN if uses(path, "text_input", "text_area", "chat_input", "data_editor")}
    assert typed == {"pages/common/shell.py"}


# Memory

RESIDENT = """
import gc, os
def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
"""
UPLOADS = (
    RESIDENT
    + """
import io
import numpy as np
from PIL import Image
from oms_core.decode import Profile
from oms_core.uploads import received
random = np.random.default_rng(0)
def one():
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (600, 600, 3), np.uint8)).save(buffer, "PNG", compress_level=1)
    assert 2**20 < buffer.tell() < 2 * 2**20
    assert received([("x.png", buffer.getvalue())]).pixels(Profile((28, 28), 1)).any()
for _ in range(20):
    one()
before = resident()
for _ in range(200):
    one()
print(before, resident())
"""
)
SWITCHES = (
    RESIDENT
    + """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
import tiny
from oms_core.compute import score
from oms_core.location import Location
from oms_core.run import Run
folder, pictures = Path(sys.argv[1]), Location(sys.argv[2])
makers = {"uvit": tiny.save_uvit, "sd": tiny.save_stable_diffusion, "dit": tiny.save_dit, "pixart": tiny.save_pixart}
models = [Location(make(folder / name)) for name, make in makers.items()]
def switch(number):
    model = models[number % len(models)]
    found = score(Run(model, pictures, ("NA",), t=100, seed=number, captions="text:a cat", batch=4))
    assert len(found["NA"]) == 12
for number in range(2 * len(models)):
    switch(number)
before = resident()
for number in range(100, 120):
    switch(number)
print(before, resident())
"""
)


def sizes(code: str, *given: str) -> tuple[float, float]:
    """MiB before and after, as a process says."""
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = map(float, done.stdout.split())
    return before, after


@LINUX
def test_two_hundred_uploads_leave_nothing_behind() -> None:
    before, after = sizes(UPLOADS)
    assert after <= 1.05 * before


@LINUX
def test_twenty_switches_of_the_model_leave_nothing_behind(tmp_path: Path, pictures: Path) -> None:
    before, after = sizes(SWITCHES, str(tmp_path), str(pictures))
    assert after <= 1.05 * before


@pytest.mark.browser
@LINUX
@pytest.mark.skipif(CROWD < 16, reason="takes a minute of a quiet machine; OMS_CROWD=16 asks for it")
def test_forty_large_uploads_through_the_browser_leave_nothing_behind(
    browser: Any, gated: tuple[Served, Path], tmp_path: Path
) -> None:
    served, gate = gated
    gate.touch()
    visitor, random = Visitor(browser, served.address), np.random.default_rng(0)
    files = [tmp_path / f"{number}.png" for number in range(40)]
    for file in files:
        Image.fromarray(random.integers(0, 256, (1200, 1200, 3), np.uint8)).save(file, compress_level=0)
        assert file.stat().st_size > 4 * 2**20
    visitor.open("Try_your_images")

    def hand_in(some: list[Path]) -> None:
        """Have some pictures scored, and remove them."""
        visitor.page.locator("input[type=file]").first.set_input_files(some)
        visitor.says("Save as CSV")
        visitor.settle()
        visitor.press("Remove your pictures")
        visitor.says("you need not know who is a member")
        visitor.settle()

    hand_in(files[:5])
    visitor.page.wait_for_timeout(2000)  # until the runs that this caused have ended
    before = resident(served.process)
    hand_in(files)
    for _ in range(60):
        grown = resident(served.process) - before
        if grown < 60:
            break
        visitor.page.wait_for_timeout(500)
    assert grown < 60
    visitor.leave()


def resident(process: int) -> float:
    """MiB of memory that a process has."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
