"""Zips, tables, splits and captions: every way in which pictures come, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from oms_core import layouts
from oms_core.assemble import png
from oms_core.errors import InputError
from oms_core.images import inspection, open_images
from oms_core.run import Run, plan

ROOT = Path(__file__).resolve().parent.parent


def picture(seed: int, *shape: int) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 256, shape or (8, 8), np.uint8))


def filled(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def zipped(path: Path, files: dict[str, bytes], **how: int) -> Path:
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def by_file(name: str | Path, column: str) -> dict[str, str]:
    table = open_images(str(name)).table
    return dict(zip(table.file, table[column], strict=True))


# Folders and zips


def test_a_zip_is_read_like_the_folder_that_was_packed(tmp_path: Path) -> None:
    files = {"member/a.png": picture(0), "nonmember/x/b.png": picture(1), "__MACOSX/member/a.png": b"?"}
    folder = filled(tmp_path / "f", {name: data for name, data in files.items() if "MACOSX" not in name})
    found, packed = open_images(str(folder)), open_images(str(zipped(tmp_path / "f.zip", files)))
    pd.testing.assert_frame_equal(found.table, packed.table)
    assert packed.read(1) == files["nonmember/x/b.png"]


def flag_encrypted(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


HAZARDS = {
    "parent": ("member/../../a.png", "points out of the archive"),
    "absolute": ("/member/a.png", "points out of the archive"),
    "drive": ("member/C:a.png", "points out of the archive"),
    "nested zip": ("member/inner.zip", "not a"),
    "bomb": ("member/bomb.png", "unpacks to more than 200 times"),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_a_hazardous_entry_is_rejected_and_nothing_is_unpacked(tmp_path: Path, name: str) -> None:
    entry, reason = HAZARDS[name]
    content = bytes(5 * 10**6) if name == "bomb" else picture(9)
    if name == "nested zip":
        content = zipped(tmp_path / "inner.zip", {"a.png": picture(3)}).read_bytes()
    files = {"member/good.png": picture(0), "nonmember/b.png": picture(1), entry: content}
    path = zipped(tmp_path / "set.zip", files, compression=zipfile.ZIP_DEFLATED)
    before = sorted(tmp_path.rglob("*"))
    found = open_images(str(path))
    assert {*found.table.file} >= {"member/good.png", "nonmember/b.png"}
    assert len(found) == 2
    assert name == "absolute" or reason in found.rejected.reason.iloc[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", ["half", "encrypted", "many"])
def test_an_archive_that_cannot_be_used_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = zipped(tmp_path / "set.zip", {"member/a.png": picture(0)})
    if damage == "half":
        path.write_bytes(path.read_bytes()[:40])
    elif damage == "encrypted":
        flag_encrypted(path)
    else:
        monkeypatch.setattr(layouts, "MAX_ENTRIES", 0)
    with pytest.raises(InputError) as refused:
        open_images(str(path))
    assert "\n" not in str(refused.value)


def test_faces_are_split_by_identity(tmp_path: Path) -> None:
    names = ["Ann_A", "Bob_B", "Cy_C", "Di_D"]
    files = {f"{name}/{name}_{k:04d}.png": picture(10 * i + k) for i, name in enumerate(names) for k in (1, 2)}
    roles = by_file(filled(tmp_path, files), "role")
    assert {file.split("/")[0] for file, role in roles.items() if role == "member"} == {"Ann_A", "Bob_B"}
    assert {*roles.values()} == {"member", "nonmember"}


CAPTIONS: dict[str, dict[str, bytes | str]] = {
    "caption.json": {"member/caption.json": json.dumps({"a.png": "a cat"}), "member/images/a.png": picture(0)},
    "coco": {
        "member/captions_val2017.json": json.dumps(
            {
                "images": [{"id": 7, "file_name": "a.png"}],
                "annotations": [{"image_id": 7, "caption": "a cat"}, {"image_id": 7, "caption": "another"}],
            }
        ),
        "member/a.png": picture(0),
    },
    "img2dataset": {"member/00000/a.png": picture(0), "member/00000/a.txt": "a cat\n", "member/00000/a.json": "{}"},
    "metadata.csv": {"metadata.csv": "file_name,member,text\na.png,1,a cat\n", "a.png": picture(0)},
}


@pytest.mark.parametrize("layout", CAPTIONS)
def test_captions_are_found_where_data_sets_keep_them(tmp_path: Path, layout: str) -> None:
    found = open_images(str(filled(tmp_path, CAPTIONS[layout])))
    assert [*found.table.caption] == ["a cat"]
    assert [*found.table.role] == ["member"]
    assert found.rejected.empty


def test_damaged_captions_are_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = filled(tmp_path, {"member/caption.json": "{", "member/a.png": picture(0)})
    with pytest.raises(InputError, match="holds no captions that can be read"):
        open_images(str(folder))


# Tables


def test_parquet_is_read_in_any_order_one_row_group_at_a_time(tmp_path: Path) -> None:
    data = [picture(k) for k in range(20)]
    rows = pd.DataFrame({"img": [{"bytes": d, "path": None} for d in data], "label": range(20), "member": [1, 0] * 10})
    rows.to_parquet(tmp_path / "set.parquet", row_group_size=6)
    found = open_images(str(tmp_path / "set.parquet"))
    for row in np.random.default_rng(0).permutation(20):
        assert found.read(int(row)) == data[row]
    assert [*found.table.role] == ["member", "nonmember"] * 10
    assert [*found.table.label] == [str(k) for k in range(20)]


def test_cifar_is_read_in_training_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 3, 32, 32), np.uint8)
    for k in range(5):
        own = [bytes([2 * k + j]) + pixels[2 * k + j].tobytes() for j in (0, 1)]
        (tmp_path / f"data_batch_{k + 1}.bin").write_bytes(b"".join(own))
    found = open_images(str(tmp_path))
    assert [*found.table.label] == [str(k) for k in range(10)]
    for row in range(10):
        seen = np.asarray(Image.open(io.BytesIO(found.read(row))).convert("RGB"))
        np.testing.assert_array_equal(seen, pixels[row].transpose(1, 2, 0))


def test_pickled_cifar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use the binary version"):
        open_images(str(filled(tmp_path, {"data_batch_1": b"\x80\x04."})))


def test_a_hub_data_set_is_read_through_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"img": {"bytes": picture(k)}, "label": k} for k in range(3)]

    class Data(list):
        column_names = ("img", "label")

        def cast_column(self, *_: object) -> Data:
            return self

        def remove_columns(self, _: list[str]) -> Data:
            return Data({"label": row["label"]} for row in self)

    library = types.SimpleNamespace(load_dataset=lambda name, split: Data(rows), Image=lambda decode: None)
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = open_images("hub:owner/name")
    assert [found.read(k) for k in range(3)] == [row["img"]["bytes"] for row in rows]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        open_images("hub:owner/name")


# Splits


def split(path: Path, **arrays: object) -> Path:
    np.savez(path, **{key: np.array(value) for key, value in arrays.items()})
    return path


def test_a_split_gives_roles_by_position(tmp_path: Path) -> None:
    folder = filled(tmp_path / "data", {f"{k}.png": picture(k) for k in range(4)})
    path = split(tmp_path / "half.npz", mia_train_idxs=[3, 0], mia_eval_idxs=[1], ratio=0.5)
    roles = by_file(f"{path}@{folder}", "role")
    assert roles == {"0.png": "member", "1.png": "nonmember", "2.png": "", "3.png": "member"}
    assert len(plan(Run(images=f"{path}@{folder}")).images) == 3


BAD_SPLITS: dict[str, dict[str, object]] = {
    "beyond": {"mia_train_idxs": [4], "mia_eval_idxs": [1]},
    "negative": {"mia_train_idxs": [-1], "mia_eval_idxs": [1]},
    "overlap": {"mia_train_idxs": [1], "mia_eval_idxs": [1]},
    "floats": {"mia_train_idxs": [0.5], "mia_eval_idxs": [1]},
    "no key": {"mia_train_idxs": [0]},
    "objects": {"mia_train_idxs": [object()], "mia_eval_idxs": [1]},
}


@pytest.mark.parametrize("arrays", BAD_SPLITS.values(), ids=BAD_SPLITS)
def test_a_split_that_does_not_fit_is_refused_in_one_sentence(tmp_path: Path, arrays: dict[str, object]) -> None:
    folder = filled(tmp_path / "data", {f"{k}.png": picture(k) for k in range(4)})
    with pytest.raises(InputError) as refused:
        open_images(f"{split(tmp_path / 'half.npz', **arrays)}@{folder}")
    assert "\n" not in str(refused.value)


def test_two_sets_are_joined_and_what_stands_in_both_is_left_out(tmp_path: Path) -> None:
    one = filled(tmp_path / "one", {"a.png": picture(0), "b.png": picture(1)})
    two = zipped(tmp_path / "two.zip", {"b.png": picture(1), "c.png": picture(2)})
    found = open_images(f"member={one},nonmember={two}")
    assert dict(zip(found.table.file, found.table.role, strict=True)) == {"a.png": "member", "c.png": "nonmember"}
    assert found.read(1) == picture(2)
    assert len(found.rejected) == 2
    with pytest.raises(InputError, match="at most once"):
        open_images(f"member={one},member={two}")


def test_a_set_is_described_with_counts_sizes_roles_and_reasons(tmp_path: Path) -> None:
    files = {"member/a.png": picture(0), "nonmember/b.png": picture(1, 9, 8, 3), "nonmember/c.png": b"<html>"}
    said = inspection(open_images(str(filled(tmp_path, files))))
    assert said["roles"] == {"member": 1, "nonmember": 1}
    assert said["sizes"] == {"8 x 8 grey": 1, "9 x 8 colour": 1}
    assert [*said["rejected"].values()] == [["nonmember/c.png"]]


# Memory

SCORE = """
import resource, sys
from oms_core.compute import score
from oms_core.run import Run
score(Run(model=sys.argv[1], images=sys.argv[2], attacks=("PIA",), batch=64))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_ten_times_the_pictures_take_hardly_more_memory(tmp_path: Path, pipeline: Path) -> None:
    def peak(count: int) -> float:
        folder = tmp_path / str(count)
        pixels = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
        for role in ("member", "nonmember"):
            (folder / role).mkdir(parents=True)
        for number, own in enumerate(pixels):
            Image.fromarray(own).save(folder / ("member", "nonmember")[number % 2] / f"{number}.png")
        command = [sys.executable, "-c", SCORE, str(pipeline), str(folder)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        return int(done.stdout) * (1 if sys.platform == "darwin" else 1024) / 2**20

    assert peak(10_000) - peak(1_000) < 150  # MB
