"""Training the small models that are shipped: seeded, resumable, with a card that says how each was made.

``python -m oms_core train ddpm-digits`` trains on the members of the built-in set only, without
augmentation, as research models that memorise are trained: AdamW without decay, warm-up and cosine,
clipped gradients, exponential moving average. What is special to a kind of model is its `Subject`.
"""

import errno
import hashlib
import io
import json
import logging
import os
import platform
import time
from copy import deepcopy
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import diffusers
import numpy as np
import torch
import transformers
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from tqdm import tqdm

from oms_core.assemble import png
from oms_core.cards import digests, write_card
from oms_core.errors import InputError
from oms_core.files import ASSETS
from oms_core.images import ImageSet, open_images
from oms_core.training.recipes import RECIPES, Recipe
from oms_core.writing import replace_file, unwritable, whole_folder

log = logging.getLogger(__name__)
WORK = Path(".training")
SEAL = hashlib.sha256().digest_size  # bytes before a checkpoint: the digest of what follows
SHIPPED = {"captioner": ASSETS / "captioners", "autoencoder": WORK}  # everything else is a model


class Subject(Protocol):
    """What is trained: a network, its loss, and how it is shipped.

    Attributes:
        module: the network; all its parameters are learned.
    """

    module: nn.Module

    def loss(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """The mean loss of some pictures, given by their places in the set, (B,) int64."""

    def save(self, module: nn.Module, folder: Path) -> None:
        """Write a network like `module` in the format of its family."""

    def samples(self, module: nn.Module) -> np.ndarray:
        """A sheet of pictures that shows what it learned, (H, W) uint8."""

    def facts(self, module: nn.Module) -> dict[str, Any]:
        """What else its card should say."""


def subject_of(recipe: Recipe, images: ImageSet, part: Path | None) -> Subject:
    """The subject of a recipe, with freshly drawn weights."""
    return import_module(f"oms_core.training.{recipe.family}").Subject(recipe, images, part)


def identity(recipe: dict[str, Any]) -> dict[str, Any]:
    """What decides the weights; which of them are kept and shown does not."""
    return {key: value for key, value in recipe.items() if key not in ("snapshots", "default", "timesteps")}


def snapshot_folder(folder: Path, epoch: int) -> Path:
    """Where a model's weights after an epoch are kept."""
    return folder / f"epoch-{epoch:04d}"


def sealed(content: bytes) -> bytes:
    """A content behind its SHA-256."""
    return hashlib.sha256(content).digest() + content


def opened(path: Path) -> bytes | None:
    """The content of a sealed file; None if it is missing, cannot be read, or is not what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    content = data[SEAL:]
    return content if sealed(content) == data else None


class Training:
    """One training that can stop after any epoch and go on as if it had not.

    Args:
        name: a key of `RECIPES`.
        work: folder for the checkpoint and the one before it; it may be deleted when the training is finished.
    """

    def __init__(self, name: str, work: Path = WORK) -> None:
        self.name, self.recipe, self.checkpoint = name, RECIPES[name], work / f"{name}.pt"
        self.previous = work / f"{name}.previous.pt"
        self.images = open_images(self.recipe.images).with_role(self.recipe.role)
        part = self.part(work) if self.recipe.part else None
        torch.manual_seed(self.recipe.seed)
        self.subject = subject_of(self.recipe, self.images, part)
        self.parameters = list(self.subject.module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, self.recipe.learning_rate, weight_decay=0)
        self.rate = self.learning_rate_schedule()
        self.ema = EMAModel(self.parameters, self.recipe.ema_decay, use_ema_warmup=True, power=3 / 4)
        self.random = torch.Generator().manual_seed(self.recipe.seed)
        self.losses: list[float] = []  # the mean of each epoch
        self.seconds = 0.0
        self.snapshots: dict[str, dict[str, str]] = {}  # the digests of their files, by epoch

    def part(self, work: Path) -> Path:
        """The folder of the part that this training needs, trained now unless it is there."""
        folder = Training(self.recipe.part, work).run(work)
        return snapshot_folder(folder, RECIPES[self.recipe.part].default)

    def learning_rate_schedule(self) -> SequentialLR:
        steps = self.recipe.epochs * -(-len(self.images) // self.recipe.batch)
        warm = LinearLR(self.optimizer, 1 / self.recipe.warm_up, total_iters=self.recipe.warm_up)
        floor = 0.05 * self.recipe.learning_rate
        cosine = CosineAnnealingLR(self.optimizer, steps - self.recipe.warm_up, floor)
        return SequentialLR(self.optimizer, [warm, cosine], [self.recipe.warm_up])

    def run(self, to: Path | None = None) -> Path:
        """Train to the end, writing each snapshot, then the card; return the model's folder.

        Args:
            to: where the model's folder is made; by default where models of its kind are shipped.

        Raises:
            InputError: see `resume`; or a snapshot that the training has passed is not in the folder as it was
                written; or something cannot be written.
        """
        folder = (to or SHIPPED.get(self.recipe.family, ASSETS / "models")) / self.name
        self.resume()
        self.check_snapshots(folder)
        try:
            self.finish(folder)
        except OSError as error:
            raise unwritable(folder, error.strerror, "--to") from error
        return folder

    def check_snapshots(self, folder: Path) -> None:
        """Refuse to go on where a snapshot of an earlier epoch is missing or has changed."""
        for epoch in self.recipe.snapshots:
            kept = snapshot_folder(folder, epoch)
            if epoch > len(self.losses):
                continue
            if not kept.is_dir():
                raise InputError(
                    f"{kept} is missing and the training is past that epoch; take it off the recipe's snapshots, or "
                    f"delete {self.checkpoint} to train from the start."
                )
            if digests(kept) != self.snapshots.get(str(epoch)):
                raise InputError(f"{kept} is damaged; restore it, or delete {self.checkpoint} to train from the start.")

    def finish(self, folder: Path) -> None:
        """Train from where the training is to the end."""
        remaining = range(len(self.losses), self.recipe.epochs)
        for epoch in tqdm(remaining, self.name, initial=len(self.losses), total=self.recipe.epochs, unit="epoch"):
            started = time.monotonic()
            self.losses.append(self.epoch())
            self.seconds += time.monotonic() - started
            if epoch + 1 in self.recipe.snapshots:
                self.keep_snapshot(snapshot_folder(folder, epoch + 1), epoch + 1)
            if (epoch + 1) % 10 == 0 or epoch + 1 == self.recipe.epochs:
                self.save()
        self.write_card(folder)

    def keep_snapshot(self, folder: Path, epoch: int) -> None:
        """Write the averaged weights, and remember what was written.

        Raises:
            OSError: they cannot be written.
        """
        try:
            with whole_folder(folder) as made:
                self.subject.save(self.averaged().half(), made)
                self.snapshots[str(epoch)] = digests(made)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error

    def epoch(self) -> float:
        """One pass over the pictures in a fresh order; the mean loss."""
        self.subject.module.train()
        order = torch.randperm(len(self.images), generator=self.random)
        return float(np.mean([self.step(rows) for rows in order.split(self.recipe.batch)]))

    def step(self, rows: Tensor) -> float:
        """One step of the optimizer on some pictures."""
        loss = self.subject.loss(rows, self.random)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1)
        self.optimizer.step()
        self.rate.step()
        self.ema.step(self.parameters)
        return loss.item()

    def stateful(self) -> dict[str, Any]:
        return {"module": self.subject.module, "optimizer": self.optimizer, "rate": self.rate, "ema": self.ema}

    def save(self) -> None:
        """Write the checkpoint in one step, so that a kill leaves the old one or the new one; the old one is kept.

        Raises:
            InputError: it cannot be written.
        """
        state = {key: part.state_dict() for key, part in self.stateful().items()}
        state |= {"random": self.random.get_state(), "losses": self.losses, "seconds": self.seconds}
        state |= {"snapshots": self.snapshots, "recipe": json.dumps(identity(asdict(self.recipe)))}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            if before := opened(self.checkpoint):
                replace_file(self.previous, sealed(before))
            replace_file(self.checkpoint, sealed(buffer.getvalue()))
        except OSError as error:
            raise InputError(
                f"{self.checkpoint} cannot be written ({error.strerror}); free space, then run the same command again."
            ) from error

    def resume(self) -> None:
        """Go on from the checkpoint if there is one; from the one before it, with a warning, if that is damaged.

        Raises:
            InputError: the checkpoint belongs to another recipe, or both are damaged.
        """
        if not os.path.lexists(self.checkpoint):
            return
        data = opened(self.checkpoint) or self.content_before()
        state = torch.load(io.BytesIO(data), weights_only=True)
        if identity(json.loads(state["recipe"])) != json.loads(json.dumps(identity(asdict(self.recipe)))):
            raise InputError(f"{self.checkpoint} was made with another recipe; delete it to train from the start.")
        for key, part in self.stateful().items():
            part.load_state_dict(state[key])
        self.random.set_state(state["random"])
        self.losses, self.seconds, self.snapshots = state["losses"], state["seconds"], state["snapshots"]

    def content_before(self) -> bytes:
        """What the checkpoint before the damaged one holds.

        Raises:
            InputError: it is missing or damaged as well.
        """
        data = opened(self.previous)
        if data is None:
            raise InputError(f"{self.checkpoint} is damaged; delete it to train from the start.")
        log.warning("%s is damaged; the training goes on from the checkpoint before it.", self.checkpoint)
        return data

    def averaged(self) -> nn.Module:
        """A copy of the network with the averaged weights."""
        module = deepcopy(self.subject.module)
        self.ema.copy_to(module.parameters())
        return module.eval()

    def write_card(self, folder: Path) -> None:
        """``samples.png`` and ``card.json``: data, recipe, loss curve, versions and the digest of each file."""
        module = self.averaged().half().float()  # as it is shipped
        group = "members" if self.recipe.role == "member" else self.recipe.role
        replace_file(folder / "samples.png", png(self.subject.samples(module)))
        card = {
            "name": self.name,
            "family": self.recipe.family,
            "images": self.recipe.images,
            group: len(self.images),
            f"{group}_digest": self.images.digest,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "recipe": asdict(self.recipe),
            "loss": [round(loss, 5) for loss in self.losses],
            "minutes": round(self.seconds / 60, 1),
            "made_with": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
                "threads": torch.get_num_threads(),
            },
        }
        write_card(folder, card | self.subject.facts(module))
