"""A visitor without a browser, who speaks the protocol of Streamlit's websocket: fast, and not bound to the page."""

from __future__ import annotations

import json
import random
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from http.client import HTTPConnection
from typing import Any

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from websockets.sync.client import connect

SOON = 120.0  # seconds after which a test that waits has failed

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

    Args:
        address: of the server, http://...
        page: its name in the address; the start page if empty.
        query: of the address.

    Attributes:
        shown: by place on the page: kind, element and fragment.
        query: the address, as the page last wrote it.
    """

    def __init__(self, address: str, page: str = "", query: str = "") -> None:
        self.address, self.page, self.query = address, page, query
        self.shown: dict[tuple[int, ...], tuple[str, Any, str]] = {}
        with urllib.request.urlopen(f"{address}/_stcore/health", timeout=30) as answer:
            self.cookie = answer.headers["Set-Cookie"].partition(";")[0]
        url = f"{address.replace('http', 'ws')}/_stcore/stream"
        self.socket = connect(
            url, origin=address, subprotocols=["streamlit"], max_size=None, open_timeout=30, legacy=True
        )

    def run(self, states: Iterable[WidgetState] = (), query: str | None = None, fragment: str = "") -> None:
        """Let the page run until it is over.

        Args:
            states: of widgets; those that are left out keep the value that the server has.
            query: the address; by default as it is.
            fragment: only this part of the page.
        """
        message = BackMsg()
        asked = message.rerun_script
        asked.query_string = self.query if query is None else query
        asked.page_name, asked.fragment_id = self.page, fragment
        asked.widget_states.widgets.extend(states)
        self.send(message)
        if not fragment:
            self.shown.clear()
        while self.received() != "script_finished":
            pass

    def send(self, message: BackMsg) -> None:
        self.socket.send(message.SerializeToString())

    def received(self) -> str:
        """Take the next message in, and say its kind; the end of a run that is followed by another one is none."""
        message = ForwardMsg()
        message.ParseFromString(self.socket.recv(timeout=SOON))
        kind = message.WhichOneof("type")
        if kind == "script_finished" and message.script_finished == ForwardMsg.FINISHED_EARLY_FOR_RERUN:
            self.shown.clear()
            return ""
        if kind == "delta" and message.delta.WhichOneof("type") == "new_element":
            element = message.delta.new_element
            name = element.WhichOneof("type")
            self.shown[tuple(message.metadata.delta_path)] = name, getattr(element, name), message.delta.fragment_id
        if kind == "page_info_changed":
            self.query = message.page_info_changed.query_string
        return kind

    def press(self, label: str) -> None:
        """Press the button with this label."""
        button, fragment = next(
            (one, fragment) for kind, one, fragment in self.shown.values() if kind == "button" and one.label == label
        )
        self.run([state(button.id, "trigger_value", True)], fragment=fragment)

    def buttons(self) -> list[str]:
        return [one.label for kind, one, _ in self.shown.values() if kind == "button"]

    def widgets(self) -> Iterator[tuple[str, Any, str]]:
        """What a visitor can use: kind, protocol buffer and fragment."""
        return ((kind, shown, part) for kind, shown, part in self.shown.values() if kind in KINDS and shown.id)

    def find(self, kind: str, label: str) -> Any:
        """The widget with this label."""
        return next(shown for found, shown, _ in self.widgets() if found == kind and shown.label == label)

    def says(self) -> list[str]:
        """Texts and messages of the page; an exception that the page shows begins with EXCEPTION."""
        found = []
        for kind, shown, _ in self.shown.values():
            if kind in ("markdown", "alert", "heading", "text"):
                found.append(shown.body)
            elif kind == "exception":
                found.append(f"EXCEPTION {shown.type}: {shown.message}")
        return found

    def words(self) -> str:
        """Everything that the page says."""
        return "\n".join(self.says())

    def places(self, count: int) -> list[str]:
        """Addresses for so many files."""
        message = BackMsg()
        message.file_urls_request.request_id = uuid.uuid4().hex
        message.file_urls_request.file_names.extend(f"{number}.png" for number in range(count))
        self.send(message)
        deadline = time.monotonic() + SOON
        while time.monotonic() < deadline:
            answer = ForwardMsg()
            answer.ParseFromString(self.socket.recv(timeout=SOON))
            if answer.WhichOneof("type") == "file_urls_response":
                return [one.upload_url for one in answer.file_urls_response.file_urls]
        raise TimeoutError("no addresses came")

    def form(self, data: bytes) -> tuple[dict[str, str], bytes]:
        """Headers and body of a request that sends a file."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="x"; filename="x.png"\r\n\r\n'.encode()
        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Cookie": self.cookie,
            "X-Xsrftoken": self.cookie.partition("=")[2],
        }
        return headers, head + data + f"\r\n--{boundary}--\r\n".encode()

    def put(self, data: bytes) -> int:
        """Send a file that no page asks for.

        Returns:
            The HTTP status.
        """
        (place,) = self.places(1)
        headers, body = self.form(data)
        server = HTTPConnection(self.address.removeprefix("http://"), timeout=SOON)
        with suppress(ConnectionError):  # who is refused at once cannot send to the end
            server.request("PUT", place, body, headers)
        try:
            return server.getresponse().status
        finally:
            server.close()

    def close(self) -> None:
        self.socket.close()


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
