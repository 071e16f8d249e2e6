"""The contract between models and everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from oms_core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from oms_core.decode import Profile

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


class Denoiser(Protocol):
    """A diffusion model as the attacks see it: pictures in, predicted noise out.

    What the network predicts, its clock, its latent space and its learned variance stay in its family's file.

    Attributes:
        fingerprint: SHA-256 over everything that decides its outputs.
        profile: the pictures it takes.
        timesteps: T; a timestep is an integer t with 0 <= t < T.
        network: what `eps` asks, for attacks that may see its weights; None where there are none.
    """

    fingerprint: str
    profile: Profile
    timesteps: int
    network: nn.Module | None

    def encode(self, pixels: np.ndarray) -> Tensor:
        """x_0 on the model's device, (B, C, H, W), from pixels of shape (B, H, W, C) uint8."""

    def decode(self, x_0: Tensor) -> np.ndarray:
        """The pictures that x_0 stands for, pixels of shape (B, H, W, C) uint8; the reverse of `encode`."""

    def condition(self, captions: Sequence[str]) -> Any:
        """What `eps` needs besides x_t, one entry per picture; None for an unconditional model."""

    def coefficients(self, t: int) -> tuple[float, float]:
        """alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t eps (Eq. 2), computed in float64."""

    def eps(self, x_t: Tensor, t: int, condition: Any = None) -> Tensor:
        """The predicted noise eps_theta(x_t, t), shaped like x_t."""


def to_eps(output: Tensor, x_t: Tensor, alpha_t: float, sigma_t: float, predicts: str) -> Tensor:
    """The noise that a network's output means.

    | predicts        | output             | eps                               |
    |-----------------|--------------------|-----------------------------------|
    | epsilon         | eps                | output                            |
    | sample          | x_0                | (x_t - alpha_t output) / sigma_t  |
    | v_prediction    | alpha eps - sigma x_0 | alpha_t output + sigma_t x_t   |
    | flow_prediction | eps - x_0          | x_t + alpha_t output              |

    Velocity as in Salimans & Ho (2022); flow matching with alpha = 1 - s, sigma = s (Lipman et al., 2023).

    Raises:
        InputError: an unknown kind of prediction.
    """
    match predicts:
        case "epsilon":
            return output
        case "sample":
            return (x_t - alpha_t * output) / sigma_t
        case "v_prediction":
            return alpha_t * output + sigma_t * x_t
        case "flow_prediction":
            return x_t + alpha_t * output
    raise InputError(f"A model that predicts {predicts!r} is not supported; known are {', '.join(PREDICTION_TYPES)}.")
