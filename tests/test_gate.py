"""The gate: whatever a browser sends, a visitor opens only what the owner opened, and the page goes on."""

from __future__ import annotations

import ast
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser import Served, own_failures, serving
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.WidgetStates_pb2 import WidgetStates
from streamlit.testing.v1 import AppTest
from test_crowd import WORDS
from wire import FIELDS, KINDS, Wire, address_of, forged, hostile, state

from oms_core import catalog
from oms_core.errors import InputError
from oms_core.location import Location
from pages.common import gate
from pages.common.context import Context

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [ROOT / "app.py", *sorted((ROOT / "pages").rglob("*.py"))]
PAGES = ["", *(path.stem.partition("_")[2] for path in sorted((ROOT / "pages").glob("*.py")))]
CASES = int(os.environ.get("OMS_FORGED", "5000"))  # forged values sent in all, over all pages

WATCH = """
import os, sys, threading
LOOKS = {"open", "os.scandir", "os.listdir", "os.chdir", "sqlite3.connect"}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect",
          "socket.getaddrinfo"}
seen, guard, target = set(), threading.Lock(), os.environ["WATCH"]
writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, given):
    if event not in LOOKS and event not in STARTS:
        return
    what = given[1] if event == "socket.connect" else given[0] if given else ""
    text = os.fsdecode(what) if isinstance(what, (str, bytes, os.PathLike)) else repr(what)
    text = text if event in STARTS or text.isdecimal() else os.path.abspath(text)
    line = f"{event}\\t{text!r}\\n"
    if line not in seen:
        seen.add(line)
        os.write(writer, line.encode())
sys.addaudithook(note)
"""


STARTS = ("socket", "subprocess", "os.system", "os.exec", "os.posix_spawn", "os.fork")


class Owned(NamedTuple):
    """A server with what its owner opened, and what he did not.

    Attributes:
        served: the server.
        events: a file with every file, folder and connection that the server opened.
        opened: the folders that the owner opened.
        private: a folder that looks like images and like a model, which the owner did not open.
    """

    served: Served
    events: Path
    opened: Path
    private: Path


@pytest.fixture(scope="module")
def owned(tmp_path_factory: pytest.TempPathFactory, pipeline: Path, pictures: Path) -> Iterator[Owned]:
    folder = tmp_path_factory.mktemp("owned")
    opened, private, watcher = folder / "opened", folder / "private", folder / "watcher"
    shutil.copytree(pipeline, opened / "models" / "tiny")
    (opened / "images").mkdir()
    shutil.copytree(pictures, private / "set")
    shutil.copytree(pipeline, private / "model")
    watcher.mkdir()
    (watcher / "sitecustomize.py").write_text(WATCH)
    environment = {
        "WATCH": str(folder / "events"),
        "PYTHONPATH": os.pathsep.join([str(watcher), str(ROOT)]),
        "OMS_MODELS": str(opened / "models"),
        "OMS_IMAGES": str(opened / "images"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
    }
    with serving(folder, **environment) as served:
        yield Owned(served, folder / "events", opened, private)


def strangers(owned: Owned, folder: Path) -> list[str]:
    """What a server opened, listed, started or called outside its own files, its cache and the owner's folders."""
    homes = [
        ROOT,
        folder,
        owned.opened,
        owned.events.parent / "watcher",
        sys.prefix,
        sys.base_prefix,
        *filter(None, sys.path),
    ]
    known = tuple({str(form) for home in homes for form in (Path(home), Path(home).resolve())})
    python = ("/proc/", "/dev/", "/etc/localtime", "/etc/mime.types", "/usr/share/zoneinfo")
    streamlit = ("/etc/machine-id", str(Path.home() / ".streamlit"))
    found = []
    for line in owned.events.read_text().splitlines():
        event, _, text = line.partition("\t")
        place = ast.literal_eval(text)
        if event.startswith(STARTS) or not (place.isdecimal() or place.startswith((*known, *python, *streamlit))):
            found.append(line)
    return found


def test_the_forged_image_set_of_a_visitor_is_refused(owned: Owned) -> None:
    """A visitor sends a name that the select box does not offer, and would be shown images of any folder."""
    visitor = Wire(owned.served.address, "Step_the_search", address_of({"model": "tiny", "images": "digits"}))
    visitor.run()
    sets = visitor.find("selectbox", "Image set")
    assert [*sets.options] == ["digits", "fashion"]
    private = owned.private / "set"
    visitor.run([state(sets.id, "string_value", f"member={private}/member,nonmember={private}/nonmember")])
    said = " ".join(visitor.says())
    assert "The browser sent a value that 'Image set' does not offer" in said
    assert "EXCEPTION" not in said
    assert visitor.query == "model=tiny&images=digits"
    assert str(owned.private) not in owned.events.read_text()
    visitor.close()


@pytest.mark.parametrize("name", ["{}/model", "../private/model", "owner/name", "ideal:{}/set", "ddpm-digits@../x"])
def test_a_forged_model_of_a_visitor_is_refused(owned: Owned, name: str) -> None:
    visitor = Wire(owned.served.address)
    visitor.run()
    box = visitor.find("selectbox", "Model")
    visitor.run([state(box.id, "string_value", name.format(owned.private))])
    assert "The browser sent a value that 'Model' does not offer" in " ".join(visitor.says())
    assert visitor.query == ""
    assert str(owned.private) not in owned.events.read_text()
    visitor.close()


def test_a_widget_of_another_page_is_not_there(owned: Owned) -> None:
    """Streamlit knows every widget that it ever drew, and runs its callback; a key may be another widget's by then."""
    visitor = Wire(owned.served.address, "Attacks", "model=sd-fashion")
    visitor.run()
    more, pairs = visitor.find("checkbox", "**+ One More Step**").id, visitor.find("selectbox", "Captions").id
    for page in ("Inspect", "Step_the_search", ""):
        visitor.page, visitor.query = page, "model=uvit-digits"
        visitor.run()
        stale = [state(more, "bool_value", True), state(pairs, "string_value", "none")]
        visitor.run(stale)
        assert visitor.query == "model=uvit-digits"
        assert not [text for text in visitor.says() if text.startswith("EXCEPTION") or "should not" in text]
    visitor.page = "Step_the_search"
    visitor.run()
    button = visitor.find("button", "New pair").id
    visitor.page = "Convergence"
    visitor.run()
    visitor.run([state(button, "trigger_value", True)])
    assert "first" not in visitor.query
    assert "Traceback" not in owned.served.log.read_text()
    visitor.close()


def test_names_that_are_no_utf_8_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline: Path) -> None:
    shutil.copytree(pipeline, tmp_path / os.fsdecode(b"\xff\xfe"))
    monkeypatch.setenv("OMS_MODELS", str(tmp_path))
    monkeypatch.setenv("OMS_IMAGES", str(tmp_path))
    assert [*gate.image_sets()] == ["digits", "fashion"]
    assert not any(place.startswith(str(tmp_path)) for place in gate.models().values())


def test_a_choice_that_is_offered_is_taken(owned: Owned) -> None:
    visitor = Wire(owned.served.address)
    visitor.run()
    visitor.run([state(visitor.find("selectbox", "Model").id, "string_value", "tiny")])
    assert visitor.query == "model=tiny"
    assert not [text for text in visitor.says() if "does not offer" in text]
    visitor.close()


def test_states_that_come_before_the_gate_is_there_are_forgotten(
    owned: Owned, tmp_path: Path, cache_folder: Path
) -> None:
    """The first message to a new server runs before any page is loaded; the identity of a widget can be guessed."""
    guess = Wire(owned.served.address)
    guess.run()
    known = guess.find("selectbox", "Model").id
    guess.close()
    with serving(tmp_path, OMS_MODELS=str(owned.opened / "models")) as fresh:
        visitor = Wire(fresh.address)
        visitor.run([state(known, "string_value", str(owned.private / "model"))])
        assert visitor.find("selectbox", "Model").id == known
        visitor.run()
        assert visitor.query == ""
        assert not [text for text in visitor.says() if "private" in text]
        visitor.close()


def test_messages_that_concern_others_are_ignored(owned: Owned) -> None:
    visitor = Wire(owned.served.address, "Attacks")
    visitor.run()
    visitor.run([state(visitor.find("selectbox", "Model").id, "string_value", "uvit-digits")])
    for message in (BackMsg(clear_cache=True), BackMsg(load_git_info=True), BackMsg(set_run_on_save=True)):
        visitor.send(message)
    visitor.run()
    assert visitor.query == "model=uvit-digits"
    assert "subprocess.Popen" not in owned.events.read_text()
    visitor.close()


def words_of(owned: Owned) -> list[str]:
    """What a hostile visitor would try in place of a choice."""
    private = owned.private
    return [
        *WORDS, str(private), f"{private}/model", f"member={private}/set/member,nonmember={private}/set/nonmember",
        f"ideal:{private}/set", "ideal:../x", f"{private}/x.npz@{private}/set", "x.npz@digits", "hub:owner/name:train",
        "member=digits,nonmember=fashion", "ddpm-digits@", "ddpm-digits@999999", "\ud7ff", "nan", "-inf", "1e999", "",
        "text:", "text:\x1b[2J", "[log in](//127.0.0.1:9/x)", "http://127.0.0.1:9/x", "$x$", ":material/home:",
    ]  # fmt: skip


def test_thousands_of_forged_values_open_nothing_and_break_no_page(owned: Owned) -> None:
    rng, words, sent, number = random.Random(14), words_of(owned), 0, 0
    fields = [*gate.ADDRESS]
    while sent < CASES:
        page = PAGES[number % (len(PAGES) if number < 2 * len(PAGES) else len(PAGES) - 1)]  # the last one takes seconds
        visitor = Wire(owned.served.address, page, address_of({"model": rng.choice(["ddpm-digits", "sd-fashion"])}))
        visitor.run()
        calm, title = visitor.query, visitor.says()[0]
        for turn in range(6):
            found = [(kind, shown.id) for kind, shown, _ in visitor.widgets()]
            states = [forged(rng, widget, KINDS[kind], words) for kind, widget in found if kind not in BUTTONS]
            states += [forged(rng, f"$$ID-{rng.random()}-{rng.choice(words[:9])}", "string_value", words)]
            chosen = rng.sample(fields, 4)
            query = address_of({name: rng.choice(words) for name in chosen}) if turn == 5 else None
            visitor.run(states, query)
            sent += len(states) + (len(chosen) if query else 0)
            said = visitor.says()
            assert said[0] == title
            assert not [text for text in said if text.startswith("EXCEPTION") or "should not" in text], (page, said)
        visitor.run(query=calm)
        assert visitor.shown
        visitor.close()
        number += 1
    assert own_failures(owned.served.log.read_text()) == []
    assert "Traceback" not in owned.served.log.read_text()
    assert strangers(owned, owned.events.parent / "cache") == []


def test_forged_values_beside_a_visitors_own_images_break_nothing(owned: Owned) -> None:
    rng, words = random.Random(15), words_of(owned)
    visitor = Wire(owned.served.address, "Try_your_images")
    visitor.run()
    visitor.run([state(visitor.find("button", "Ten known members").id, "trigger_value", True)])
    for _ in range(120):
        if any(shown.label == "Save as CSV" for kind, shown, _ in visitor.widgets() if kind == "download_button"):
            break
        time.sleep(0.5)
        visitor.run()
    views = visitor.find("button_group", "Look at")
    for view in ("Each picture", "The collection", "Edit one"):
        visitor.run([state(views.id, "string_array_value", [view])])
        for _ in range(5):
            found = [(kind, shown.id) for kind, shown, _ in visitor.widgets() if kind not in BUTTONS]
            visitor.run([forged(rng, one, KINDS[kind], words) for kind, one in found if one != views.id])
            said = visitor.says()
            assert not [text for text in said if text.startswith("EXCEPTION") or "should not" in text], said
            assert [text for text in said if "does not offer" in text]
    assert own_failures(owned.served.log.read_text()) == []
    visitor.close()


BUTTONS = ("button", "download_button")  # which may be pressed by anybody, and carry nothing


def drawn(page: str) -> AppTest:
    test = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60)
    if page:
        test.switch_page(next(str(path.relative_to(ROOT)) for path in SHOWN if path.stem.endswith(page)))
    return test.run()


@pytest.mark.parametrize("page", PAGES)
def test_a_state_of_a_wrong_type_leaves_every_choice_as_it_was(page: str) -> None:
    rng, test = random.Random(1), drawn(page)
    context, own = test.session_state["context"], test._tree.get_widget_states()
    for field in FIELDS:
        wrong = [one.id for one in own.widgets if one.WhichOneof("value") != field]
        test._run(
            WidgetStates(widgets=[state(one, field, hostile(rng, field, ["/etc", "x" * 10**5])) for one in wrong])
        )
        assert not test.exception
        assert test.session_state["context"] == context


# The rules


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (gate.one_of([None, 20, 50]), [None, 20], [True, 20.0, "20", 21, [20], float("nan")]),
        (gate.one_of([0, 1]), [0, 1], [True, False, 0.0]),
        (gate.some_of(["a", "b"]), [[], ["a"], ["b", "a"]], ["a", None, ["c"], ["a", 1], {"a": 1}]),
        (gate.between(0, 10), [0, 10, 7], [-1, 11, 5.0, True, "5", None]),
        (gate.between(0.0, 3.0), [0.0, 3.0], [3.1, float("nan"), float("inf"), 1, None]),
        (gate.is_flag, [True, False], [0, 1, None, "true"]),
        (gate.is_words, ["", "a cat", "a\tb\n", "é" * 200, "\u202eabc"], [None, 1, "a" * 201, "a\0", "a\x1b[2J"]),
        (gate.rows_below(3), [{"selection": {"rows": []}}, {"selection": {"rows": [2]}}],
         [{"selection": {"rows": [3]}}, {"selection": {"rows": [-1]}}, {"selection": {"rows": [True]}},
          {"selection": {"rows": ["0"]}}]),
    ],
)  # fmt: skip
def test_a_rule_admits_what_is_offered_and_nothing_else(rule: gate.Rule, good: list[Any], bad: list[Any]) -> None:
    assert all(map(rule, good))
    assert not any(map(rule, bad))


def test_a_clicked_point_carries_what_the_chart_was_drawn_with() -> None:
    rule = gate.points_of({"a", "b"})
    assert rule({"selection": {"points": [{"customdata": "a"}, {"x": 1}]}})
    assert not rule({"selection": {"points": [{"customdata": "c"}]}})
    rule = gate.marks_of("cell", t={10, 20}, j={1})
    assert rule({"selection": {}})
    assert rule({"selection": {"cell": [{"t": 10, "j": 1}]}})
    for mark in ({"t": 30, "j": 1}, {"t": 10}, {"t": 10, "j": 1, "x": 2}):
        assert not rule({"selection": {"cell": [mark]}})


def test_what_the_owner_opened_is_named_without_its_place(
    tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parent in ("one", "two"):
        shutil.copytree(pipeline, tmp_path / parent / "tiny")
        (tmp_path / parent / ".hidden").mkdir()
        (tmp_path / parent / "no model").mkdir()
    monkeypatch.setenv("OMS_MODELS", os.pathsep.join(str(tmp_path / parent) for parent in ("one", "two", "gone")))
    found = {name: place for name, place in gate.models().items() if "tiny" in name}
    assert found == {"tiny": str(tmp_path / "one" / "tiny"), "tiny (2)": str(tmp_path / "two" / "tiny")}
    assert all(isinstance(place, Location) for place in gate.models().values())
    assert gate.parse({"model": "tiny (2)"}) == ({"model": found["tiny (2)"]}, [])
    assert gate.parse({"model": found["tiny"]}) == ({"model": found["tiny"]}, [])  # as older addresses have it
    assert gate.name_of(found["tiny (2)"], gate.models()) == "tiny (2)"
    assert gate.without_roots(f"{found['tiny']}/unet/config.json is damaged") == "tiny/unet/config.json is damaged"
    values, (problem,) = gate.parse({"model": str(tmp_path / "one")})
    assert not values
    assert str(tmp_path / "two") not in problem


@pytest.mark.parametrize("place", ["model", "images"])
def test_a_plain_string_is_no_model_and_no_image_set_of_a_page(place: str) -> None:
    with pytest.raises(TypeError, match=f"{place} is no Location"):
        Context(**{place: "digits"})


def test_an_engine_opens_no_plain_string(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no built-in model"):
        catalog.describe(str(tmp_path))


# Who may do what


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """What a file calls, by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


MAKERS = {"pages/common/gate.py", "oms_core/command_line.py", "oms_core/location.py", "oms_core/bench/cluster.py",
          "oms_core/bench/kills.py"}  # fmt: skip


def test_locations_are_made_at_the_gate_and_on_the_command_line_alone() -> None:
    everything = [*SHOWN, *sorted((ROOT / "oms_core").rglob("*.py"))]
    makers = {path.relative_to(ROOT).as_posix() for path in everything if "Location" in dict(calls(path))}
    assert makers == MAKERS


WIDGETS = {
    "selectbox", "multiselect", "radio", "pills", "segmented_control", "slider", "select_slider", "toggle", "checkbox",
    "text_input", "text_area", "number_input", "date_input", "time_input", "color_picker", "file_uploader",
    "data_editor", "chat_input", "camera_input", "audio_input", "feedback",
}  # fmt: skip


def test_every_widget_of_a_page_stands_behind_the_gate() -> None:
    for path in SHOWN:
        named = [name for name, _ in calls(path) if name.rpartition(".")[2] in WIDGETS]
        assert not named, f"{path.name} shows {named} without saying what it offers"


def test_every_chart_that_can_be_clicked_says_what_it_was_drawn_with() -> None:
    clicked = [
        (path, node) for path in SHOWN for _, node in calls(path) if any(k.arg == "on_select" for k in node.keywords)
    ]
    assert len(clicked) == 4
    for path, _ in clicked:
        assert "register(" in path.read_text()
