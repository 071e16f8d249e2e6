"""Names that may be opened: a path or a repository is opened only when it comes as a `Location`."""

from __future__ import annotations

from oms_core.errors import InputError


class Location(str):
    """The name of a model, an image set or a captioner that whoever runs the program has the right to open.

    The built-in models and sets can be named by a plain string. A path, an archive or a repository of the Hugging Face
    hub is opened only if its name is a `Location`, so that text from elsewhere (a browser, a file, an address) never
    becomes one by accident. Three places make one: the command line, a Python user, and the gate of the app
    (`pages.common.gate`), which knows the folders that the owner opened.
    """

    __slots__ = ()


def part_of(name: str, part: str) -> str:
    """A part of a name, which may be opened exactly if the whole name may."""
    return Location(part) if isinstance(name, Location) else part


def require_location(name: str, what: str, known: str) -> None:
    """Refuse a name that is neither built in nor a `Location`.

    Args:
        name: as it was given.
        what: a model, an image set or a captioner, in words.
        known: the built-in names.

    Raises:
        InputError: it is a plain string.
    """
    if not isinstance(name, Location):
        raise InputError(
            f"There is no built-in {what} {name!r}; built in are {known}. In Python, a folder or a repository is named "
            "by oms_core.Location(name)."
        )
