"""From a point of any chart to its picture, along the accused by the arrow keys, and two rounds of the game.

Screenshots of each journey are left in ``build/screenshots``.
"""

from __future__ import annotations

import pytest
from browser import Visitor

pytestmark = pytest.mark.browser

POINT = """([plot, name, index]) => {
  const drawn = document.querySelectorAll('.js-plotly-plot')[plot];
  const trace = drawn._fullData.find(one => one.customdata && (one.name || '').startsWith(name));
  const [x, y] = ['x', 'y'].map(way => drawn._fullLayout[trace[way + 'axis'].replace(way, way + 'axis')]);
  const box = drawn.getBoundingClientRect(), at = index < 0 ? trace._length + index : index;
  const end = trace.type === 'bar' ? y.d2p(trace.y[at] / 2) : y.d2p(trace.y[at]);
  return [box.x + x._offset + x.d2p(trace.x[at]), box.y + y._offset + end];
}"""


def click_point(visitor: Visitor, plot: int, name: str, index: int) -> None:
    """Click a point of a named trace, as a person would see it."""
    chart = visitor.page.locator(".js-plotly-plot").nth(plot)
    chart.scroll_into_view_if_needed()
    visitor.page.wait_for_timeout(400)  # for the scrolling to end
    visitor.page.mouse.click(*visitor.page.evaluate(POINT, [plot, name, index]))


def opens_and_closes(visitor: Visitor, shot: str = "") -> str:
    """The picture that a click opened, after it is closed again."""
    drawer = visitor.page.get_by_role("dialog")
    drawer.locator("img").first.wait_for()
    drawer.get_by_text("model's x₀").wait_for()
    visitor.settle()
    file = drawer.locator("strong").first.inner_text()
    assert "pick=" in visitor.page.url
    if shot:
        visitor.shoot(shot)
    visitor.page.keyboard.press("Escape")
    drawer.wait_for(state="detached")
    return file


def test_a_point_of_every_chart_opens_its_picture(visitor: Visitor) -> None:
    visitor.open("Attacks?n=2")
    visitor.says("gain in AUC points")
    click_point(visitor, 0, "PIA +OMS", 30)
    seen = [opens_and_closes(visitor, "drawer")]
    click_point(visitor, 1, "non-members, each", 0)
    seen.append(opens_and_closes(visitor, "rug"))
    visitor.go("Convergence")
    visitor.says("the median residual of members is")
    click_point(visitor, 0, "non-members, outliers", 0)
    seen.append(opens_and_closes(visitor))
    for view in ("Ratio of residuals", "Jacobian norm"):
        visitor.page.get_by_text(view).click()
        visitor.settle()
        visitor.page.locator(".js-plotly-plot").first.wait_for()
        click_point(visitor, 0, "members, outliers", 3)
        seen.append(opens_and_closes(visitor, view.split()[0].lower()))
    visitor.go("Step the search")
    visitor.press("Step")
    visitor.says("After step 1")
    click_point(visitor, 0, "B: non-member", 0)
    seen.append(opens_and_closes(visitor))
    assert len(set(seen)) >= 5
    assert all(file.endswith(".png") for file in seen)


def test_the_search_of_a_clicked_outlier_can_be_stepped(visitor: Visitor) -> None:
    visitor.open("Convergence")
    visitor.says("the median residual of members is")
    visitor.shoot("convergence")
    click_point(visitor, 0, "non-members, outliers", 2)
    visitor.page.get_by_role("dialog").get_by_text("Its search by NA").wait_for()
    visitor.settle()
    visitor.page.get_by_role("button", name="Step its search").click()
    visitor.page.get_by_role("heading", name="Step the search", exact=True).wait_for()
    visitor.says("Press Step")


def test_a_closed_picture_stays_closed(visitor: Visitor) -> None:
    visitor.open("Convergence")
    visitor.says("the median residual of members is")
    click_point(visitor, 0, "non-members, outliers", 1)
    opens_and_closes(visitor)
    visitor.page.get_by_text("Distance from").first.click()
    visitor.settle()
    assert not visitor.page.get_by_role("dialog").count()
    visitor.page.reload()
    visitor.settle()
    opens_and_closes(visitor)  # a copied address opens it


def test_a_bar_of_labels_leads_to_its_pictures(visitor: Visitor) -> None:
    visitor.open("Attacks?n=2")
    visitor.says("gain in AUC points")
    click_point(visitor, 2, "corrected by OMS", 1)
    visitor.page.get_by_role("heading", name="Inspect", exact=True).wait_for()
    visitor.settle()
    shown = visitor.page.get_by_test_id("stCaptionContainer").filter(has_text="label 1")
    assert shown.count() == 10


def test_the_ten_most_wrongly_accused_one_by_one(visitor: Visitor) -> None:
    visitor.open("Inspect")
    visitor.says("It wrongly accuses")
    visitor.says("Picture 1 of 50")
    first = file_shown(visitor)
    visitor.shoot("inspect")
    for number in range(2, 5):
        visitor.strike("ArrowRight", "Next")
        visitor.says(f"Picture {number} of 50")
    visitor.page.get_by_text("model's x₀").wait_for()
    assert file_shown(visitor) != first
    visitor.strike("ArrowLeft", "Previous")
    visitor.says("Picture 3 of 50")
    visitor.settle()
    visitor.press("Pin")
    visitor.strike("ArrowRight", "Next")
    visitor.says("Picture 4 of 50")
    visitor.settle()
    visitor.page.get_by_text("model's x₀").nth(1).wait_for()
    visitor.shoot("inspect-pinned")
    visitor.press("Unpin")
    plots = visitor.page.locator(".js-plotly-plot").count()
    click_point(visitor, plots - 1, "", 1)
    visitor.page.get_by_text("caught member").first.wait_for()
    visitor.settle()
    visitor.shoot("inspect-together")


def file_shown(visitor: Visitor) -> str:
    return visitor.page.locator("strong").filter(has_text=".png").first.inner_text()


def test_two_rounds_of_the_game(visitor: Visitor) -> None:
    visitor.open("Step_the_search")
    visitor.press("Hide who is who")
    visitor.says("Which one was in training?")
    visitor.settle()
    for number in (1, 2):
        visitor.says("Press Step")
        visitor.strike("ArrowRight", "Step")
        visitor.says("After step 1 the noise of")
        assert not visitor.page.get_by_text("A: ").count()
        visitor.page.get_by_role("radiogroup").get_by_text("A", exact=True).click()
        visitor.settle()
        visitor.shoot(f"game-{number}")
        visitor.press("Reveal")
        visitor.says(f"of {number} right")
        visitor.shoot(f"game-{number}-revealed")
        visitor.press("Next round")
