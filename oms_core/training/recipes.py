"""What decides each training of a small model."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training.

    Attributes:
        family: what is trained; a key of `oms_core.training.loop.SUBJECTS`.
        images: the built-in set.
        size: side of its pictures in pixels.
        network: the sizes of the network, as its family names them.
        epochs: passes over the pictures.
        snapshots: epochs at which the averaged weights are kept, for Figure 2a.
        default: the snapshot that the plain name of the model means.
        timesteps: where an attack is shown on this model; by default at the paper's t.
        batch: pictures per step.
        learning_rate, warm_up: its peak, and the steps until it is reached.
        ema_decay: of the averaged weights.
        seed: of every draw.
        role: the pictures trained on.
        part: the recipe of a part that is trained before, if any.
    """

    family: str
    images: str
    size: int
    network: dict[str, Any]
    epochs: int
    snapshots: tuple[int, ...]
    default: int
    timesteps: dict[str, int]
    batch: int = 64
    learning_rate: float = 1e-3
    warm_up: int = 200
    ema_decay: float = 0.999
    seed: int = 0
    role: str = "member"
    part: str = ""


DIGITS_TIMESTEPS = {"NA": 100, "PIA": 200, "PIAN": 100, "SecMI": 100, "SecMI-xt": 100}
UVIT_DIGITS_TIMESTEPS = DIGITS_TIMESTEPS | {"PIA": 100}
LATENT_TIMESTEPS = {"NA": 350, "PIA": 350, "PIAN": 350, "SecMI": 200, "SecMI-xt": 200}
RECIPES = {
    "ddpm-digits": Recipe(
        "ddpm", "digits", 8, {"blocks": (32, 64)}, 1200, (100, 450, 700, 1200), 450, DIGITS_TIMESTEPS
    ),
    "ddpm-fashion": Recipe("ddpm", "fashion", 28, {"blocks": (16, 48, 96)}, 500, (400,), 400, {}, 32),
    "uvit-digits": Recipe(
        "uvit", "digits", 8, {"patch_size": 2, "width": 128, "depth": 4, "heads": 4}, 1200, (1200,), 1200,
        UVIT_DIGITS_TIMESTEPS,
    ),
    "uvit-fashion": Recipe(
        "uvit", "fashion", 28, {"patch_size": 7, "width": 160, "depth": 4, "heads": 4}, 2400, (1800,), 1800,
        {"NA": 200}, 32,
    ),
    "vae-fashion": Recipe("autoencoder", "fashion", 28, {"blocks": (8, 24, 48)}, 30, (30,), 30, {}, role="auxiliary"),
    "sd-fashion": Recipe(
        "stable_diffusion", "fashion", 28, {"blocks": (32, 64), "width": 32, "layers": 1}, 600, (300,), 300,
        LATENT_TIMESTEPS, part="vae-fashion",
    ),
    "blip-fashion": Recipe(
        "captioner", "fashion", 28, {"patch_size": 7, "width": 64, "layers": 2}, 30, (30,), 30, {}, role="auxiliary"
    ),
}  # fmt: skip
