"""A visitor without a browser, who speaks the protocol of Streamlit's websocket: fast, and not bound to the page."""

from __future__ import annotations

import time
import urllib.request
import uuid
from contextlib import suppress
from http.client import HTTPConnection
from typing import Any

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect

SOON = 120.0  # seconds after which a test that waits has failed


class Wire:
    """One visit.

    Args:
        address: of the server, http://...
        page: its name in the address; the start page if empty.
        query: of the address.

    Attributes:
        shown: by place on the page: kind, element and fragment.
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

    def run(self, *pressed: str, fragment: str = "") -> None:
        """Let the page run, with buttons pressed, until it is over."""
        message = BackMsg()
        asked = message.rerun_script
        asked.query_string, asked.page_name, asked.fragment_id = self.query, self.page, fragment
        for button in pressed:
            state = asked.widget_states.widgets.add()
            state.id, state.trigger_value = button, True
        self.socket.send(message.SerializeToString())
        if not fragment:
            self.shown.clear()
        while self.received() != "script_finished":
            pass

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
        return kind

    def press(self, label: str) -> None:
        """Press the button with this label."""
        button, fragment = next(
            (one, fragment) for kind, one, fragment in self.shown.values() if kind == "button" and one.label == label
        )
        self.run(button.id, fragment=fragment)

    def buttons(self) -> list[str]:
        return [one.label for kind, one, _ in self.shown.values() if kind == "button"]

    def words(self) -> str:
        """Everything that the page says."""
        bodies = {"markdown", "heading", "text", "alert"}
        return "\n".join(one.body for kind, one, _ in self.shown.values() if kind in bodies)

    def places(self, count: int) -> list[str]:
        """Addresses for so many files."""
        message = BackMsg()
        message.file_urls_request.request_id = uuid.uuid4().hex
        message.file_urls_request.file_names.extend(f"{number}.png" for number in range(count))
        self.socket.send(message.SerializeToString())
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
