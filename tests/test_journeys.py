"""The main journeys in a real browser, against a server started as the README starts it.

Where no Chromium is found the journeys are skipped and say so; with OMS_BROWSER_REQUIRED set they fail instead.
Screenshots of each journey are left in ``build/screenshots``.
"""

from __future__ import annotations

import socket

import pytest
from browser import Visitor

pytestmark = pytest.mark.browser


def curves(visitor: Visitor) -> int:
    """How many curves the first ROC panel draws."""
    return visitor.page.evaluate("document.querySelector('.js-plotly-plot').data.length")


def test_a_newcomer_steps_the_search_and_flips_one_more_step(visitor: Visitor) -> None:
    visitor.open()
    visitor.says("Was this picture in the training set")
    visitor.shoot("start")
    visitor.page.get_by_test_id("stMain").get_by_role("link", name="Open").first.click()
    visitor.page.get_by_role("heading", name="Step the search").wait_for()
    visitor.says("Press Step")
    visitor.settle()
    for step in (1, 2, 3):
        visitor.strike("ArrowRight", "Step")
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


def test_every_page_reads_well_in_the_dark(browser, server: str) -> None:
    one = Visitor(browser, server, "dark")
    for path, said in (
        ("", "Residual at step"),
        ("Step_the_search?step=4", "After step 4"),
        ("Convergence", "the median residual"),
        ("Attacks?n=2&pick=faca648fc25a", "Its search by"),
        ("Inspect?model=uvit-fashion&attack=SecMI&n=2", "Its search by"),
    ):
        one.open(path)
        one.says(said)
        one.page.locator(".js-plotly-plot").first.wait_for()
        one.page.wait_for_timeout(500)
        colour = one.page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
        assert sum(int(part) for part in colour.strip("rgba()").split(",")[:3]) < 200
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
