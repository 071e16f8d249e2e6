"""Text from outside is text: names, labels, captions and addresses never become links, images or formulas."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from browser import Served, Visitor, serving

from oms_core import exhibits
from oms_core.assemble import png
from oms_core.location import Location
from oms_core.run import Run
from pages.common.text import literal

HOST = "127.0.0.1:9"  # where nothing listens
SUSPECT = "a:not([data-testid=stPageLink-NavLink]), img, image, .katex, del, s, script"
HOSTILE = [
    f"![x](http://{HOST}/i.png)", f"[log in](//{HOST}/x)", f"http://{HOST}/x", "www.evil.example", "me@evil.example",
    f"<img src=http://{HOST}/j.png>", f"<a href='http://{HOST}'>x</a>", "<script>alert(1)</script>", "$$x^2$$",
    ":red[x] :streamlit:", "# head", "- item", "1. one", "a | b", "`c`", "~~s~~ **b** _i_", "&lt;b&gt;", "=1+1",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_keeps_its_characters(text: str) -> None:
    shown = literal(text).replace("\N{WORD JOINER}", "")
    assert "".join(part.removeprefix("\\") or "\\" for part in split(shown)) == text


def split(shown: str) -> Iterator[str]:
    """Characters, those after a backslash together with it."""
    characters = iter(shown)
    for one in characters:
        yield one + next(characters) if one == "\\" else one


def test_a_text_stays_on_one_line() -> None:
    assert literal(" a\n\n# b\r\n| c") == "a # b \\| c"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose owner opened a set with hostile labels and names, scored once."""
    folder = tmp_path_factory.mktemp("hostile")
    images, rng = folder / "images" / "[set](http:) www.evil.example", np.random.default_rng(1)
    images.mkdir(parents=True)
    with (images / "metadata.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["file_name", "member", "label", "text"])
        for number in range(60):
            name = f"{number} ![x](http:) www.evil.example $$x$$ <b>.png"
            (images / name).write_bytes(png(rng.integers(0, 256, (8, 8), np.uint8)))
            text = HOSTILE[number % len(HOSTILE)]
            rows.writerow([name, number % 2 == 0, text, text])
        rows.writerow([f"![](http:) {HOST}.png", "true", "x", "x"])
    bad = folder / "images" / "bad"
    bad.mkdir()
    (bad / "metadata.csv").write_text(f"file_name,member\n![](http://{HOST}/refused).png,true\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMS_CACHE", str(folder / "cache"))
        exhibits.evaluate(Run("sd-fashion", Location(images), limit=60), None)
    with serving(folder, OMS_IMAGES=str(images.parent)) as served:
        yield served


@pytest.mark.browser
@pytest.mark.parametrize("page", ["Attacks", "Inspect"])
def test_labels_names_and_captions_are_never_markup(browser, hostile: Served, page: str) -> None:
    visitor = Visitor(browser, hostile.address)
    name = "%5Bset%5D(http%3A)%20www.evil.example"
    visitor.open(f"{page}?model=sd-fashion&images={name}&limit=60&fpr=0.1&attack=PIA")
    assert "which is ignored" not in visitor.page.inner_text("body")
    assert markup_of(visitor) == []
    visitor.leave()


@pytest.mark.browser
def test_refusals_and_addresses_are_never_markup(browser, hostile: Served) -> None:
    visitor = Visitor(browser, hostile.address)
    visitor.open("Attacks?images=bad")
    visitor.says("No picture in bad can be used")
    assert markup_of(visitor) == []
    for text in HOSTILE[:4]:
        visitor.open("Paper_method_limits?" + urlencode(dict.fromkeys(("model", "images", "fpr", "pick", "t"), text)))
        assert markup_of(visitor) == []
    visitor.leave()


@pytest.mark.browser
def test_names_of_uploads_are_never_markup(browser, hostile: Served, tmp_path: Path) -> None:
    files = []
    for number, text in enumerate(HOSTILE):
        files.append(tmp_path / f"{text.replace('/', ' ')}.png")
        files[-1].write_bytes(png(np.full((8, 8), 10 * number, np.uint8)))
    visitor = Visitor(browser, hostile.address)
    visitor.open("Try_your_images?attack=PIA")
    visitor.page.locator("input[type=file]").first.set_input_files(files)
    visitor.says("Save as CSV")
    visitor.settle()
    assert markup_of(visitor) == []
    visitor.leave()


def markup_of(visitor: Visitor) -> list[str]:
    """What the browser made of texts: links and images by where they lead, the rest as it stands."""
    found = visitor.page.query_selector_all(SUSPECT)
    pieces = [
        one.evaluate("one => one.getAttribute('src') || one.getAttribute('href') || one.outerHTML.slice(0, 300)")
        for one in found
    ]
    return [piece for piece in pieces if any(word in piece for word in (HOST, "evil.example", "x^2", "alert(", "<del"))]
