"""A small variational autoencoder (Kingma & Welling, 2014), trained on pictures that no other model sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from oms_core.images import ImageSet, open_images
from oms_core.training.pictures import COLUMNS, sheet, tensor_of
from oms_core.training.recipes import Recipe

KL_WEIGHT = 1e-4  # per number of the latent, as light as Stable Diffusion's


def network(size: int, blocks: tuple[int, ...]) -> AutoencoderKL:
    """Each block but the last halves the size; latents have four channels."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        sample_size=size,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
    )


class Subject:
    """An `AutoencoderKL`."""

    def __init__(self, recipe: Recipe, images: ImageSet, part: Path | None = None) -> None:
        self.recipe = recipe
        self.module = network(recipe.size, **recipe.network)
        self.x_0 = tensor_of(images, recipe.size)

    def loss(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Squared error of the reconstruction, and a little of the divergence from N(0, I)."""
        x_0 = self.x_0[rows]
        posterior = self.module.encode(x_0).latent_dist
        decoded = self.module.decode(posterior.sample(generator=random)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return torch.nn.functional.mse_loss(decoded, x_0) + KL_WEIGHT * divergence

    def save(self, module: AutoencoderKL, folder: Path) -> None:
        """With the scaling factor that gives its latents a standard deviation of 1."""
        latents = modes(module.float(), self.x_0)
        module.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
        module.half().save_pretrained(folder)

    def samples(self, module: AutoencoderKL) -> np.ndarray:
        """Held-out pictures above their reconstructions."""
        x_0 = self.held_out()[:COLUMNS]
        return sheet(torch.cat([x_0, reconstructed(module, x_0)]), COLUMNS)

    def facts(self, module: AutoencoderKL) -> dict[str, Any]:
        """Its error on pictures that it was not trained on."""
        x_0 = self.held_out()
        error = torch.nn.functional.mse_loss(reconstructed(module, x_0), x_0)
        return {"held_out_mse": round(float(error), 5)}

    def held_out(self) -> Tensor:
        return tensor_of(open_images(self.recipe.images).with_role("nonmember"), self.recipe.size)


@torch.inference_mode()
def modes(module: AutoencoderKL, x_0: Tensor) -> Tensor:
    """The mode of each picture's latent, unscaled, (N, 4, h, w)."""
    return torch.cat([module.encode(batch).latent_dist.mode() for batch in x_0.split(256)])


@torch.inference_mode()
def reconstructed(module: AutoencoderKL, x_0: Tensor) -> Tensor:
    """Pictures through the autoencoder and back."""
    return torch.cat([module.decode(latents).sample for latents in modes(module, x_0).split(256)])
