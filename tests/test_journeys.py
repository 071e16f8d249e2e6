"""The main journeys in a real browser, against a server started as the README starts it.

Where no Chromium is found the journeys are skipped and say so; with OMS_BROWSER_REQUIRED set they fail instead.
Screenshots of each journey are left in ``build/screenshots``.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
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

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app on a free port, with an empty cache of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMS_CACHE": str(tmp_path_factory.mktemp("cache"))}
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.port", str(port)]
    log = (tmp_path_factory.mktemp("log") / "server.log").open("w+")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process)
        yield address
        log.seek(0)
        assert "Traceback" not in log.read()
    finally:
        process.terminate()
        process.wait(20)


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/_stcore/health", timeout=5)
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the app did not start")


@pytest.fixture(scope="module")
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


class Visitor:
    """One visitor: a browser window that notes every request to elsewhere."""

    def __init__(self, browser, address: str, scheme: str = "light") -> None:
        self.address = address
        self.context = browser.new_context(viewport={"width": 1440, "height": 1000}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.elsewhere: list[str] = []
        self.page.on("request", lambda request: self.note(request.url))

    def note(self, url: str) -> None:
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

    def go(self, label: str) -> None:
        """Follow a link of the sidebar."""
        self.page.get_by_test_id("stSidebar").get_by_role("link", name=label).click()
        self.page.get_by_role("heading", name=label, exact=True).wait_for()
        self.settle()

    def shoot(self, name: str) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def leave(self) -> None:
        assert not self.elsewhere, f"the app asked for {self.elsewhere}"
        self.context.close()


@pytest.fixture
def visitor(browser, server: str) -> Iterator[Visitor]:
    one = Visitor(browser, server)
    yield one
    one.leave()


def curves(visitor: Visitor) -> int:
    """How many curves the first ROC panel draws."""
    return visitor.page.evaluate("document.querySelector('.js-plotly-plot').data.length")


def test_a_newcomer_steps_the_search_and_flips_one_more_step(visitor: Visitor) -> None:
    visitor.open()
    visitor.says("Was this picture in the training set")
    visitor.shoot("start")
    visitor.page.get_by_test_id("stMain").get_by_role("link", name="Open").first.click()
    visitor.page.get_by_role("heading", name="Step the search").wait_for()
    visitor.settle()
    for step in (1, 2, 3):
        visitor.page.keyboard.press("ArrowRight")
        visitor.says(f"After step {step} the noise of")
    visitor.shoot("step")
    visitor.press("Reset")
    visitor.says("Press Step")
    visitor.go("Attacks")
    visitor.says("Switch on One More Step")
    before = curves(visitor)
    visitor.page.get_by_text("+ One More Step").first.click()
    visitor.says("gain in AUC points with its 95 % interval")
    visitor.settle()
    assert curves(visitor) > before
    visitor.shoot("attacks")


def place_of_plot(visitor: Visitor) -> dict[str, float]:
    """Where on the screen the chart is that can be clicked."""
    plot = visitor.page.locator("[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg").first
    plot.wait_for()
    plot.scroll_into_view_if_needed()
    return plot.bounding_box()


def test_a_click_on_an_outlier_opens_its_picture(visitor: Visitor) -> None:
    visitor.open("Convergence")
    visitor.says("the median residual of members is")
    box = place_of_plot(visitor)
    for down in range(30, 75, 3):  # somewhere through the cloud there is a point
        for across in range(25, 70, 5):
            visitor.page.mouse.click(box["x"] + box["width"] * across / 100, box["y"] + box["height"] * down / 100)
            visitor.page.wait_for_timeout(50)
            if visitor.page.get_by_text("Residuals:").count():
                break
        else:
            continue
        break
    visitor.says("Residuals:")
    visitor.shoot("convergence")
    visitor.page.get_by_role("button", name="Step its search").click()
    visitor.page.get_by_role("heading", name="Step the search", exact=True).wait_for()
    visitor.says("Press Step")


def test_a_click_on_a_cell_of_the_sweep_takes_every_page_there(visitor: Visitor) -> None:
    visitor.open("Sweep")
    visitor.says("separates best by")
    box = place_of_plot(visitor)
    visitor.page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
    visitor.page.wait_for_url("**t=*")
    visitor.settle()
    visitor.shoot("sweep")
    chosen = set(visitor.page.url.partition("?")[2].split("&"))
    assert any(part.startswith("n=") for part in chosen)
    visitor.go("Attacks")
    assert chosen <= set(visitor.page.url.partition("?")[2].split("&"))


def test_the_papers_tables_stand_beside_what_was_measured(visitor: Visitor) -> None:
    visitor.open("Paper_method_limits")
    visitor.says("Measured here on small models")
    visitor.page.get_by_role("radio", name="5").or_(visitor.page.get_by_text("5", exact=True)).first.click()
    visitor.says("Table 5. Quantile regression")
    visitor.settle()
    visitor.shoot("paper")


def test_a_copied_address_restores_every_choice_and_outlives_five_pages_and_back(visitor: Visitor) -> None:
    wanted = {"model=ddpm-fashion", "attack=PIA", "n=2", "fpr=0.01", "step=4"}
    visitor.open("Attacks?" + "&".join(sorted(wanted)))
    visitor.says("catches")
    for label in ("Step the search", "Convergence", "Attacks", "Step the search", "Attacks"):
        visitor.go(label)
    assert wanted <= set(visitor.page.url.partition("?")[2].split("&"))
    visitor.page.go_back()
    visitor.settle()
    assert wanted <= set(visitor.page.url.partition("?")[2].split("&"))
    visitor.says("pictures of fashion")


def test_a_run_shows_its_progress_and_can_be_cancelled(visitor: Visitor) -> None:
    visitor.open("Convergence?t=50&attack=SecMI")
    visitor.press("Run")
    visitor.says("per second")
    visitor.shoot("running")
    visitor.page.get_by_role("button", name="Cancel").click()
    visitor.says("Cancelled after")
    visitor.says("what was finished is kept")


@pytest.mark.parametrize("path", ["", "Step_the_search?step=4", "Convergence", "Attacks?n=2"])
def test_every_page_reads_well_in_the_dark(browser, server: str, path: str) -> None:
    one = Visitor(browser, server, "dark")
    one.open(path)
    one.page.locator(".js-plotly-plot").first.wait_for()
    one.page.wait_for_timeout(500)
    background = one.page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
    assert sum(int(part) for part in background.strip("rgba()").split(",")[:3]) < 200
    one.shoot(f"dark-{path.partition('?')[0] or 'start'}")
    one.leave()


def handshake(server: str, host: str, origin: str) -> str:
    """The status line of a WebSocket handshake, as another site's script would open it."""
    address, port = server.removeprefix("http://").split(":")
    lines = [
        "GET /_stcore/stream HTTP/1.1", f"Host: {host}", f"Origin: {origin}", "Connection: Upgrade",
        "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", "",
    ]  # fmt: skip
    with socket.create_connection((address, int(port)), timeout=10) as connection:
        connection.sendall("\r\n".join(lines).encode())
        return connection.recv(64).split(b"\r\n")[0].decode()


def test_other_sites_and_other_hosts_are_refused(server: str) -> None:
    own = server.removeprefix("http://")
    assert "101" in handshake(server, own, server)
    for host, origin in ((own, "http://evil.example"), (own, "null"), ("evil.example", "http://evil.example")):
        assert "403" in handshake(server, host, origin)
