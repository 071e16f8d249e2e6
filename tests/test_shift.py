"""The model-free classifier: it sees what differs, and only that."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.stats import binom

from oms_core import shift
from oms_core.decode import Profile
from oms_core.images import open_images
from oms_core.run import Run, plan

SIZE = Profile((28, 28), 1)


@pytest.fixture(scope="module")
def clothes() -> np.ndarray:
    """Known non-members of Fashion-MNIST, as the models see them."""
    return open_images("fashion").with_role("nonmember").pixels(SIZE)


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
    """Fifty pictures of the same kind that are in neither group."""
    return open_images("fashion").with_role("auxiliary").limit(50).pixels(SIZE)


def changed(pixels: np.ndarray, change) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(picture.squeeze(2))))[..., None] for picture in pixels])


def through_jpeg(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


CHANGES = {
    "inverted": lambda pixels: 255 - pixels,
    "brighter": lambda pixels: np.clip(pixels.astype(int) + 5, 0, 255).astype(np.uint8),
    "saved as JPEG": lambda pixels: changed(pixels, through_jpeg),
    "blurred": lambda pixels: changed(pixels, lambda picture: picture.filter(ImageFilter.GaussianBlur(0.4))),
    "mirrored": lambda pixels: pixels[:, :, ::-1],
    "digits": lambda pixels: open_images("digits").with_role("nonmember").limit(50).pixels(SIZE),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_alarm_goes_off_when_pictures_are_of_another_kind(
    change: str, clothes: np.ndarray, held_out: np.ndarray
) -> None:
    found = shift.compare(CHANGES[change](held_out), clothes)
    assert found["alarm"]
    assert found["auc"] > found["chance_hi"]


def test_the_alarm_is_silent_for_pictures_of_the_same_kind(clothes: np.ndarray, held_out: np.ndarray) -> None:
    assert not shift.compare(held_out, clothes)["alarm"]


def test_over_a_hundred_draws_the_alarm_goes_off_no_more_often_than_was_promised(clothes: np.ndarray) -> None:
    rng, seen = np.random.default_rng(0), shift.features(clothes)
    alarms, chances = 0, []
    for number in range(100):
        chosen = rng.permutation(len(seen))
        found = shift.told_apart(seen[chosen[:30]], seen[chosen[30:250]], seed=number)
        alarms += found["alarm"]
        chances.append((found["chance_lo"], found["chance_hi"]))
    assert alarms <= binom.ppf(0.999, 100, shift.ALARM)
    low, high = np.mean(chances, axis=0)
    assert low < 0.5 < high


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_members_and_non_members_of_the_shipped_sets_are_of_one_kind(name: str) -> None:
    planned = plan(Run({"digits": "ddpm-digits", "fashion": "ddpm-fashion"}[name]))
    found = shift.of_roles(planned)
    assert not found["alarm"]
    assert shift.of_roles(planned) == found  # from the cache


def test_sets_that_were_chosen_by_brightness_are_told_apart(clothes: np.ndarray) -> None:
    order = np.argsort(clothes.mean((1, 2, 3)))
    found = shift.compare(clothes[order[:500]], clothes[order[500:]])
    assert found["alarm"]
    assert found["auc"] > 0.95


@pytest.mark.parametrize("few", [0, 1, shift.FEWEST - 1])
def test_too_few_pictures_are_not_judged(few: int, clothes: np.ndarray) -> None:
    found = shift.compare(clothes[:few], clothes[few:])
    assert found == {"pictures": few, "auc": None, "chance_lo": None, "chance_hi": None, "p": None, "alarm": None}


def test_single_pictures_of_another_kind_are_unusual(clothes: np.ndarray, held_out: np.ndarray) -> None:
    strange = [change(held_out) for name, change in CHANGES.items() if name in ("inverted", "digits")]
    for pixels in (*strange, np.zeros((1, 28, 28, 1), np.uint8)):
        assert (shift.unusual(pixels, clothes) <= shift.ALARM).all()


def test_single_pictures_of_the_same_kind_are_seldom_unusual(clothes: np.ndarray) -> None:
    rng, rates = np.random.default_rng(0), []
    for _ in range(20):
        order = rng.permutation(len(clothes))
        rates.append((shift.unusual(clothes[order[:200]], clothes[order[200:]]) <= 0.05).mean())
    assert abs(np.mean(rates) - 0.05) < 0.02


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (5, 9, 3), (64, 48, 3), (2, 2, 1)])
def test_pictures_of_any_size_have_finite_features(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, *shape), np.uint8)
    pixels[0], pixels[1] = 0, 255
    assert np.isfinite(shift.features(pixels)).all()
    assert len(shift.features(pixels)) == 12
    assert np.array_equal(shift.features(pixels)[3:5], shift.features(pixels[3:5]))
