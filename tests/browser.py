"""A server started as the README starts it, a browser, and visitors who look at it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "build" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
READY = "[data-testid=stApp][data-test-script-state=notRunning]"
WAIT = 60_000  # milliseconds


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
        address: where, http://...
        log: the file of what it says.
        process: its number.
    """

    address: str
    log: Path
    process: int

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def own_failures(log: str) -> list[str]:
    """Lines of a server's log that tell of a failure of ours; the web server reports connections that broke off."""
    ours = [f'File "{ROOT / place}' for place in ("app.py", "pages", "oms_core")]
    return [line for line in log.splitlines() if "failed [" in line or any(place in line for place in ours)]


@contextmanager
def serving(folder: Path, **environment: str) -> Iterator[Served]:
    """The app on a free port, with an empty cache of its own; its log must stay free of failures."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    address, log = f"http://127.0.0.1:{port}", folder / "server.log"
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMS_CACHE": str(folder / "cache")} | environment,
            stdout=said,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(address, process)
        yield Served(address, log, process.pid)
        assert not own_failures(log.read_text())
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the app, for all who only look at it."""
    with serving(tmp_path_factory.mktemp("server")) as served:
        yield served.address


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/_stcore/health", timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the app did not start")


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A headless Chromium."""
    if CHROMIUM is None:
        if os.environ.get("OMS_BROWSER_REQUIRED"):
            pytest.fail("no Chromium was found, and OMS_BROWSER_REQUIRED asks for the journeys")
        pytest.skip("no Chromium or Chrome on this machine; install one to run the journeys")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@cache
def window(browser, scheme: str):
    """What the visitors of one browser share, its cache of files above all; each of their pages is a visit."""
    return browser.new_context(viewport={"width": 1440, "height": 1000}, color_scheme=scheme)


class Visitor:
    """One visitor: a page of a browser, which notes every request to elsewhere."""

    def __init__(self, browser, address: str, scheme: str = "light") -> None:
        self.address = address
        self.context = window(browser, scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.elsewhere: list[str] = []
        self.context.on("request", self.note)

    def note(self, request) -> None:
        url = request.url
        if not url.startswith((self.address, self.address.replace("http", "ws"), "data:", "blob:")):
            self.elsewhere.append(url)

    def open(self, path: str = "") -> None:
        self.page.goto(f"{self.address}/{path}")
        self.settle()

    def settle(self) -> None:
        self.page.wait_for_selector(READY)
        self.page.wait_for_timeout(300)
        self.page.wait_for_selector(READY)
        assert not self.page.query_selector_all("[data-testid=stException]")

    def says(self, words: str) -> None:
        self.page.get_by_text(words).first.wait_for()

    def press(self, label: str) -> None:
        self.page.get_by_role("button", name=label).first.click()
        self.settle()

    def strike(self, key: str, button: str) -> None:
        """Press the key of a button that is on the page and can be pressed."""
        self.page.get_by_role("button", name=button, disabled=False).first.wait_for()
        self.page.keyboard.press(key)

    def go(self, label: str) -> None:
        """Follow a link of the sidebar."""
        self.page.get_by_test_id("stSidebar").get_by_role("link", name=label).click()
        self.page.get_by_role("heading", name=label, exact=True).wait_for()
        self.settle()

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def leave(self) -> None:
        self.context.remove_listener("request", self.note)
        for page in self.context.pages:
            page.close()
        assert not self.elsewhere, f"the app asked for {self.elsewhere}"


@pytest.fixture
def visitor(browser, server: str) -> Iterator[Visitor]:
    one = Visitor(browser, server)
    yield one
    one.leave()
