"""The page Try your images: upload, verdict, edits, export, and that nothing is left of a visitor's pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from test_pages import opened, words

from oms_core.assemble import png
from oms_core.images import open_images
from oms_core.jobs import SERVICE

PAGE = "pages/5_Try_your_images.py"


def digits(role: str, count: int) -> list[tuple[str, bytes, str]]:
    images = open_images("digits").with_role(role).limit(count)
    return [(f"{role} {row}.png", images.read(row), "image/png") for row in images.table.index]


def sent(test: AppTest, files: list[tuple[str, bytes, str]]) -> AppTest:
    """Upload files, and wait until they are scored."""
    test.file_uploader[0].set_value(files)
    return scored(test.run())


def scored(test: AppTest) -> AppTest:
    """The page once the visitor's pictures are scored."""
    deadline = time.monotonic() + 60
    while not test.session_state["own signals"] and time.monotonic() < deadline:
        time.sleep(0.2)
        test.run()  # as the page does while it waits; a job that nobody looks at stops
    return test.run()


def pressed(test: AppTest, label: str) -> AppTest:
    next(button for button in test.button if button.label == label).click()
    return test.run()


@pytest.fixture
def visit() -> AppTest:
    return opened(PAGE, attack="PIA", fpr="0.01")


def test_the_page_begins_with_what_to_do(visit: AppTest) -> None:
    assert not visit.exception
    assert "Choose pictures above, or an example" in words(visit)
    assert "not on disk, not in the address" in words(visit)


def test_uploaded_pictures_get_a_verdict_each_without_and_with_one_more_step(visit: AppTest) -> None:
    sent(visit, digits("member", 3) + digits("nonmember", 3) + [("notes.png", b"no picture", "image/png")])
    assert not visit.exception
    said = words(visit)
    assert "pictures are flagged as published at 1 %" in said
    assert "pictures are flagged with One More Step at 1 %" in said
    assert "Of 597 known members PIA flags at 1 %" in said
    assert "As published: " in said
    assert "With One More Step: " in said
    table = next(frame.value for frame in visit.dataframe if "sent" in frame.value)
    assert len(table) == 6
    assert table[["p", "p +OMS"]].notna().all(axis=None)
    assert table.sent.str.startswith("data:image/png;base64,").all()
    rejected = next(frame.value for frame in visit.dataframe if "reason" in frame.value)
    assert rejected.file.tolist() == ["notes.png"]
    assert len(visit.get("download_button")) == 3


def test_no_name_in_a_table_is_run_by_a_spreadsheet_that_opens_what_the_table_saves(visit: AppTest) -> None:
    _, data, kind = digits("member", 1)[0]
    sent(visit, [('=HYPERLINK("x").png', data, kind), ("+1.png", b"no picture", kind)])
    tables = {"sent": '\'=HYPERLINK("x").png', "reason": "'+1.png"}
    for column, expected in tables.items():
        assert next(one.value for one in visit.dataframe if column in one.value).file.tolist() == [expected]


def test_the_address_and_the_cache_know_nothing_of_the_pictures(visit: AppTest, cache_folder: Path) -> None:
    before = {path for path in cache_folder.rglob("*") if path.is_file()}
    sent(visit, digits("member", 2))
    visit.session_state["upload view"] = "Edit one"
    visit.run()
    images = visit.session_state["uploads"].table.image
    assert not any(image[:8] in str(value) for image in images for value in visit.query_params.values())
    assert set(visit.query_params) <= {"attack", "fpr"}
    assert {path for path in cache_folder.rglob("*") if path.is_file()} == before


def test_a_second_visitor_sees_nothing_of_the_first(visit: AppTest) -> None:
    sent(visit, digits("member", 2))
    other = opened(PAGE, attack="PIA", fpr="0.01")
    assert "uploads" not in other.session_state
    assert "Choose pictures above" in words(other)


def test_a_finished_job_holds_no_pictures(visit: AppTest) -> None:
    sent(visit, digits("member", 2))
    own = [job for key, job in SERVICE.jobs.items() if key.startswith(visit.session_state["viewer"])]
    assert own
    assert all(job.work is None and not job.signals for job in own)


def test_pictures_can_be_removed_and_replaced(visit: AppTest) -> None:
    sent(visit, digits("member", 3))
    first = visit.session_state["uploads"].digest
    sent(visit, digits("nonmember", 2))
    assert visit.session_state["uploads"].digest != first
    assert len(visit.session_state["uploads"]) == 2
    pressed(visit, "Remove your pictures")
    assert not visit.exception
    assert visit.session_state["uploads"] is None
    assert "Choose pictures above" in words(visit)


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"no picture", "No picture in your upload can be used"), (b"", "the file is empty")],
)
def test_what_is_no_picture_is_refused_in_a_sentence(visit: AppTest, data: bytes, says: str) -> None:
    visit.file_uploader[0].set_value([("a.png", data, "image/png")])
    visit.run()
    assert not visit.exception
    assert says in visit.error[0].value
    assert "Choose pictures above" in words(visit)
    sent(visit, digits("member", 2))  # the next upload works, and the old sentence is gone
    assert not visit.error


def test_the_names_of_files_are_never_read_as_markup(visit: AppTest) -> None:
    hostile = ["![x](http://evil.example/i.png)", "<script>alert(1)</script>", ":red[a] $x$"]
    files = [(name, data, "image/png") for name, (_, data, _) in zip(hostile, digits("member", 3), strict=True)]
    sent(visit, files)
    assert not visit.exception
    assert not any(name in words(visit) for name in hostile)
    assert visit.text[0].value == hostile[0]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("Ten known members", "more member-like than known non-members"),
        ("Ten known non-members", "not to be told from known non-members"),
        ("The same, inverted", "may measure how these sets differ, and not membership"),
    ],
)
def test_an_example_says_what_it_should(visit: AppTest, label: str, expected: str) -> None:
    scored(pressed(visit, label))
    visit.session_state["upload view"] = "The collection"
    visit.run()
    assert not visit.exception
    assert expected in words(visit)
    assert "It takes, to decide a set at 1 %" in words(visit)


def test_an_edit_moves_the_path_and_the_score_while_the_noise_stays(visit: AppTest) -> None:
    sent(visit, digits("member", 2))
    visit.session_state["upload view"] = "Edit one"
    visit.run()
    table = visit.table[-1].value
    assert not visit.exception
    assert table.score.iloc[0] == table.score.iloc[1]  # not edited yet: the same noise, the same score
    visit.slider(key="noise").set_value(40)
    visit.run()
    table = visit.table[-1].value
    assert float(table.score.iloc[1]) < float(table.score.iloc[0])
    visit.select_slider(key="jpeg").set_value(5)
    visit.slider(key="crop").set_value(20)
    visit.slider(key="blur").set_value(1.0)
    visit.toggle(key="mirror").set_value(True)
    visit.run()
    assert not visit.exception
    assert not visit.error


@pytest.mark.parametrize("model", ["uvit-digits", "sd-fashion"])
def test_it_works_for_every_kind_of_model(model: str) -> None:
    test = opened(PAGE, model=model, attack="NA", fpr="0.05")
    scored(pressed(test, "Ten known members"))
    assert not test.exception
    assert "pictures are flagged as published at 5 %" in words(test)
    test.session_state["upload view"] = "Edit one"
    test.run()
    assert not test.exception
    assert not test.error


def test_large_colour_photographs_are_fitted_and_it_is_said(visit: AppTest) -> None:
    rng = np.random.default_rng(0)
    photo = png(rng.integers(0, 256, (300, 400, 3), np.uint8))
    sent(visit, [("photo.png", photo, "image/png")])
    table = next(frame.value for frame in visit.dataframe if "sent" in frame.value)
    changed = table["changed on the way"].iloc[0]
    assert "colours converted to grey" in changed
    assert "400 x 300 resized to 8 x 8, its longer side cropped" in changed
    assert "look unlike every known non-member" in words(visit)


def test_the_files_to_save_hold_the_findings(visit: AppTest, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {}
    monkeypatch.setattr(
        "streamlit.delta_generator.DeltaGenerator.download_button",
        lambda self, label, data, *rest, **options: saved.update({label: data}),
    )
    sent(visit, digits("member", 2))
    assert json.loads(saved["Save as JSON"]())["attack"] == "PIA"
    assert saved["Save as CSV"]().startswith("file,image,n,score,")
    assert "<h1>What can be said of 2 pictures</h1>" in saved["Save as HTML"]()
