"""Training the small models that are shipped: seeded, resumable, with a card that says how each was made.

``python -m oms_core train ddpm-digits`` trains on the members of the built-in set only, without
augmentation, as research models that memorise are trained: epsilon prediction over uniformly drawn
timesteps of the linear schedule with T = 1000 (Ho et al., 2020), AdamW, exponential moving average.
"""

import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from oms_core.cards import write_card
from oms_core.decode import Profile
from oms_core.errors import InputError
from oms_core.images import ASSETS, open_images

MODELS = ASSETS / "models"
WORK = Path(".training")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training."""

    images: str
    size: int
    blocks: tuple[int, ...]
    epochs: int
    snapshots: tuple[int, ...]  # epochs at which the averaged weights are kept, for Figure 2a
    default: int  # the snapshot that the plain name of the model means
    timesteps: dict[str, int]  # where an attack is shown on this model; by default at the paper's t
    batch: int = 64
    learning_rate: float = 1e-3
    warm_up: int = 200  # steps
    ema_decay: float = 0.999
    seed: int = 0


DIGITS_TIMESTEPS = {"NA": 100, "PIA": 200, "PIAN": 100, "SecMI": 100, "SecMI-xt": 100}
RECIPES = {
    "ddpm-digits": Recipe("digits", 8, (32, 64), 1200, (100, 250, 450, 700, 1200), 450, DIGITS_TIMESTEPS),
    "ddpm-fashion": Recipe("fashion", 28, (16, 48, 96), 500, (100, 200, 300, 400, 500), 400, {}, 32),
}


def identity(recipe: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights; which of them are kept and shown does not."""
    return {key: value for key, value in recipe.items() if key not in ("snapshots", "default", "timesteps")}


def snapshot_folder(folder: Path, epoch: int) -> Path:
    """Where a model's weights after an epoch are kept."""
    return folder / f"epoch-{epoch:04d}"


def network(recipe: Recipe) -> UNet2DModel:
    """A small UNet with attention at its coarsest level."""
    depth = len(recipe.blocks)
    return UNet2DModel(
        sample_size=recipe.size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=recipe.blocks,
        down_block_types=("DownBlock2D",) * (depth - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (depth - 1),
        norm_num_groups=8,
    )


class Training:
    """One training that can stop after any epoch and go on as if it had not.

    Args:
        name: a key of `RECIPES`.
        work: folder for the checkpoint; it may be deleted when the training is finished.
    """

    def __init__(self, name: str, work: Path = WORK) -> None:
        self.name, self.recipe, self.checkpoint = name, RECIPES[name], work / f"{name}.pt"
        torch.manual_seed(self.recipe.seed)
        self.unet = network(self.recipe)
        members = open_images(self.recipe.images).with_role("member")
        pixels = members.pixels(Profile((self.recipe.size, self.recipe.size), 1))
        self.x_0 = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1  # (N, 1, H, W)
        self.members = members.digest
        self.schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), self.recipe.learning_rate, weight_decay=0)
        self.rate = self.learning_rate_schedule()
        self.ema = EMAModel(self.unet.parameters(), self.recipe.ema_decay, use_ema_warmup=True, power=3 / 4)
        self.random = torch.Generator().manual_seed(self.recipe.seed)
        self.losses: list[float] = []  # the mean of each epoch
        self.seconds = 0.0

    def learning_rate_schedule(self) -> SequentialLR:
        steps = self.recipe.epochs * -(-len(self.x_0) // self.recipe.batch)
        warm = LinearLR(self.optimizer, 1 / self.recipe.warm_up, total_iters=self.recipe.warm_up)
        floor = 0.05 * self.recipe.learning_rate
        cosine = CosineAnnealingLR(self.optimizer, steps - self.recipe.warm_up, floor)
        return SequentialLR(self.optimizer, [warm, cosine], [self.recipe.warm_up])

    def run(self, to: Path = MODELS) -> Path:
        """Train to the end, writing each snapshot, then the card; return the model's folder.

        Raises:
            InputError: see `resume`; or a snapshot that the training has passed is not in the folder.
        """
        folder = to / self.name
        self.resume()
        for epoch in self.recipe.snapshots:
            if epoch <= len(self.losses) and not snapshot_folder(folder, epoch).is_dir():
                raise InputError(
                    f"{snapshot_folder(folder, epoch)} is missing and the training is past that epoch; take it off the "
                    f"recipe's snapshots, or delete {self.checkpoint} to train from the start."
                )
        remaining = range(len(self.losses), self.recipe.epochs)
        for epoch in tqdm(remaining, self.name, initial=len(self.losses), total=self.recipe.epochs, unit="epoch"):
            started = time.monotonic()
            self.losses.append(self.epoch())
            self.seconds += time.monotonic() - started
            if epoch + 1 in self.recipe.snapshots:
                self.snapshot(snapshot_folder(folder, epoch + 1))
            if (epoch + 1) % 10 == 0 or epoch + 1 == self.recipe.epochs:
                self.save()
        self.write_card(folder)
        return folder

    def epoch(self) -> float:
        """One pass over the members in a fresh order; the mean loss."""
        self.unet.train()
        order = torch.randperm(len(self.x_0), generator=self.random)
        return float(np.mean([self.step(self.x_0[rows]) for rows in order.split(self.recipe.batch)]))

    def step(self, x_0: torch.Tensor) -> float:
        """One step on Eq. 5, with x_0 of shape (B, 1, H, W) in [-1, 1]."""
        eps = torch.randn(x_0.shape, generator=self.random)
        t = torch.randint(1000, (len(x_0),), generator=self.random)
        x_t = self.schedule.add_noise(x_0, eps, t)
        loss = torch.nn.functional.mse_loss(self.unet(x_t, t).sample, eps)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1)
        self.optimizer.step()
        self.rate.step()
        self.ema.step(self.unet.parameters())
        return loss.item()

    def stateful(self) -> dict:
        return {"unet": self.unet, "optimizer": self.optimizer, "rate": self.rate, "ema": self.ema}

    def save(self) -> None:
        """Write the checkpoint in one step, so that a kill leaves the old one or the new one."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {key: part.state_dict() for key, part in self.stateful().items()}
        state |= {"random": self.random.get_state(), "losses": self.losses, "seconds": self.seconds}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state | {"recipe": json.dumps(identity(asdict(self.recipe)))}, partial)
        os.replace(partial, self.checkpoint)

    def resume(self) -> None:
        """Go on from the checkpoint if there is one.

        Raises:
            InputError: the checkpoint belongs to another recipe.
        """
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        if identity(json.loads(state["recipe"])) != json.loads(json.dumps(identity(asdict(self.recipe)))):
            raise InputError(f"{self.checkpoint} was made with another recipe; delete it to train from the start.")
        for key, part in self.stateful().items():
            part.load_state_dict(state[key])
        self.random.set_state(state["random"])
        self.losses, self.seconds = state["losses"], state["seconds"]

    def averaged(self) -> UNet2DModel:
        """A copy of the network with the averaged weights, in half precision as they are shipped."""
        unet = network(self.recipe)
        self.ema.copy_to(unet.parameters())
        return unet.half().eval()

    def snapshot(self, folder: Path) -> None:
        """The averaged weights as a diffusers pipeline folder."""
        DDPMPipeline(self.averaged(), self.schedule).save_pretrained(folder)

    def write_card(self, folder: Path) -> None:
        """``samples.png`` and ``card.json``: data, recipe, loss curve, versions and the digest of each file."""
        Image.fromarray(samples(self.averaged().float(), self.schedule, self.recipe)).save(folder / "samples.png")
        card = {
            "name": self.name,
            "family": "ddpm",
            "images": self.recipe.images,
            "members": len(self.x_0),
            "members_digest": self.members,
            "parameters": self.unet.num_parameters(),
            "recipe": asdict(self.recipe),
            "loss": [round(loss, 5) for loss in self.losses],
            "minutes": round(self.seconds / 60, 1),
            "made_with": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "threads": torch.get_num_threads(),
            },
        }
        write_card(folder, card)


@torch.inference_mode()
def samples(unet: UNet2DModel, schedule: DDPMScheduler, recipe: Recipe, rows: int = 4, columns: int = 16) -> np.ndarray:
    """A sheet of pictures drawn from the model, (rows * H, columns * W) uint8."""
    schedule = DDPMScheduler.from_config(schedule.config)
    schedule.set_timesteps(250)
    random = torch.Generator().manual_seed(recipe.seed)
    x = torch.randn(rows * columns, 1, recipe.size, recipe.size, generator=random)
    for t in schedule.timesteps:
        x = schedule.step(unet(x, t).sample, t, x, generator=random).prev_sample
    grey = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().reshape(rows, columns, recipe.size, recipe.size)
    return grey.permute(0, 2, 1, 3).reshape(rows * recipe.size, columns * recipe.size).numpy()
