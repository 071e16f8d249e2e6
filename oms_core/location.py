"""Names that may be opened: in the app, a path or a repository is opened only when it comes as a `Location`."""

from __future__ import annotations

import threading

from oms_core.errors import InputError


class Location(str):
    """The name of a model, an image set or a captioner that whoever runs the program has the right to open.

    The built-in models and sets can be named by a plain string, and so can everything in a script or on the command
    line, whose user chooses the names. Once `refuse_plain_names` was called, as the app does, a path, an archive or a
    repository of the Hugging Face hub is opened only if its name is a `Location`, so that text from a visitor never
    becomes one. Then two places make one: the command line, and the gate of the app (`pages.common.gate`), which knows
    the folders that the owner opened.
    """

    __slots__ = ()


_refused = threading.Event()  # set once plain names are refused in this process


def refuse_plain_names() -> None:
    """From now on, and for good, let this process open no path and no repository that is named by a plain string."""
    _refused.set()


def part_of(name: str, part: str) -> str:
    """A part of a name, which may be opened exactly if the whole name may."""
    return Location(part) if isinstance(name, Location) else part


def require_location(name: str, what: str, known: str) -> None:
    """Refuse a name that may not be opened: one that is not built in and no `Location`, where that is needed.

    Args:
        name: as it was given.
        what: a model, an image set or a captioner, in words.
        known: the built-in names.

    Raises:
        InputError: it is a plain string, and this process refuses those.
    """
    if _refused.is_set() and not isinstance(name, Location):
        raise InputError(f"There is no built-in {what} {name!r}; built in are {known}.")
