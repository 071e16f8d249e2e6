"""In a real browser: hand pictures in, read the verdict, edit one, take the findings home."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import Visitor

from oms_core.images import open_images

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three known members, three known non-members, a piece of clothing, and what is no picture."""
    folder = tmp_path_factory.mktemp("own")
    digits, clothes = open_images("digits"), open_images("fashion")
    chosen = [(digits, digits.with_role(role).table.index[:3]) for role in ("member", "nonmember")]
    for images, rows in [*chosen, (clothes, clothes.table.index[:1])]:
        for row in rows:
            (folder / f"{images.table.role[row]}-{images.name}-{row}.png").write_bytes(images.read(row))
    (folder / "notes.png").write_bytes(b"no picture")
    return sorted(map(str, folder.iterdir()))


def handed_in(visitor: Visitor, files: list[str]) -> None:
    visitor.open("Try_your_images?attack=PIA&fpr=0.01")
    visitor.says("Choose pictures above, or an example")
    visitor.page.set_input_files("input[type=file]", files)
    visitor.says("pictures are flagged as published at 1 %")
    visitor.settle()


def slid(visitor: Visitor, label: str, presses: int) -> None:
    """Move a slider by the right arrow key."""
    slider = visitor.page.locator("[data-testid=stSlider]", has_text=label).locator("[role=slider], input[type=range]")
    slider.first.focus()
    for _ in range(presses):
        visitor.page.keyboard.press("ArrowRight")
    visitor.page.wait_for_timeout(500)
    visitor.settle()


def test_a_visitor_hands_pictures_in_edits_one_and_saves_the_findings(
    visitor: Visitor, files: list[str], tmp_path: Path
) -> None:
    handed_in(visitor, files)
    visitor.says("1 of 7 look unlike every known non-member")
    visitor.says("1 could not be used")
    visitor.page.locator("[data-testid=stDataFrame]").first.wait_for()
    visitor.shoot("try")
    assert "uploads" not in visitor.page.url
    assert set(visitor.page.url.partition("?")[2].split("&")) == {"attack=PIA", "fpr=0.01"}

    with visitor.page.expect_download() as waiting:
        visitor.page.get_by_role("button", name="Save as JSON").click()
    waiting.value.save_as(tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert len({row["image"] for row in found["pictures"]}) == 7
    assert [row["file"] for row in found["rejected"]] == ["notes.png"]
    with visitor.page.expect_download() as waiting:
        visitor.page.get_by_role("button", name="Save as HTML").click()
    waiting.value.save_as(tmp_path / "found.html")
    saved = visitor.context.new_page()
    saved.goto(f"file://{tmp_path}/found.html")
    saved.locator(".js-plotly-plot .main-svg").first.wait_for()
    saved.close()
    visitor.elsewhere = [url for url in visitor.elsewhere if not url.startswith("file:")]

    visitor.page.get_by_text("Edit one", exact=True).click()
    visitor.says("JPEG quality")
    visitor.settle()
    scores = visitor.page.locator("[data-testid=stTable]").last
    before = scores.inner_text()
    slid(visitor, "JPEG quality", 6)
    visitor.page.wait_for_function(
        "before => [...document.querySelectorAll('[data-testid=stTable]')].at(-1).innerText !== before", arg=before
    )
    visitor.shoot("try-edit")
    visitor.page.get_by_text("The collection", exact=True).click()
    visitor.says("As a set, as published, these 7 pictures")
    visitor.shoot("try-set")


def test_a_set_of_members_is_decided_and_inverted_pictures_set_off_the_alarm(visitor: Visitor) -> None:
    visitor.open("Try_your_images?model=ddpm-fashion&attack=PIA&fpr=0.01")
    visitor.page.get_by_role("button", name="Ten known members").click()
    visitor.says("pictures are flagged with One More Step at 1 %")
    visitor.page.get_by_text("The collection", exact=True).click()
    visitor.says("more member-like than known non-members")
    visitor.settle()
    visitor.page.get_by_role("button", name="The same, inverted").click()
    visitor.says("may measure how these sets differ, and not membership")
    visitor.settle()
    visitor.shoot("try-alarm")


def test_the_page_reads_well_in_the_dark(browser, server: str, files: list[str]) -> None:
    one = Visitor(browser, server, "dark")
    handed_in(one, files)
    one.page.locator(".js-plotly-plot").first.wait_for()
    one.page.wait_for_timeout(500)
    one.shoot("dark-try")
    one.leave()
