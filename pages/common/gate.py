"""The gate: what a browser sends becomes a choice of a visitor only here.

Streamlit hands the state of a widget to the script as the browser sent it, whether or not the widget offers it. So a
page registers with each widget what the widget offers (`gated`), and `screen` drops every state that is something
else, before a callback or a page sees it. The address is read by `parse`. Whatever is dropped leaves the choice as
it was, and the page says so in one sentence.

Models and image sets are chosen by name. A name stands for a `Location`, which is made here for what the owner of the
app opened, and nowhere else in the pages.
"""

from __future__ import annotations

import functools
import math
import os
import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.proto.WidgetStates_pb2 import WidgetState, WidgetStates
from streamlit.runtime.app_session import AppSession
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.state.common import unpack_widget_state_value, user_key_from_element_id
from streamlit.runtime.state.session_state import SessionState

from oms_core import catalog
from oms_core.attacks import ATTACKS
from oms_core.errors import InputError
from oms_core.images import BUILT_IN
from oms_core.location import Location, refuse_plain_names

DEFAULT_MODEL = Location("ddpm-digits")
OWN_IMAGES = Location("")  # the set that a model was trained on
CAPTIONS = ("given", "blip", "none")
LONGEST_CAPTION = 200
MAX_SHOWN_STEPS = 10
RATES = (0.001, 0.01, 0.05, 0.1)
OFFERS, PAGE, DROPPED, SCREENED = "offers", "page of the offers", "dropped", "screened"
MAX_OFFERS = 200  # of one visit; a page has some twenty
MESSAGES = ("rerun_script", "app_heartbeat", "stop_script", "file_urls_request", "backend_operation_request")
MAX_STATE_BYTES = 256 * 2**10  # of one widget

Rule = Callable[[Any], bool]


# What there is to choose from


def models() -> dict[str, Location]:
    """The models that a visitor may choose, by name: built in, closed form, and what the owner opened."""
    names = [*catalog.built_in(), *(f"ideal:{images}" for images in BUILT_IN)]
    return with_opened(names, "OMS_MODELS", ("model_index.json", "config.json"))


def image_sets() -> dict[str, Location]:
    """The image sets that a visitor may choose, by name: built in, and what the owner opened."""
    return with_opened(BUILT_IN, "OMS_IMAGES")


def snapshots() -> dict[str, Location]:
    """The built-in models after each epoch whose weights were kept, by name."""
    names = [f"{name}@{epoch}" for name in catalog.built_in() for epoch in catalog.epochs(name)]
    return {name: Location(name) for name in names}


def after_epoch(base: str, epoch: int, default: int) -> Location:
    """A built-in model with the weights after an epoch; the default epoch needs no mention."""
    return models()[base] if epoch == default else snapshots()[f"{base}@{epoch}"]


def with_opened(names: Iterable[str], setting: str, marks: tuple[str, ...] = ()) -> dict[str, Location]:
    """Built-in names and what lies directly below the folders that a setting names; a repeated name gets a number.

    Args:
        names: the built-in ones.
        setting: an environment variable with folders, separated as in PATH, which only the owner sets.
        marks: a folder counts if it holds one of these files; without marks archives and parquet files count too.
    """
    found = {name: Location(name) for name in names}
    for path in opened(setting, marks):
        name, count = path.name, 1
        while name in found:
            count += 1
            name = f"{path.name} ({count})"
        found[name] = Location(path)
    return found


def opened(setting: str, marks: tuple[str, ...]) -> list[Path]:
    """What lies directly below the folders that a setting names, and has a name to show, see `with_opened`."""
    return [
        path
        for root in roots(setting)
        for path in sorted(root.glob("*"))
        if not path.name.startswith(".")
        and is_utf_8(path.name)
        and (
            any((path / mark).is_file() for mark in marks)
            if marks
            else path.is_dir() or path.suffix in (".zip", ".parquet")
        )
    ]


def is_utf_8(name: str) -> bool:
    """Whether a name can be written, as the names of some old archives cannot."""
    return not any(unicodedata.category(character) == "Cs" for character in name)


def roots(*settings: str) -> list[Path]:
    """The folders that settings name."""
    named = (os.environ.get(setting, "").split(os.pathsep) for setting in settings)
    return [Path(root).resolve() for group in named for root in group if root]


def name_of(location: str, choices: dict[str, Location]) -> str:
    """The name by which a model or an image set is chosen."""
    return next((name for name, one in choices.items() if one == location), os.path.basename(location))


def base_of(model: Location) -> str:
    """The name of a model without the epoch of its weights."""
    base = model.partition("@")[0]
    return base if base in catalog.built_in() else name_of(model, models())


def without_roots(text: str) -> str:
    """A text without the places of the owner's folders, which are no business of a visitor."""
    for root in roots("OMS_MODELS", "OMS_IMAGES"):
        text = text.replace(f"{root}{os.sep}", "")
    return text


# What may stand in the address


def parse(params: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Known parameters of an address as values, and a sentence for each one that cannot be used."""
    values, problems = {}, []
    for name, read in ADDRESS.items():
        if name in params:
            try:
                values[name] = read(params[name])
            except (ValueError, OverflowError, InputError) as error:
                reason = str(error) if isinstance(error, InputError) else "it has not the form that is needed."
                problems.append(f"The address asks for {name} = {params[name][:40]!r}, which is ignored: {reason}")
    return values, problems


def whole_number(low: int, high: int, text: str) -> int:
    """A whole number between limits."""
    if len(text) > 12 or not low <= int(text) <= high:
        raise InputError(f"it must be a whole number between {low} and {high}.")
    return int(text)


def rate(text: str) -> float:
    """One of `RATES`."""
    if float(text) not in RATES:
        raise InputError(f"it must be one of {', '.join(map(str, RATES))}.")
    return float(text)


def chosen(kind: str, choices: Callable[[], dict[str, Location]], text: str) -> Location:
    """The model or image set that a name, or the place of what the owner opened, stands for."""
    known = choices()
    for name, location in known.items():
        if text in (name, location):
            return location
    raise InputError(f"the {kind} here are {', '.join(known)}.")


def captions(text: str) -> str:
    """A source of captions, or one caption for every image."""
    if text in CAPTIONS or (text.startswith("text:") and is_words(text.removeprefix("text:"))):
        return text
    raise InputError(f"captions are {', '.join(CAPTIONS)}, or text: and at most {LONGEST_CAPTION} characters.")


def attack(text: str) -> str:
    """The name of an attack."""
    if text not in ATTACKS:
        raise InputError(f"the attacks are {', '.join(ATTACKS)}.")
    return text


def image(text: str) -> str:
    """The beginning of an image's SHA-256."""
    if not (text.isascii() and text.isalnum() and len(text) <= 64):
        raise InputError("it is not the name of an image.")
    return text


ADDRESS: dict[str, Callable[[str], Any]] = {
    "model": functools.partial(chosen, "models", lambda: models() | snapshots()),
    "images": functools.partial(chosen, "image sets", image_sets),
    "captions": captions,
    "attack": attack,
    "t": functools.partial(whole_number, 0, 2**31 - 1),
    "n": functools.partial(whole_number, 1, 3),
    "seed": functools.partial(whole_number, 0, 2**31 - 1),
    "limit": functools.partial(whole_number, 20, 10**6),
    "fpr": rate,
    "first": image,
    "second": image,
    "step": functools.partial(whole_number, 0, MAX_SHOWN_STEPS),
    "pick": image,
}


# What a widget may send


@dataclass(frozen=True)
class Offer:
    """What a widget offers.

    Attributes:
        label: of the widget, for the sentence about a value that was dropped.
        rule: whether a value is among what is offered.
    """

    label: str
    rule: Rule


def gated(widget: Callable[..., Any], label: str, key: str, rule: Rule, *given: Any, **options: Any) -> Any:
    """A widget of which only those values come back that a rule admits.

    Args:
        widget: a function of Streamlit, or of a column, that takes a label and a key.
        label, key, given, options: its arguments.
        rule: what it offers.
    """
    register(key, label, rule)
    return widget(label, *given, key=key, **options)


def gated_choice(widget: Callable[..., Any], label: str, key: str, options: Collection[Any], **more: Any) -> Any:
    """A widget that offers one of some options; where more than one can be chosen, any of them."""
    several = widget.__name__ == "multiselect" or more.get("selection_mode") == "multi"
    return gated(widget, label, key, (some_of if several else one_of)(options), options, **more)


def register(key: str, label: str, rule: Rule) -> None:
    """Say what the widget with this key offers; a chart is one if it can be clicked."""
    offers = st.session_state.setdefault(OFFERS, {})
    offers.pop(key, None)
    offers[key] = Offer(label, rule)
    while len(offers) > MAX_OFFERS:
        del offers[next(iter(offers))]


def one_of(options: Collection[Any]) -> Rule:
    """The value is one of some options."""
    return lambda value: any(type(value) is type(one) and value == one for one in options)


def some_of(options: Collection[Any]) -> Rule:
    """The value is a list of options."""
    each = one_of(options)
    return lambda value: isinstance(value, list | tuple) and all(map(each, value))


def between(low: float, high: float) -> Rule:
    """The value is a number within limits, a whole number if the limits are."""
    kind = int if isinstance(low, int) and isinstance(high, int) else float
    return lambda value: type(value) is kind and math.isfinite(value) and low <= value <= high


def is_flag(value: Any) -> bool:
    """The value is true or false."""
    return isinstance(value, bool)


def is_words(value: Any) -> bool:
    """The value is a caption: a short text, in which white space is the only thing that does not show."""
    if not isinstance(value, str) or len(value) > LONGEST_CAPTION:
        return False
    return not any(unicodedata.category(one) in ("Cc", "Cs") for one in value if not one.isspace())


def are_files(value: Any) -> bool:
    """The value is a list of files that this visitor sent; what is in them is judged by `oms_core.uploads`."""
    return isinstance(value, list)


def rows_below(count: int) -> Rule:
    """The value is a selection of rows of a table of so many rows."""
    return lambda value: all(type(row) is int and 0 <= row < count for row in value["selection"]["rows"])


def points_of(carried: Collection[Any]) -> Rule:
    """The value is a selection of points of a Plotly chart, each of which carries what the chart was drawn with."""
    known = {None, *carried}
    return lambda value: all(point.get("customdata") in known for point in value["selection"]["points"])


def marks_of(name: str, **fields: Collection[Any]) -> Rule:
    """The value is a selection of marks of an Altair chart, each with values that the chart was drawn with."""

    def rule(value: Any) -> bool:
        marks = value["selection"].get(name, [])
        return all(mark.keys() == fields.keys() and all(mark[f] in fields[f] for f in fields) for mark in marks)

    return rule


def screen(session: SessionState, sent: WidgetStates) -> WidgetStates:
    """Of the states that a browser sent, those that its widgets offer; `report` names the widgets of the others."""
    offers = session[OFFERS] if OFFERS in session else {}  # noqa: SIM401 - it has no get
    kept, dropped = WidgetStates(), []
    for state in sent.widgets:
        known = offers.get(user_key_from_element_id(state.id))
        if admitted(session, state, known):
            kept.widgets.append(state)
        elif known is not None and is_drawn(session, state.id):  # else it is a remnant of another page
            dropped.append(known.label)
    if dropped:
        session[DROPPED] = list(dict.fromkeys(dropped))
    return kept


def admitted(session: SessionState, state: WidgetState, known: Offer | None) -> bool:
    """Whether a state is what a widget of this visitor's page offers; a button needs no offer to be pressed."""
    metadata = session.get_widget_metadata(state.id)
    kind = state.WhichOneof("value")
    if metadata is None or (kind and metadata.value_type and kind != metadata.value_type):
        return False
    if metadata.value_type == "trigger_value":
        return state.id in session._new_widget_state.states or state.id in session._old_state
    if known is None or not is_drawn(session, state.id) or state.ByteSize() > MAX_STATE_BYTES:
        return False
    try:
        return bool(known.rule(metadata.deserializer(unpack_widget_state_value(state))))
    except Exception:  # whatever a forged value does to Streamlit's own reading of it
        return False


def is_drawn(session: SessionState, widget: str) -> bool:
    """Whether a widget with a key is the last one that was drawn with it: a key may be another page's as well."""
    return session._key_id_mapper.get_id_from_key(user_key_from_element_id(widget) or "") == widget


def enter() -> None:
    """Forget what another page offered, and states that came before the gate was there.

    These are of visits that began while the server loaded the page.
    """
    run, visit = get_script_run_ctx(), st.session_state
    if run is None:
        return
    if SCREENED not in visit:
        run.session_state._state._new_widget_state.states.clear()
    if visit.get(PAGE) != run.page_script_hash:
        visit[PAGE], visit[OFFERS] = run.page_script_hash, {}


def report() -> None:
    """One sentence about values that were dropped, once."""
    labels = st.session_state.pop(DROPPED, [])
    if labels:
        st.warning(
            f"The browser sent a value that {' and '.join(map(repr, labels))} does not offer; the choice stays as it "
            "was. Choose one that is offered.",
            icon=":material/block:",
        )


def install() -> None:
    """Put the gate before every script run, refuse messages that concern other visitors, and let the engine open
    nothing that is named by a plain string; once per process.

    Streamlit has no place for this, so two of its methods are wrapped; a test sends forged states through a real
    connection and fails if they are not.
    """
    if hasattr(SessionState.on_script_will_rerun, "__wrapped__"):
        return
    refuse_plain_names()
    will_rerun, handle = SessionState.on_script_will_rerun, AppSession.handle_backmsg

    @functools.wraps(will_rerun)
    def screened(session: SessionState, sent: WidgetStates | None, **more: Any) -> None:
        session[SCREENED] = True
        will_rerun(session, None if sent is None else screen(session, sent), **more)

    @functools.wraps(handle)
    def selected(session: AppSession, message: Any) -> None:
        if message.WhichOneof("type") in MESSAGES:
            handle(session, message)

    SessionState.on_script_will_rerun, AppSession.handle_backmsg = screened, selected


install()
