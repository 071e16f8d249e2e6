"""Training is the same whether it was interrupted or not, and every shipped file is what its card says."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from oms_core import cache, captions, catalog
from oms_core.cards import check, digests, write_card
from oms_core.decode import Profile
from oms_core.device import Placement
from oms_core.errors import InputError
from oms_core.families import load
from oms_core.files import ASSETS
from oms_core.images import open_images
from oms_core.location import Location
from oms_core.training import ddpm
from oms_core.training.loop import Training
from oms_core.training.recipes import DIGITS_TIMESTEPS, RECIPES, Recipe

NAME = "ddpm-tiny"
TINY = Recipe("ddpm", "digits", 8, {"blocks": (8, 16)}, 12, (4, 12), 4, DIGITS_TIMESTEPS, batch=256, warm_up=2)


def make_tiny(patch: pytest.MonkeyPatch) -> None:
    """Add the tiny recipe, and draw two samples instead of 64."""
    patch.setitem(RECIPES, NAME, TINY)
    patch.setattr(ddpm, "ROWS", 1)
    patch.setattr(ddpm, "COLUMNS", 2)


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a model whose training nothing interrupted, with its checkpoint beside; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch)
        folder = tmp_path_factory.mktemp("trained")
        yield Training(NAME, folder / "work").run(folder / "models")


def copied(trained: Path, to: Path, patch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A copy of a finished training, whose samples are not drawn again: the folders of its checkpoint and models."""
    with Image.open(trained / "samples.png") as sheet:
        drawn = np.array(sheet)
    patch.setattr(ddpm.Subject, "samples", lambda *_: drawn)
    shutil.copytree(trained.parent.parent, to / "copy")
    return to / "copy" / "work", to / "copy" / "models"


def card_of(folder: Path) -> dict:
    return json.loads((folder / "card.json").read_text())


def interrupted_after(epochs: int, steps: int, patch: pytest.MonkeyPatch) -> None:
    """Have the user press Ctrl-C so many steps after so many epochs."""
    step = Training.step

    def counted(self: Training, rows: torch.Tensor) -> float:
        counted.steps += len(self.losses) == epochs
        if counted.steps > steps:
            raise KeyboardInterrupt
        return step(self, rows)

    counted.steps = 0
    patch.setattr(Training, "step", counted)


def press_ctrl_c(*_: object) -> None:
    raise KeyboardInterrupt


# A training that was interrupted


def test_an_interrupted_and_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    trained: Path, tmp_path: Path
) -> None:
    def run() -> Path:
        return Training(NAME, tmp_path / "work").run(tmp_path / "models")

    checkpoint = tmp_path / "work" / f"{NAME}.pt"
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(1, 1, patch)  # before any checkpoint
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not checkpoint.exists()
    with pytest.MonkeyPatch.context() as patch:
        interrupted_after(11, 2, patch)  # in the middle of an epoch after one
        with pytest.raises(KeyboardInterrupt):
            run()
    kept = checkpoint.read_bytes()
    begun = Training(NAME, tmp_path / "work")
    begun.resume()
    assert [round(loss, 5) for loss in begun.losses] == card_of(trained)["loss"][:10]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", press_ctrl_c)  # while the last one is written
        with pytest.raises(KeyboardInterrupt):
            run()
    assert checkpoint.read_bytes() == kept
    resumed = run()
    assert digests(resumed) == digests(trained)
    assert card_of(resumed) | {"minutes": 0} == card_of(trained) | {"minutes": 0}


def test_the_global_random_state_does_not_decide_a_training(trained: Path, tmp_path: Path) -> None:
    training = Training(NAME, tmp_path)
    torch.manual_seed(5)
    first = training.epoch()
    torch.randn(3)
    assert [round(loss, 5) for loss in (first, training.epoch())] == card_of(trained)["loss"][:2]


def test_a_seed_decides_a_training(monkeypatch: pytest.MonkeyPatch, trained: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(RECIPES, NAME, replace(TINY, seed=1))
    assert round(Training(NAME, tmp_path).epoch(), 5) != card_of(trained)["loss"][0]


def test_a_finished_training_is_not_done_again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, models = copied(trained, tmp_path, monkeypatch)
    monkeypatch.setattr(Training, "step", None)
    again = Training(NAME, work).run(models)
    assert digests(again) == digests(trained)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 2e-3},
        {"epochs": 13},
        {"seed": 1},
        {"batch": 128},
        {"ema_decay": 0.9},
        {"network": {"blocks": (16, 16)}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_checkpoint_of_another_recipe_is_refused_in_one_sentence(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict
) -> None:
    work, models = copied(trained, tmp_path, monkeypatch)
    monkeypatch.setitem(RECIPES, NAME, replace(TINY, **change))
    with pytest.raises(InputError) as refused:
        Training(NAME, work).run(models)
    checkpoint = work / f"{NAME}.pt"
    assert str(refused.value) == f"{checkpoint} was made with another recipe; delete it to train from the start."


def test_what_is_kept_and_shown_of_a_training_may_change_afterwards(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, models = copied(trained, tmp_path, monkeypatch)
    monkeypatch.setitem(RECIPES, NAME, replace(TINY, snapshots=(12,), default=12, timesteps={"NA": 7}))
    card = card_of(Training(NAME, work).run(models))
    assert (card["recipe"]["snapshots"], card["recipe"]["default"]) == ([12], 12)
    assert card["recipe"]["timesteps"] == {"NA": 7}


def test_a_snapshot_that_was_never_kept_is_not_promised_by_the_card(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, models = copied(trained, tmp_path, monkeypatch)
    monkeypatch.setitem(RECIPES, NAME, replace(TINY, snapshots=(4, 8, 12)))
    with pytest.raises(InputError, match="epoch-0008 is missing and the training is past that epoch"):
        Training(NAME, work).run(models)
    shutil.rmtree(models)
    monkeypatch.setitem(RECIPES, NAME, TINY)
    with pytest.raises(InputError, match="epoch-0004 is missing"):
        Training(NAME, work).run(models)


SMALL = {
    "uvit": Recipe("uvit", "digits", 8, {"patch_size": 4, "width": 16, "depth": 2, "heads": 2}, 1, (1,), 1, {}, 600),
    "autoencoder": Recipe("autoencoder", "digits", 8, {"blocks": (8, 8)}, 1, (1,), 1, {}, 600, role="auxiliary"),
    "stable_diffusion": Recipe(
        "stable_diffusion", "digits", 8, {"blocks": (8, 8), "width": 8, "layers": 1}, 1, (1,), 1, {}, 600,
        part="small-autoencoder",
    ),
    "captioner": Recipe(
        "captioner", "digits", 8, {"patch_size": 4, "width": 8, "layers": 1}, 1, (1,), 1, {}, 600, role="auxiliary"
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_every_kind_of_training_is_decided_by_its_seed_and_saves_what_loads(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, recipe in SMALL.items():
        monkeypatch.setitem(RECIPES, f"small-{name}", recipe)
    for drawing in {family, "autoencoder"}:
        subject = import_module(f"oms_core.training.{drawing}").Subject
        monkeypatch.setattr(subject, "samples", lambda *_: np.zeros((8, 8), np.uint8))
    runs = [Training(f"small-{family}", tmp_path / f"work{k}").run(tmp_path / f"out{k}") for k in (0, 1)]
    assert digests(runs[0]) == digests(runs[1])
    role = SMALL[family].role
    group = "members" if role == "member" else role
    assert card_of(runs[0])[f"{group}_digest"] == open_images("digits").with_role(role).digest
    folder = runs[0] / "epoch-0001"
    if family in ("uvit", "stable_diffusion"):
        denoiser = load(catalog.describe(Location(folder)), Placement("cpu", "float32"))
        x_0 = denoiser.encode(np.zeros((2, 8, 8, 1), np.uint8))
        assert denoiser.eps(x_0, 10, denoiser.condition(["", ""])).shape == x_0.shape
    if family == "captioner":
        assert captions.describe(Location(folder)).folder == folder


# What comes out


@pytest.mark.parametrize("epoch", TINY.snapshots)
def test_a_snapshot_loads_through_the_one_door(trained: Path, epoch: int) -> None:
    model = catalog.describe(Location(trained / f"epoch-{epoch:04d}"))
    assert (model.family, model.profile, model.timesteps) == ("ddpm", Profile((8, 8), 1), 1000)
    assert model.parameters == card_of(trained)["parameters"]
    denoiser = load(model, Placement("cpu", "float32"))
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    for t in (0, 100, 999):
        assert denoiser.coefficients(t) == pytest.approx((alpha_bar[t] ** 0.5, (1 - alpha_bar[t]) ** 0.5), abs=1e-6)
    x_t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert denoiser.eps(x_t, 100).shape == x_t.shape


def test_snapshots_differ_and_hold_the_averaged_weights(trained: Path) -> None:
    training = Training(NAME, trained.parent.parent / "work")
    training.resume()
    last, first = (
        load(
            catalog.describe(Location(trained / f"epoch-{epoch:04d}")), Placement("cpu", "float32")
        ).network.state_dict()
        for epoch in (12, 4)
    )
    averaged, raw = training.averaged().half().state_dict(), training.subject.module.half().state_dict()
    assert all(torch.equal(last[name], averaged[name].float()) for name in last)
    for other in (first, raw):
        same = [name for name in last if torch.equal(last[name], other[name].float())]
        assert len(same) < len(last) / 10


def test_the_average_follows_its_recurrence(tmp_path: Path) -> None:
    training = Training(NAME, tmp_path)
    followed = [p.detach().clone() for p in training.parameters]
    for k in range(1, 4):
        training.step(torch.arange(32))
        decay = min(TINY.ema_decay, 1 - k**-0.75)  # none of the average at the first step
        followed = [decay * mean + (1 - decay) * p for mean, p in zip(followed, training.parameters, strict=True)]
    for mean, shadow in zip(followed, training.ema.shadow_params, strict=True):
        assert torch.allclose(mean, shadow, atol=1e-6)


def test_samples_are_a_sheet_of_pictures(trained: Path) -> None:
    with Image.open(trained / "samples.png") as sheet:
        assert (sheet.mode, sheet.size) == ("L", (2 * 8, 8))
        left, right = np.split(np.array(sheet), 2, axis=1)
    assert not np.array_equal(left, right)


def test_a_training_learns(trained: Path) -> None:
    losses = card_of(trained)["loss"]
    assert len(losses) == TINY.epochs
    assert losses[0] > 0.9  # eps has a variance of 1
    assert losses[-1] < 0.8 * losses[0]


def test_the_learning_rate_warms_up_and_falls_to_its_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, NAME, replace(TINY, warm_up=10))
    training = Training(NAME, tmp_path)
    rates = []
    for _ in range(TINY.epochs * 3):  # 600 members in batches of 256
        rates.append(training.optimizer.param_groups[0]["lr"])
        training.optimizer.step()
        training.rate.step()
    rates.append(training.optimizer.param_groups[0]["lr"])
    top = TINY.learning_rate
    assert max(rates) == pytest.approx(top)
    assert rates[0] == pytest.approx(top / 10)
    assert np.all(np.diff(rates[:11]) > 0)
    assert np.all(np.diff(rates[11:]) < 0)
    assert rates[-1] == pytest.approx(0.05 * top, rel=1e-3)


def test_only_members_are_trained_on(trained: Path, tmp_path: Path) -> None:
    images = open_images("digits")
    shown = {
        pixels.tobytes() for pixels in ((Training(NAME, tmp_path).subject.x_0[:, 0] + 1) * 127.5).round().byte().numpy()
    }
    by_role = {role: images.with_role(role).pixels(Profile((8, 8), 1))[..., 0] for role in ("member", "nonmember")}
    assert shown == {pixels.tobytes() for pixels in by_role["member"]}
    assert not shown & {pixels.tobytes() for pixels in by_role["nonmember"]}
    card = card_of(trained)
    assert card["members"] == len(images.with_role("member"))
    assert card["members_digest"] == images.with_role("member").digest != images.digest


def test_the_card_lists_every_file_with_its_digest(trained: Path) -> None:
    listed = card_of(trained)["files"]
    on_disk = [path for path in trained.rglob("*") if path.is_file() and path.name != "card.json"]
    assert {*listed} == {path.relative_to(trained).as_posix() for path in on_disk}
    for path in on_disk:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert listed[path.relative_to(trained).as_posix()] == digest
    weights = [name for name in listed if name.endswith(".safetensors")]
    assert weights == [f"epoch-{epoch:04d}/unet/diffusion_pytorch_model.safetensors" for epoch in TINY.snapshots]
    assert "samples.png" in listed


def test_the_card_says_how_the_model_was_made(trained: Path) -> None:
    card = card_of(trained)
    assert card["recipe"] == json.loads(json.dumps(asdict(TINY)))
    assert card["made_with"]["torch"] == torch.__version__
    assert {"python", "diffusers", "threads"} < {*card["made_with"]}
    assert (card["name"], card["family"], card["images"]) == (NAME, "ddpm", "digits")


# Cards


@pytest.fixture
def assets(tmp_path: Path) -> Path:
    """A folder with two cards."""
    for name, files in {"models/one": ["a.bin", "sub/b.bin"], "images": ["c.parquet"]}.items():
        for file in files:
            path = tmp_path / "assets" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.encode())
        write_card(tmp_path / "assets" / name, {"name": name})
    return tmp_path / "assets"


def states(assets: Path) -> dict[str, str]:
    return {row["file"]: row["state"] for row in check(assets)}


def test_a_check_finds_what_is_changed_missing_or_not_listed(assets: Path) -> None:
    fine = {"images/c.parquet": "ok", "models/one/a.bin": "ok", "models/one/sub/b.bin": "ok"}
    assert states(assets) == fine
    (assets / "models/one/a.bin").write_bytes(b"a.bit")
    assert states(assets) == fine | {"models/one/a.bin": "changed"}
    (assets / "models/one/sub/b.bin").rename(assets / "models/one/sub/d.bin")
    assert states(assets) == fine | {
        "models/one/a.bin": "changed",
        "models/one/sub/b.bin": "missing",
        "models/one/sub/d.bin": "not listed",
    }


@pytest.mark.parametrize("text", ["{", "[]", "", '{"name": "one"}', '{"files": ["a.bin"]}'])
def test_a_card_that_cannot_be_read_is_refused_in_one_sentence(assets: Path, text: str) -> None:
    (assets / "models/one/card.json").write_text(text)
    with pytest.raises(InputError, match=r"models/one/card\.json .*; restore the original file\.$"):
        check(assets)


def test_a_check_reads_every_precomputed_result(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMS_CACHE", str(assets / "signals"))
    monkeypatch.setattr(cache, "SHIPPED", assets / "signals")
    entries = []
    for t in (100, 200):
        entries.append(cache.Entry(cache.key_of({"t": t}), cache.Variant("cpu", "float32", 8, 3), 2))
        for shard in range(2):
            entries[-1].write(shard, pd.DataFrame({"image": ["a", "b"], "d": [t, shard]}))
        entries[-1].finish({"t": t})
    names = [entry.folder.relative_to(assets).as_posix() for entry in entries]
    before = states(assets)
    assert {name: before[name] for name in names} == dict.fromkeys(names, "ok")
    part = entries[0].folder / "part-000001.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    assert states(assets) == before | {names[0]: "changed"}
    part.unlink()
    assert states(assets) == before | {names[0]: "changed"}


# What is shipped


def test_every_shipped_file_is_as_its_card_says() -> None:
    rows = check()
    assert [row for row in rows if row["state"] != "ok"] == []
    for folder in ("models", "images", "signals"):
        assert any(row["file"].startswith(f"{folder}/") for row in rows)


@pytest.mark.parametrize("name", catalog.built_in())
def test_a_shipped_model_was_trained_on_the_members_of_its_set_alone(name: str) -> None:
    card = catalog.built_in()[name]
    images = open_images(card["images"])
    assert card["members_digest"] == images.with_role("member").digest
    assert card["members"] == len(images.with_role("member")) < len(images)


@pytest.mark.parametrize("name", catalog.built_in())
def test_a_shipped_model_can_be_made_again_by_its_recipe(name: str) -> None:
    card = catalog.built_in()[name]
    assert card["recipe"] == json.loads(json.dumps(asdict(RECIPES[name])))
    assert len(card["loss"]) == RECIPES[name].epochs
    assert RECIPES[name].default in RECIPES[name].snapshots
    for epoch in card["recipe"]["snapshots"]:
        frozen = card.get("autoencoder", {}).get("parameters", 0)
        assert catalog.describe(f"{name}@{epoch}").parameters == card["parameters"] + frozen


def test_what_is_shipped_is_small() -> None:
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 40 * 10**6
    assert not [path for path in sizes if path.suffix in (".pt", ".bin", ".ckpt", ".pkl")]  # no pickles among it
