"""Unconditional pixel-space models: any `UNet2DModel` of diffusers (Ho et al., 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers import UNet2DModel

from oms_core.denoiser import to_eps
from oms_core.families.base import Diffused, load_network

if TYPE_CHECKING:
    from torch import Tensor

    from oms_core.catalog import Model
    from oms_core.device import Placement


class Ddpm(Diffused):
    """A `UNet2DModel` as a `Denoiser`."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.network = load_network(UNet2DModel, model.parts["network"], model.name, self.dtype).to(self.device)
        self.check(model.name)

    def eps(self, x_t: Tensor, t: int, condition: None = None) -> Tensor:
        """eps_theta(x_t, t); of a learned variance only the first C channels are the prediction."""
        output = self.network(x_t, t).sample[:, : x_t.shape[1]]
        return to_eps(output, x_t, *self.coefficients(t), self.predicts)


load = Ddpm
