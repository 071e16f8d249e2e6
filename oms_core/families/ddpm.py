"""Unconditional pixel-space models: any `UNet2DModel` of diffusers (Ho et al., 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers import UNet2DModel

from oms_core.denoiser import to_eps
from oms_core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from oms_core.catalog import Model
    from oms_core.device import Placement

PREDICTS = ("epsilon", "sample", "v_prediction")  # what makes sense where alpha^2 + sigma^2 = 1


class Diffused:
    """What every pixel-space model on a discrete variance-preserving schedule has in common."""

    def __init__(self, model: Model, placement: Placement) -> None:
        self.fingerprint, self.profile, self.timesteps = model.fingerprint, model.profile, model.timesteps
        self.device, self.dtype = torch.device(placement.device), getattr(torch, placement.dtype)
        self.alpha_bar = alpha_bar(model.schedule).tolist()

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Pixels of (B, H, W, C) uint8 as x_0 in [-1, 1], (B, C, H, W)."""
        x_0 = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
        return x_0.to(self.dtype) / 127.5 - 1

    def condition(self, captions: Sequence[str]) -> None:
        """Nothing: the model is unconditional."""

    def coefficients(self, t: int) -> tuple[float, float]:
        """sqrt(abar_t) and sqrt(1 - abar_t)."""
        return self.alpha_bar[t] ** 0.5, (1 - self.alpha_bar[t]) ** 0.5


def alpha_bar(schedule: dict) -> Tensor:
    """abar_t for t = 0 ... T - 1 in float64, from the betas of the model's own scheduler, (T,)."""
    known = {key: value for key, value in schedule.items() if not key.startswith("_")}
    try:
        scheduler = getattr(diffusers, schedule["_class_name"]).from_config(known)
        abar = torch.cumprod(1 - scheduler.betas.double(), dim=0)
    except Exception as error:  # diffusers raises many kinds for settings that it does not know
        raise InputError(f"The scheduler's config cannot be used: {reason(error)}") from error
    if len(abar) != schedule["num_train_timesteps"] or not ((abar >= 0) & (abar < 1)).all():
        raise InputError("The scheduler's config gives no noise levels between 0 and 1 for its num_train_timesteps.")
    return abar


def reason(error: Exception) -> str:
    """What an error says, on one line and short enough for a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Ddpm(Diffused):
    """A `UNet2DModel` as a `Denoiser`."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.predicts = model.schedule.get("prediction_type", "epsilon")
        if self.predicts not in PREDICTS:
            raise InputError(f"{model.name} predicts {self.predicts!r}; supported are {', '.join(PREDICTS)}.")
        self.unet = load_unet(model, self.dtype).to(self.device)
        self.check(model.name)

    def eps(self, x_t: Tensor, t: int, condition: None = None) -> Tensor:
        """eps_theta(x_t, t); of a learned variance only the first C channels are the prediction."""
        output = self.unet(x_t, t).sample[:, : self.profile.channels]
        return to_eps(output, x_t, *self.coefficients(t), self.predicts)

    @torch.inference_mode()
    def check(self, name: str) -> None:
        """One forward pass on zeros."""
        zeros = torch.zeros(1, self.profile.channels, *self.profile.size, device=self.device, dtype=self.dtype)
        try:
            output = self.eps(zeros, self.timesteps - 1)
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"{name} cannot take pictures of its own sample_size {self.profile.size}.") from error
        if output.shape != zeros.shape or not output.isfinite().all():
            raise InputError(f"{name} gives no finite noise of its input's shape, even for an empty picture.")


def load_unet(model: Model, dtype: torch.dtype) -> UNet2DModel:
    """The network, refused unless its weights are exactly those that its config asks for, and finite."""
    try:
        check_memory(model)
        unet, info = UNet2DModel.from_pretrained(
            model.unet,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises many kinds for a config and weights that do not fit
        raise InputError(f"The weights of {model.name} do not fit its config.json: {reason(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            what = problem.removesuffix("_keys")
            raise InputError(f"The weights of {model.name} do not fit its config.json: {what} {info[problem][0]}.")
    for key, weight in unet.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"The weights of {model.name} are not finite ({key}); the file is damaged or diverged.")
    return unet.eval().requires_grad_(False)


def check_memory(model: Model) -> None:
    """Refuse, before memory is taken, a config that asks for far more than the weights hold."""
    with torch.device("meta"):
        unet = UNet2DModel.from_config(UNet2DModel.load_config(model.unet, local_files_only=True))
    if unet.num_parameters() > 2 * model.parameters:
        raise ValueError(f"it asks for {unet.num_parameters():,} numbers, they are {model.parameters:,}")


load = Ddpm
