"""Captions that BLIP writes: kept by picture, gone on with after a stop, and part of what a score is kept by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from watch import watched

from oms_core import captions, compute
from oms_core.device import Placement
from oms_core.errors import InputError
from oms_core.images import open_images
from oms_core.location import Location
from oms_core.run import Run, plan, scores
from oms_core.training import captioner as training

CPU = Placement("cpu", "float32")
Change = Callable[[Path], object]


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP of 8 x 8 pictures that was never trained; not to be changed."""
    folder = tmp_path_factory.mktemp("captioner") / "blip"
    torch.manual_seed(0)
    tokenizer = training.vocabulary()
    model = training.network(tokenizer, size=8, patch_size=4, width=16, layers=1)
    for part in (tiny.seeded(model), tokenizer, training.BlipImageProcessorPil(size={"height": 8, "width": 8})):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Location:
    """A model that takes captions; not to be changed."""
    return Location(tiny.save_stable_diffusion(tmp_path_factory.mktemp("model") / "sd"))


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of a captioner was about."""
    calls, real = [], captions.loaded
    monkeypatch.setattr(captions, "BATCH", 5)

    def loaded(*arguments: object) -> Callable:
        caption = real(*arguments)
        return lambda pictures: calls.append(len(pictures)) or caption(pictures)

    monkeypatch.setattr(captions, "loaded", loaded)
    return calls


def test_every_picture_gets_a_caption_in_the_order_of_the_set(blip: Path, pictures: Path, asked: list[int]) -> None:
    captioner, images, told = captions.describe(Location(blip)), open_images(Location(pictures)), []
    assert captions.written(captioner, images).empty
    texts = captions.write(captioner, images, CPU, lambda done, total: told.append((done, total)))
    assert [*texts.index] == [*images.table.image]
    assert all(isinstance(text, str) and text == text.strip() for text in texts)
    assert texts.str.contains("cat|dog|photo|of|a").any()
    assert asked == [5, 5, 2]
    assert told == [(5, 12), (10, 12), (12, 12)]


def test_a_caption_does_not_depend_on_the_company(blip: Path, pictures: Path) -> None:
    from oms_core.decode import decode

    captioner, images = captions.describe(Location(blip)), open_images(Location(pictures))
    texts = captions.write(captioner, images, CPU)
    write = captions.loaded(captioner, CPU)
    for row, image in images.table.image.items():
        assert write([decode(images.read(row))[0]]) == [texts[image]]


def test_what_was_written_is_never_asked_again(tmp_path: Path, blip: Path, pictures: Path, asked: list[int]) -> None:
    captioner, images = captions.describe(Location(blip)), open_images(Location(pictures))
    first = captions.write(captioner, images, CPU)
    asked.clear()
    assert captions.write(captioner, images, CPU).equals(first)
    moved = shutil.copytree(pictures, tmp_path / "other")  # another set with some of the pictures and a new one
    (moved / "member" / "0.png").unlink()
    shutil.copy(next((pictures / "nonmember").iterdir()), moved / "member" / "copy.png")
    other = open_images(Location(moved))
    known = captions.write(captioner, other, CPU)
    assert asked == []
    assert known.equals(first[other.table.image])


def test_a_stopped_captioner_goes_on_where_it_was(
    tmp_path: Path, blip: Path, pictures: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner, images = captions.describe(Location(blip)), open_images(Location(pictures))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        captions.write(captioner, images, CPU, stop)
    assert len(captions.written(captioner, images)) == 5
    told = []
    texts = captions.write(captioner, images, CPU, lambda done, total: told.append(done))
    assert asked == [5, 5, 2]
    assert told == [10, 12]
    monkeypatch.setenv("OMS_CACHE", str(tmp_path / "elsewhere"))
    assert captions.write(captioner, images, CPU).equals(texts)


def test_another_captioner_has_its_own_captions(tmp_path: Path, blip: Path, pictures: Path) -> None:
    other = shutil.copytree(blip, tmp_path / "other")
    assert captions.describe(Location(other)).fingerprint == captions.describe(Location(blip)).fingerprint
    config = json.loads((other / "preprocessor_config.json").read_bytes())
    (other / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [0, 0, 0]}))
    assert captions.describe(Location(other)).fingerprint != captions.describe(Location(blip)).fingerprint
    images = open_images(Location(pictures))
    captions.write(captions.describe(Location(blip)), images, CPU)
    assert captions.written(captions.describe(Location(other)), images).empty


def test_a_shipped_captioner_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, blip: Path) -> None:
    shutil.copytree(blip, tmp_path / "tiny" / "epoch-0003")
    (tmp_path / "tiny" / "card.json").write_text(json.dumps({"recipe": {"default": 3}}))
    monkeypatch.setattr(captions, "SHIPPED", tmp_path)
    assert captions.describe("tiny").fingerprint == captions.describe(Location(blip)).fingerprint


@pytest.mark.parametrize("name", ["", "nothing", "../nothing", "a\0b", "http://a/b"])
def test_an_unknown_captioner_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(InputError, match=r"There is no captioner or folder .*; built in are") as refusal:
        captions.describe(Location(name))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["{}", "owner/name"])
@pytest.mark.usefixtures("as_in_the_app")
def test_a_plain_string_opens_no_captioner_that_is_not_built_in(
    blip: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for client in ("HfApi", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, client, lambda *_, **__: pytest.fail("something is fetched"))
    with watched() as seen, pytest.raises(InputError, match=r"There is no built-in captioner"):
        captions.describe(name.format(blip))
    assert not [one for one in seen if str(blip) in one.path]
    with watched() as seen:
        captions.describe(Location(blip))
    assert [one for one in seen if str(blip) in one.path]  # or nothing would be seen above either


def other_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "blip", "architectures": ["BlipForQuestion"]}))


DAMAGED: dict[str, tuple[Change, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    "another network": (other_config, "describes no BlipForConditionalGeneration"),
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json is miss"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no safetensors weights"),
    "half the weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "is not a complete safetensors file",
    ),
    "code": (lambda folder: (folder / "blip.py").write_text(""), "blip.py is code"),
    "half a vocabulary": (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_captioner_is_refused_in_one_sentence(tmp_path: Path, blip: Path, pictures: Path, name: str) -> None:
    folder = shutil.copytree(blip, tmp_path / "blip")
    change, expected = DAMAGED[name]
    change(folder)
    with pytest.raises(InputError) as refusal:
        captions.write(captions.describe(Location(folder)), open_images(Location(pictures)), CPU)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


# In a run


def test_a_run_has_its_captions_written_and_scores_with_them(
    blip: Path, stable_diffusion: Location, pictures: Path, asked: list[int]
) -> None:
    run = Run(
        model=stable_diffusion,
        images=Location(pictures),
        attacks=("PIA",),
        captions="blip",
        captioner=Location(blip),
        batch=6,
    )
    assert plan(run).images.table.caption.isna().all()
    stages = []
    table = scores(plan(run), compute.score(run, lambda progress: stages.append((progress.stage, progress.done))))
    assert stages == [("captions", 5), ("captions", 10), ("captions", 12), ("scores", 6), ("scores", 12)]
    assert len(table) == 12 * 3
    assert np.isfinite(table.score).all()
    planned = plan(run)
    assert [*planned.images.table.caption] == [*captions.written(captions.describe(Location(blip)), planned.images)]
    asked.clear()
    compute.score(run)
    assert asked == []


def test_different_captions_are_different_results(
    tmp_path: Path, blip: Path, stable_diffusion: Location, pictures: Path
) -> None:
    with_words = shutil.copytree(pictures, tmp_path / "with words")
    for path in with_words.rglob("*.png"):
        path.with_suffix(".txt").write_text("a photo of a dog")
    run = {"model": stable_diffusion, "attacks": ("PIA",), "captioner": Location(blip)}
    asked_for = [(with_words, "given"), *((pictures, kind) for kind in ("none", "blip", "text:a cat", "text:a dog"))]
    plans = [plan(Run(**run, images=Location(images), captions=kind)) for images, kind in asked_for]
    assert len({planned.tasks[0].key for planned in plans}) == len(plans)
    assert len({planned.images.digest for planned in plans}) == 1
    assert [planned.images.table.caption.iloc[0] for planned in plans[:2]] == ["a photo of a dog", ""]
    assert {*plans[3].images.table.caption} == {"a cat"}
    same = plan(Run(**run, images=Location(with_words), captions="text:a photo of a dog"))
    assert same.tasks[0].key == plans[0].tasks[0].key  # it is the words that count
    one, other = (
        compute.score(Run(**run, images=Location(pictures), captions=f"text:a {x}"))["PIA"] for x in ("cat", "dog")
    )
    assert not np.allclose(one["d(0,1) p=4"], other["d(0,1) p=4"], rtol=1e-4)


def test_a_run_without_the_captions_that_it_needs_is_refused(stable_diffusion: Location, pictures: Path) -> None:
    with pytest.raises(InputError, match=r"has no captions, which .* needs; use --captions blip .*--captions none\."):
        plan(Run(model=stable_diffusion, images=Location(pictures)))
    with pytest.raises(InputError, match="There are no captions 'banana'; choose given, blip, none, or text:WORDS"):
        plan(Run(model=stable_diffusion, images=Location(pictures), captions="banana"))


def test_a_model_without_captions_ignores_them(pipeline: Path, pictures: Path) -> None:
    one, other = (
        plan(Run(model=Location(pipeline), images=Location(pictures), captions=kind)) for kind in ("given", "text:a")
    )
    assert one.tasks[0].key == other.tasks[0].key
