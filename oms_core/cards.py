"""The cards of shipped files: what they are, how they were made, and the digest of each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from oms_core.cache import read_finished
from oms_core.errors import InputError
from oms_core.files import ASSETS, read_json
from oms_core.writing import replace_file


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder but its card, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "card.json")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_card(folder: Path, content: dict[str, Any]) -> None:
    """Write ``card.json``: the content, and the digest of each file below the folder.

    Raises:
        OSError: it cannot be written.
    """
    replace_file(folder / "card.json", (json.dumps(content | {"files": digests(folder)}, indent=1) + "\n").encode())


def check(assets: Path = ASSETS) -> list[dict[str, str]]:
    """A row per file that a card lists or that lies beside one: `file` and `state` (ok, changed, missing, not listed).

    Raises:
        InputError: a card cannot be read or lists no files.
    """
    rows = []
    for card in sorted(assets.rglob("card.json")):
        listed, found = read_json(card).get("files"), digests(card.parent)
        if not isinstance(listed, dict):
            raise InputError(f"{card} lists no files; restore the original file.")
        for name in sorted(listed | found):
            if name not in found:
                state = "missing"
            elif name not in listed:
                state = "not listed"
            else:
                state = "ok" if listed[name] == found[name] else "changed"
            rows.append({"file": f"{card.parent.relative_to(assets).as_posix()}/{name}", "state": state})
    return rows + check_signals(assets / "signals")


def check_signals(folder: Path) -> list[dict[str, str]]:
    """A row per precomputed result: `ok` where every part is what its manifest and its key say."""
    return [
        {
            "file": manifest.parent.relative_to(folder.parent).as_posix(),
            "state": "changed" if read_finished(manifest.parent, manifest.parent.parent.name) is None else "ok",
        }
        for manifest in sorted(folder.rglob("manifest.json"))
    ]
