"""A small DDPM: epsilon prediction over uniformly drawn timesteps of the linear schedule (Ho et al., 2020)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from oms_core.images import ImageSet
from oms_core.training.pictures import COLUMNS, ROWS, drawn, sheet, tensor_of
from oms_core.training.recipes import Recipe


def network(size: int, blocks: tuple[int, ...]) -> UNet2DModel:
    """A small UNet with attention at its coarsest level."""
    depth = len(blocks)
    return UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=blocks,
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        norm_num_groups=8,
    )


class Subject:
    """A `UNet2DModel` on pixels."""

    def __init__(self, recipe: Recipe, images: ImageSet, part: Path | None = None) -> None:
        self.recipe = recipe
        self.module = network(recipe.size, **recipe.network)
        self.x_0 = tensor_of(images, recipe.size)
        self.schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)

    def loss(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Eq. 5."""
        x_0 = self.x_0[rows]
        eps = torch.randn(x_0.shape, generator=random)
        t = torch.randint(1000, (len(x_0),), generator=random)
        x_t = self.schedule.add_noise(x_0, eps, t)
        return torch.nn.functional.mse_loss(self.module(x_t, t).sample, eps)

    def save(self, module: UNet2DModel, folder: Path) -> None:
        """As a `DDPMPipeline`."""
        DDPMPipeline(module, self.schedule).save_pretrained(folder)

    def samples(self, module: UNet2DModel) -> np.ndarray:
        """Pictures drawn from the model."""
        shape = (ROWS * COLUMNS, *self.x_0.shape[1:])
        return sheet(drawn(lambda x_t, t: module(x_t, t).sample, self.schedule, shape, self.recipe.seed), COLUMNS)

    def facts(self, module: UNet2DModel) -> dict[str, Any]:
        """Nothing more."""
        return {}
