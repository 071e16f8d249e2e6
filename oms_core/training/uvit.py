"""A small U-ViT: epsilon prediction over uniformly drawn t in [0, 1]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from oms_core.families.uvit import CLOCK, UVit, alpha_bar
from oms_core.images import ImageSet
from oms_core.training.pictures import COLUMNS, ROWS, drawn, sheet, tensor_of
from oms_core.training.recipes import Recipe


class Subject:
    """A `UVit` on pixels."""

    def __init__(self, recipe: Recipe, images: ImageSet, part: Path | None = None) -> None:
        self.recipe = recipe
        self.module = UVit(sample_size=recipe.size, in_channels=1, **recipe.network)
        self.x_0 = tensor_of(images, recipe.size)

    def loss(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Eq. 5 in continuous time."""
        x_0 = self.x_0[rows]
        eps = torch.randn(x_0.shape, generator=random)
        t = torch.rand(len(x_0), generator=random)
        abar = alpha_bar(t)[:, None, None, None]
        x_t = abar.sqrt() * x_0 + (1 - abar).sqrt() * eps
        return torch.nn.functional.mse_loss(self.module(x_t, CLOCK * t), eps)

    def save(self, module: UVit, folder: Path) -> None:
        """The network and its config."""
        module.save_pretrained(folder)

    def samples(self, module: UVit) -> np.ndarray:
        """Pictures drawn from the model at t = 1/1000 ... 1."""
        times = torch.arange(1, 1001) / 1000
        abar = alpha_bar(times.double())
        betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
        schedule = DDPMScheduler(trained_betas=betas.tolist(), clip_sample=True)

        def ask(x_t: Tensor, step: int) -> Tensor:
            return module(x_t, CLOCK * times[step].expand(len(x_t)))

        return sheet(drawn(ask, schedule, (ROWS * COLUMNS, *self.x_0.shape[1:]), self.recipe.seed), COLUMNS)

    def facts(self, module: UVit) -> dict[str, Any]:
        """Nothing more."""
        return {}
