"""What the subjects share: pictures as tensors, noise on them, and sheets of samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from oms_core.decode import Profile
from oms_core.images import ImageSet

VOCABULARIES = Path(__file__).with_name("vocabularies.json")
ROWS, COLUMNS = 4, 16  # of a sheet of samples


def tensor_of(images: ImageSet, size: int) -> Tensor:
    """Grey pictures as x_0 in [-1, 1], (N, 1, H, W)."""
    return torch.from_numpy(images.pixels(Profile((size, size), 1))).permute(0, 3, 1, 2) / 127.5 - 1


def words_of(tokenizer: str) -> dict[str, list[str]]:
    """The tokens (and merges) of a tokenizer, clip or bert.

    They were learned once from fashion's captions by the tokenizers' own trainers. Those break ties in no fixed
    order, so the outcome is kept: a training must come out the same every time.
    """
    return json.loads(VOCABULARIES.read_text())[tokenizer]


@torch.inference_mode()
def drawn(ask: Callable[[Tensor, int], Tensor], schedule: DDPMScheduler, shape: tuple[int, ...], seed: int) -> Tensor:
    """Pictures drawn from a model by ancestral sampling over 250 timesteps.

    Args:
        ask: eps_theta(x_t, t).
        schedule: the noise levels.
        shape: (N, C, H, W).
        seed: of the noise.
    """
    schedule = DDPMScheduler.from_config(schedule.config)
    schedule.set_timesteps(250)
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random)
    for t in schedule.timesteps.tolist():
        x = schedule.step(ask(x, t), t, x, generator=random).prev_sample
    return x


def sheet(x_0: Tensor, columns: int) -> np.ndarray:
    """Grey pictures of (N, 1, H, W) in [-1, 1] side by side, (rows * H, columns * W) uint8."""
    grey = ((x_0.clamp(-1, 1) + 1) * 127.5).round().byte().unflatten(0, (-1, columns))[:, :, 0]
    return grey.permute(0, 2, 1, 3).flatten(0, 1).flatten(1).numpy()
