"""A tiny model and a few pictures for all tests; nothing here needs a network or more than one thread."""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from oms_core import location
from oms_core.assemble import png

pytest_plugins = ["browser"]

torch.set_num_threads(1)

SavePipeline = Callable[..., Path]
SavePictures = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    monkeypatch.setenv("OMS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def as_in_the_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and repositories must be named by a `Location`."""
    refused = threading.Event()
    refused.set()
    monkeypatch.setattr(location, "_refused", refused)


@pytest.fixture
def as_in_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths and repositories may be named by a plain string, whatever an earlier test of the pages did."""
    monkeypatch.setattr(location, "_refused", threading.Event())


@pytest.fixture(scope="session")
def save_pipeline() -> SavePipeline:
    """Save a tiny DDPM pipeline with seeded weights into a folder and return the folder."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    def save(folder: Path, channels: int = 1, dtype: torch.dtype = torch.float32, **schedule: object) -> Path:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=2 * channels if schedule.pop("learned_variance", False) else channels,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        )
        DDPMPipeline(unet.to(dtype), DDPMScheduler(**schedule)).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory, save_pipeline: SavePipeline) -> Path:
    """A grey 8 x 8 model; not to be changed."""
    return save_pipeline(tmp_path_factory.mktemp("model") / "pipeline")


@pytest.fixture(scope="session")
def save_pictures() -> SavePictures:
    """Fill a folder with member/ and nonmember/ of random pictures of a shape and return it."""

    def save(folder: Path, *shape: int, seed: int = 0, each: int = 6) -> Path:
        rng = np.random.default_rng(seed)
        for role in ("member", "nonmember"):
            (folder / role).mkdir(parents=True)
            for number in range(each):
                (folder / role / f"{number}.png").write_bytes(png(rng.integers(0, 256, shape, np.uint8)))
        return folder

    return save


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, save_pictures: SavePictures) -> Path:
    """Six members and six non-members, grey, 8 x 8; not to be changed."""
    return save_pictures(tmp_path_factory.mktemp("pictures") / "grey", 8, 8)


@pytest.fixture(scope="session")
def colour_pictures(tmp_path_factory: pytest.TempPathFactory, save_pictures: SavePictures) -> Path:
    """Six members and six non-members in colour, 8 x 8; not to be changed."""
    return save_pictures(tmp_path_factory.mktemp("pictures") / "colour", 8, 8, 3)
