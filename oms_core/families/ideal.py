"""The ideal denoiser: the closed-form answer of a model that remembers its members perfectly.

The training set is taken as a mixture of Gaussians of width tau around the members c_i. Then

    E[x_0 | x_t] = sum_i w_i (c_i + alpha_t tau^2 / s (x_t - alpha_t c_i)),   s = alpha_t^2 tau^2 + sigma_t^2,

with w = softmax(-||x_t - alpha_t c_i||^2 / 2 s), and eps = (x_t - alpha_t E[x_0 | x_t]) / sigma_t. Near a member
that stands alone the map f is linear with factor k = sigma_t^2 / s, so eps^n = k^n eps^0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from oms_core.catalog import IDEAL_WIDTH
from oms_core.denoiser import to_eps
from oms_core.families.base import Diffused
from oms_core.images import open_images

if TYPE_CHECKING:
    from torch import Tensor

    from oms_core.catalog import Model
    from oms_core.device import Placement


class Ideal(Diffused):
    """A mixture of Gaussians around the members of an image set as a `Denoiser`."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.network = None
        self.dtype = torch.float32  # a closed form has no weights to make smaller
        members = open_images(model.images).with_role("member")
        self.centres = self.encode(members.pixels(model.profile))  # (M, C, H, W)

    def eps(self, x_t: Tensor, t: int, condition: None = None) -> Tensor:
        """The exact noise of the mixture."""
        alpha_t, sigma_t = self.coefficients(t)
        variance = alpha_t**2 * IDEAL_WIDTH**2 + sigma_t**2
        x, centres = x_t.flatten(1), self.centres.flatten(1)
        away = torch.cdist(x.detach(), alpha_t * centres, compute_mode="donot_use_mm_for_euclid_dist") ** 2  # (B, M)
        slope = (x**2).sum(dim=1, keepdim=True) - 2 * x @ (alpha_t * centres).T  # cdist has no second derivative
        squared = away + (slope - slope.detach())
        nearest = (-squared / (2 * variance)).softmax(dim=1) @ centres  # (B, C H W)
        shrink = alpha_t * IDEAL_WIDTH**2 / variance
        x_0 = nearest + shrink * (x - alpha_t * nearest)
        return to_eps(x_0.reshape(x_t.shape), x_t, alpha_t, sigma_t, "sample")


load = Ideal
