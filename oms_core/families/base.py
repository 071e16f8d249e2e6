"""What the families have in common: pixels in, noise levels, and weights that are what their config says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL

from oms_core.errors import InputError
from oms_core.files import variant_of, weight_sizes

if TYPE_CHECKING:
    import numpy as np
    from diffusers import ModelMixin
    from torch import Tensor
    from transformers import PreTrainedModel

    from oms_core.catalog import Model
    from oms_core.device import Placement

STRICT = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
PREDICTS = ("epsilon", "sample", "v_prediction")  # what makes sense where alpha^2 + sigma^2 = 1


class PixelSpace:
    """An unconditional model of pictures; a family adds `coefficients` and `eps`."""

    def __init__(self, model: Model, placement: Placement) -> None:
        self.fingerprint, self.profile, self.timesteps = model.fingerprint, model.profile, model.timesteps
        self.device, self.dtype = torch.device(placement.device), getattr(torch, placement.dtype)
        self.compiled = placement.mode == "compiled"

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Pixels of (B, H, W, C) uint8 as x_0 in [-1, 1], (B, C, H, W)."""
        given = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            given = given.pin_memory()  # which the device fetches by itself
        x_0 = given.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        x_0 = x_0.to(self.dtype) / 127.5 - 1
        # in memory as every x_t will be: for each order of dimensions a network is compiled again
        return x_0.clone(memory_format=torch.contiguous_format) if self.compiled else x_0

    def decode(self, x_0: Tensor) -> np.ndarray:
        """x_0 in [-1, 1] as pixels of (B, H, W, C) uint8."""
        pixels = ((x_0.float().clamp(-1, 1) + 1) * 127.5).round()
        return pixels.byte().permute(0, 2, 3, 1).cpu().numpy()

    def condition(self, captions: Sequence[str]) -> Any:
        """Nothing: the model is unconditional."""
        return None

    @torch.inference_mode()
    def check(self, name: str) -> None:
        """One forward pass on an empty picture.

        Raises:
            InputError: it fails, or gives no finite noise.
        """
        empty = torch.zeros(1, *self.profile.size, self.profile.channels, dtype=torch.uint8).numpy()
        try:
            x_0 = self.encode(empty)
            output = self.eps(x_0, self.timesteps - 1, self.condition([""]))
        except (RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"{name} cannot take pictures of its own sample_size {self.profile.size}.") from error
        if output.shape != x_0.shape or not output.isfinite().all():
            raise InputError(f"{name} gives no finite noise of its input's shape, even for an empty picture.")


class Diffused(PixelSpace):
    """A model on a discrete variance-preserving schedule."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.alpha_bar = alpha_bar(model.schedule).tolist()
        self.predicts = model.schedule.get("prediction_type", "epsilon")
        if self.predicts not in PREDICTS:
            raise InputError(f"{model.name} predicts {self.predicts!r}; supported are {', '.join(PREDICTS)}.")

    def coefficients(self, t: int) -> tuple[float, float]:
        """sqrt(abar_t) and sqrt(1 - abar_t)."""
        return self.alpha_bar[t] ** 0.5, (1 - self.alpha_bar[t]) ** 0.5


class LatentSpace(PixelSpace):
    """A model of an autoencoder's latents."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.vae = load_network(AutoencoderKL, model.parts["vae"], model.name, self.dtype).to(self.device)
        self.shift, self.scale = self.vae.config.shift_factor or 0, self.vae.config.scaling_factor

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Pixels of (B, H, W, C) uint8 as scaled latents: the mode of the posterior, never a sample, (B, c, h, w)."""
        mode = self.vae.encode(super().encode(pixels)).latent_dist.mode()
        return (mode - self.shift) * self.scale

    def decode(self, x_0: Tensor) -> np.ndarray:
        """Scaled latents as pixels of (B, H, W, C) uint8."""
        return super().decode(self.vae.decode(x_0 / self.scale + self.shift).sample)


def scheduler_of(schedule: dict[str, Any]) -> Any:
    """The scheduler of diffusers that a config describes.

    Raises:
        InputError: it does not know the config's settings.
    """
    known = {key: value for key, value in schedule.items() if not key.startswith("_")}
    try:
        return getattr(diffusers, schedule["_class_name"]).from_config(known)
    except Exception as error:  # diffusers raises many kinds for settings that it does not know
        raise InputError(f"The scheduler's config cannot be used: {reason(error)}") from error


def alpha_bar(schedule: dict[str, Any]) -> Tensor:
    """abar_t for t = 0 ... T - 1 in float64, from the betas of the model's own scheduler, (T,)."""
    abar = torch.cumprod(1 - scheduler_of(schedule).betas.double(), dim=0)
    if len(abar) != schedule["num_train_timesteps"] or not ((abar >= 0) & (abar < 1)).all():
        raise InputError("The scheduler's config gives no noise levels between 0 and 1 for its num_train_timesteps.")
    return abar


def reason(error: Exception) -> str:
    """What an error says, on one line and short enough for a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_network(kind: type[ModelMixin], folder: Path, name: str, dtype: torch.dtype) -> Any:
    """A network of diffusers, refused unless its weights are exactly those that its config asks for, and finite.

    Raises:
        InputError: they are not; or the config asks for more memory than the weights could fill.
    """
    try:
        check_memory(kind, folder)
        network, info = kind.from_pretrained(
            folder,
            variant=variant_of(folder),
            low_cpu_mem_usage=False,
            torch_dtype=dtype,
            **STRICT,
        )
    except Exception as error:  # diffusers raises many kinds for a config and weights that do not fit
        raise InputError(f"The weights of {name} do not fit its config.json: {reason(error)}") from error
    network = verified(network, info, name)
    return network if network.dtype == dtype else network.to(dtype)  # diffusers leaves SD3 in float32


def load_text_encoder(kind: type[PreTrainedModel], folder: Path, name: str, dtype: torch.dtype) -> Any:
    """The same for a network of transformers."""
    transformers.utils.logging.disable_progress_bar()
    try:
        network, info = kind.from_pretrained(
            folder,
            variant=variant_of(folder),
            dtype=dtype,
            **STRICT,
        )
    except Exception as error:
        raise InputError(f"The {folder.name} of {name} does not fit its config.json: {reason(error)}") from error
    return verified(network, info, name)


def load_tokenizer(kind: type, folder: Path, name: str) -> Any:
    """What comes before a network of transformers: a tokenizer, or an image processor.

    Raises:
        InputError: its files are missing or damaged.
    """
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"The {folder.name} of {name} cannot be read: {reason(error)}") from error


def verified(network: Any, info: dict[str, Any], name: str) -> Any:
    """A network ready to be asked.

    Raises:
        InputError: a tensor is missing, left over, of another shape, or not finite.
    """
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            what, key = problem.removesuffix("_keys"), next(iter(info[problem]))
            raise InputError(f"The weights of {name} do not fit its config.json: {what} {key}.")
    for key, weight in network.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"The weights of {name} are not finite ({key}); the file is damaged or diverged.")
    return network.eval().requires_grad_(False)


def check_memory(kind: type[ModelMixin], folder: Path) -> None:
    """Refuse, before memory is taken, a config that asks for far more than the weights hold."""
    with torch.device("meta"):
        network = kind.from_config(kind.load_config(folder, local_files_only=True))
    held = sum(weight_sizes(folder))
    if network.num_parameters() > 2 * held:
        raise ValueError(f"it asks for {network.num_parameters():,} numbers, they are {held:,}")
