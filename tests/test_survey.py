"""Every picture of a set is looked at in processes of their own, one of which may be lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from poison import ENDLESS, MARK, crashing_on, named, pictures_with

from oms_core import survey
from oms_core.assemble import png
from oms_core.errors import InputError
from oms_core.survey import CHUNK, CRASHES, Look, look_through, sha256

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 12 * CHUNK])
def test_each_picture_is_seen_once_and_in_order(count: int) -> None:
    files = [png(np.full((2, 2), number % 256, np.uint8)) + bytes([number // 256]) for number in range(count)]
    read: list[int] = []
    found = [*look_through(lambda number: read.append(number) or files[number], count)]
    assert found == [Look(sha256(data), "") for data in files]
    assert read == [*range(count)]


def test_what_cannot_be_used_has_a_reason_and_its_neighbours_have_none() -> None:
    good = png(np.zeros((2, 2), np.uint8))

    def read(number: int) -> bytes:
        if number == 1:
            raise InputError("the row is damaged")
        return b"no picture" if number == 2 else good

    found = [*look_through(read, 4)]
    assert [one.reason.partition(",")[0] for one in found] == ["", "the row is damaged", "not a supported picture", ""]
    assert [bool(one.image) for one in found] == [True, False, True, True]


def test_large_pictures_are_sent_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "CHUNK_BYTES", 1000)
    sizes = [600, 600, 100, 2000, 1]
    chunks = survey.chunks(lambda number: bytes(sizes[number]), len(sizes), 64)
    assert [[len(one) for one in chunk] for chunk in chunks] == [[600, 600], [100, 2000], [1]]


@pytest.mark.parametrize(("poisoned", "mark"), [([0, 70, 71, 9 * CHUNK + 10], MARK), ([5], ENDLESS)])
def test_a_picture_that_crashes_or_occupies_the_decoder_is_named_and_left_out(
    tmp_path: Path, poisoned: list[int], mark: bytes
) -> None:
    count = 12 * CHUNK  # more than is sent before the first answer
    folder = pictures_with(tmp_path / "set", count, poisoned, mark)
    command = [sys.executable, "-m", "oms_core", "images", str(folder), "--json"]
    environment = os.environ | crashing_on(tmp_path) | {"OMS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["pictures"] == count - len(poisoned)
    assert sorted(found["rejected"].pop(CRASHES)) == sorted(map(named, poisoned))
    assert not found["rejected"]
