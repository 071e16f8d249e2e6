"""A visitor who speaks Streamlit's protocol without a browser, and can therefore send what no page offers."""

from __future__ import annotations

import http.cookiejar
import json
import random
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.sync.client import connect

KINDS = {  # of an element, and the field in which its state is sent
    "button": "trigger_value",
    "download_button": "trigger_value",
    "selectbox": "string_value",
    "text_input": "string_value",
    "radio": "string_value",
    "plotly_chart": "string_value",
    "dataframe": "string_value",
    "vega_lite_chart": "string_value",
    "slider": "double_array_value",
    "button_group": "string_array_value",
    "multiselect": "string_array_value",
    "checkbox": "bool_value",
    "file_uploader": "file_uploader_state_value",
}
FIELDS = [field.name for field in WidgetState.DESCRIPTOR.fields if field.name != "id"]


class Wire:
    """One visit.

    Attributes:
        elements: what the page shows, by its place: kind, protocol buffer and fragment.
        query: the address, as the page last wrote it.
    """

    def __init__(self, address: str, page: str = "", query: str = "") -> None:
        self.address, self.page, self.query = address, page, query
        self.elements: dict[tuple[int, ...], tuple[str, Any, str]] = {}
        self.jar = http.cookiejar.CookieJar()
        self.http = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self.jar))
        self.http.open(f"{address}/_stcore/health", timeout=30).read()
        cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in self.jar)
        self.open = ExitStack()
        connection = connect(
            f"{address.replace('http', 'ws')}/_stcore/stream",
            subprotocols=["streamlit"],
            additional_headers={"Cookie": cookies},
            origin=address,
            max_size=None,
            open_timeout=30,
        )
        self.socket = self.open.enter_context(connection)

    def run(self, states: Iterable[WidgetState] = (), query: str | None = None, fragment: str = "") -> None:
        """Have the page run with these states, and wait until it is drawn.

        Args:
            states: of widgets; those that are left out keep the value that the server has.
            query: the address; by default as it is.
            fragment: only this part of the page.
        """
        message = BackMsg()
        asked = message.rerun_script
        asked.query_string = self.query if query is None else query
        asked.fragment_id = fragment
        asked.page_name = self.page
        asked.widget_states.widgets.extend(states)
        if not fragment:
            self.elements = {}
        self.send(message)
        self.wait()

    def send(self, message: BackMsg) -> None:
        self.socket.send(message.SerializeToString())

    def wait(self, seconds: float = 120) -> None:
        """Take in what the server says until a run has ended.

        Raises:
            TimeoutError: none has.
        """
        end = time.monotonic() + seconds
        while True:
            message = ForwardMsg()
            message.ParseFromString(self.socket.recv(timeout=max(0, end - time.monotonic())))
            kind = message.WhichOneof("type")
            if kind == "delta" and message.delta.WhichOneof("type") == "new_element":
                element = message.delta.new_element
                shown = element.WhichOneof("type")
                place = tuple(message.metadata.delta_path)
                self.elements[place] = (shown, getattr(element, shown), message.delta.fragment_id)
            elif kind == "page_info_changed":
                self.query = message.page_info_changed.query_string
            elif kind == "script_finished" and message.script_finished != ForwardMsg.FINISHED_EARLY_FOR_RERUN:
                return

    def widgets(self) -> Iterator[tuple[str, Any, str]]:
        """What a visitor can use: kind, protocol buffer and fragment."""
        return ((kind, shown, part) for kind, shown, part in self.elements.values() if kind in KINDS and shown.id)

    def find(self, kind: str, label: str) -> Any:
        """The widget with this label."""
        return next(shown for found, shown, _ in self.widgets() if found == kind and shown.label == label)

    def says(self) -> list[str]:
        """Texts and messages of the page; an exception that the page shows begins with EXCEPTION."""
        found = []
        for kind, shown, _ in self.elements.values():
            if kind in ("markdown", "alert", "heading", "text"):
                found.append(shown.body)
            elif kind == "exception":
                found.append(f"EXCEPTION {shown.type}: {shown.message}")
        return found

    def leave(self) -> None:
        self.open.close()


def state(widget: str, field: str, value: Any) -> WidgetState:
    """The state of a widget, by its identity, in one of `FIELDS`."""
    made = WidgetState(id=widget)
    if field in ("double_array_value", "int_array_value", "string_array_value"):
        getattr(made, field).data.extend(value)
    elif field == "string_trigger_value":
        made.string_trigger_value.data = value
    elif field == "file_uploader_state_value":
        made.file_uploader_state_value.uploaded_file_info.add(file_id=value, name=value, size=2**40)
    elif field == "arrow_value":
        made.arrow_value.data = value.encode()
    elif field == "chat_input_value":
        made.chat_input_value.data = value
    else:
        setattr(made, field, value)
    return made


def forged(rng: random.Random, widget: str, field: str, words: list[str]) -> WidgetState:
    """A state that a page does not offer: half of them of the right type, with hostile content."""
    field = field if rng.random() < 0.5 and field != "trigger_value" else rng.choice(FIELDS)
    return state(widget, field, hostile(rng, field, words))


def hostile(rng: random.Random, field: str, words: list[str]) -> Any:
    """A value for a field."""
    word, number = rng.choice(words), rng.choice([float("nan"), float("inf"), -float("inf"), -1.0, 1e308, 99999.0, 0.5])
    if field in ("string_value", "json_value", "json_trigger_value"):
        return rng.choice([word, json.dumps(selection(rng, word)), json.dumps(word)])
    if field == "string_array_value":
        return [rng.choice(words) for _ in range(rng.choice([1, 1, 2, 50]))]
    if field == "double_array_value":
        return [number] * rng.choice([1, 1, 2, 50])
    if field == "int_array_value":
        return [rng.choice([-1, 2**62, 99999])] * rng.choice([1, 50])
    return {
        "trigger_value": True,
        "bool_value": True,
        "double_value": number,
        "int_value": rng.choice([-1, 2**62, 99999]),
        "bytes_value": word.encode(),
    }.get(field, word)


def selection(rng: random.Random, word: str) -> Any:
    """What a chart or a table would send, with content that it does not show."""
    one = rng.choice([word, [word], {"a": word}, 10**30, None, True])
    return rng.choice(
        [
            {"selection": {"points": [{"customdata": one}], "point_indices": [0], "box": [], "lasso": []}},
            {"selection": {"points": one}},
            {"selection": {"rows": [one], "columns": [], "cells": []}},
            {"selection": {"rows": [-1, 10**9]}},
            {"selection": {"picked": [{"image": one}]}},
            {"selection": {"cell": [{"t": one, "j": one}]}},
            {"selection": {"cell": [{"t": 10**9, "j": 10**9}]}},
            {"selection": one},
            {"points": one},
            [one] * 100,
            one,
        ]
    )


def address_of(values: dict[str, str]) -> str:
    """A query string."""
    return urllib.parse.urlencode(values)
