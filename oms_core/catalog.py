"""What models there are and what each is, read from files alone: nothing here imports torch.

A model is named by a built-in name (``ddpm-digits``, or ``ddpm-digits@700`` for the weights after epoch 700),
by ``ideal:SET`` for the closed-form memoriser of an image set's members, by a diffusers folder, or by the
``owner/name`` of a Hugging Face repository. In the app, folders and repositories are opened only as an
`oms_core.location.Location`.
"""

import math
import os
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from oms_core.decode import Profile, decode
from oms_core.errors import InputError
from oms_core.files import ASSETS, STEMS, VARIANTS, Part, digest_of, in_a_sentence, read_json
from oms_core.folders import DEFAULT_SCHEDULE, KINDS, Folder, read_folder
from oms_core.images import ImageSet, is_fresh, open_images
from oms_core.layouts import Stamp, stamps
from oms_core.location import part_of, require_location

MODELS = ASSETS / "models"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
MAX_DOWNLOAD = 40 * 10**9  # bytes
IDEAL_SIDE = 64  # its pictures are no larger: it compares each with every member
IDEAL_WIDTH = 0.25  # tau of the ideal denoiser, in units of pixels in [-1, 1]
CONTINUOUS_STEPS = 1000  # a continuous clock is cut into so many timesteps (Sec. 4.2)


@dataclass(frozen=True)
class Model:
    """What is known of a model before its weights are loaded.

    Attributes:
        name: as a user calls it.
        family: which file of `oms_core.families` loads it.
        fingerprint: SHA-256 over everything that decides its outputs.
        profile: the pictures it takes.
        timesteps: T.
        parameters: how many numbers were learned.
        images: the image set it comes with, if any.
        card: how it was made, if it is one of ours.
        kind: the class of its network.
        parts: what was found in each of its folders, see `oms_core.folders.Folder`.
        classes: the number of each class by each of its names, where it has classes.
        schedule: the scheduler's config.
        latent: (C, H, W) of x_0 where it is a latent, else nothing.
        captioned: whether its noise depends on a caption (or on the name of a class).
        commit: of the repository that it was fetched from.
    """

    name: str
    family: str
    fingerprint: str
    profile: Profile
    timesteps: int
    parameters: int = 0
    images: str = ""
    card: dict[str, Any] = field(default_factory=dict, compare=False)
    kind: str = ""
    parts: dict[str, Part] = field(default_factory=dict, compare=False)
    classes: dict[str, int] = field(default_factory=dict, compare=False)
    schedule: dict[str, Any] = field(default_factory=dict, compare=False)
    latent: tuple[int, ...] = ()
    captioned: bool = False
    commit: str = ""

    @property
    def dimension(self) -> int:
        """How many numbers x_0 has."""
        return math.prod(self.latent or (*self.profile.size, self.profile.channels))


def built_in() -> dict[str, dict[str, Any]]:
    """The card of each shipped model, by name; one that has not changed is not read again."""
    cards = [card_of(path, path.stat().st_mtime_ns) for path in sorted(MODELS.glob("*/card.json"))]
    return {card["name"]: card for card in cards}


@lru_cache
def card_of(path: Path, changed: int) -> dict[str, Any]:
    """A card as it was written at a moment, in nanoseconds; not to be changed."""
    return read_json(path)


def epochs(name: str) -> list[int]:
    """The epochs after which a built-in model's weights were kept."""
    return built_in()[name.partition("@")[0]]["recipe"]["snapshots"]


@in_a_sentence
def describe(name: str) -> Model:
    """Say what a model is without loading it.

    Raises:
        InputError: no such model, one that may not be opened, or files that are incomplete, unsafe or
            not supported.
    """
    if name.startswith("ideal:"):
        return ideal(open_images(part_of(name, name.removeprefix("ideal:"))), name)
    base, _, epoch = name.partition("@")
    if base in built_in():
        return shipped(base, epoch)
    require_location(name, "model", f"{', '.join(built_in())} and ideal:SET")
    if os.path.isdir(name):
        return in_folder(Path(name), name)
    if os.path.isfile(name):
        raise InputError(f"{name} is a file; name a diffusers folder, made from a checkpoint by the command convert.")
    if HUB_ID.fullmatch(name):
        folder, commit = download(name)
        return in_folder(folder, name, commit=commit)
    raise InputError(f"There is no model or folder {name!r}; built in are {', '.join(built_in())} and ideal:SET.")


def shipped(name: str, epoch: str = "") -> Model:
    """A built-in model, after its default epoch or another one that was kept."""
    card = built_in()[name]
    kept = card["recipe"]["snapshots"]
    number = epoch or str(card["recipe"]["default"])
    if not number.isdecimal() or int(number) not in kept:
        raise InputError(f"{name} was not kept after epoch {epoch}; kept are {', '.join(map(str, kept))}.")
    full_name = f"{name}@{int(number)}" if epoch else name
    folder = MODELS / name / f"epoch-{int(number):04d}"
    return in_folder(folder, full_name, images=card["images"], card=card)


def ideal(images: ImageSet, name: str) -> Model:
    """The perfect memoriser of a set's members, see `oms_core.families.ideal`."""
    members = images.with_role("member")
    if not len(members):
        raise InputError(f"{images.name} has no members, so there is nothing for {name} to remember.")
    profile = native_profile(images)
    fingerprint = digest_of([b"ideal", members.digest.encode(), repr((IDEAL_WIDTH, profile)).encode()])
    return Model(name, "ideal", fingerprint, profile, 1000, images=images.name, schedule=DEFAULT_SCHEDULE)


def native_profile(images: ImageSet) -> Profile:
    """The size and the channels of a set's first picture, large ones brought to `IDEAL_SIDE` pixels."""
    picture, _ = decode(images.read(images.table.index[0]))
    picture.thumbnail((IDEAL_SIDE, IDEAL_SIDE))
    return Profile((picture.height, picture.width), 1 if picture.mode == "L" else 3)


def in_folder(folder: Path, name: str, images: str = "", card: dict[str, Any] | None = None, commit: str = "") -> Model:
    """A model from its folder, see `oms_core.folders.read_folder`."""
    read = unchanged(folder)
    return Model(
        name,
        KINDS[read.kind].family,
        read.fingerprint,
        read.profile,
        read.schedule.get("num_train_timesteps", CONTINUOUS_STEPS),
        read.parameters,
        images,
        card or {},
        read.kind,
        read.parts,
        read.classes,
        read.schedule,
        read.latent,
        KINDS[read.kind].captioned,
        commit,
    )


def unchanged(folder: Path) -> Folder:
    """What a folder is; one whose files have not changed since it was read is not read again."""
    state = stamps(str(folder)) + stamps(str(folder.parent / "scheduler"))  # which a bare network may use
    return read_folder(folder) if is_fresh(state) else _unchanged(folder, state)


@lru_cache(maxsize=32)
def _unchanged(folder: Path, state: tuple[Stamp, ...]) -> Folder:
    return read_folder(folder)


def download(name: str) -> tuple[Path, str]:
    """A Hugging Face repository's configurations, vocabularies and safetensors, at one commit; and that commit.

    Raises:
        InputError: it cannot be reached, does not exist, or is too large.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(name, files_metadata=True)
    except Exception as error:  # the client raises many kinds, some of its own and some of its HTTP library
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:
            raise InputError(
                f"{name!r} is no folder here and cannot be fetched from Hugging Face; "
                "check the name and the connection."
            ) from error
        return folder, folder.name
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    files = wanted([*sizes])
    if sum(sizes[file] for file in files) > MAX_DOWNLOAD:
        raise InputError(f"{name} is larger than {MAX_DOWNLOAD // 10**9} GB; fetch it yourself and name its folder.")
    try:
        return Path(snapshot_download(name, revision=info.sha, allow_patterns=files)), info.sha
    except Exception as error:
        raise InputError(f"{name} could not be fetched from Hugging Face; try again.") from error


def wanted(files: list[str]) -> list[str]:
    """Of a repository's files, those that a model needs: no pickles, no code, and no second variant of its weights."""
    parts = {name for kind in KINDS.values() for name in (*kind.parts, *kind.optional)} | {"", "unet", "transformer"}
    near = [file for file in files if os.path.dirname(file) in parts | {"scheduler"}]
    chosen = [file for file in near if file.endswith((".json", ".txt", ".model"))]
    for part in sorted(parts):
        for stem in STEMS:
            found = [
                [file for file in near if os.path.dirname(file) == part and is_weights(os.path.basename(file), stem, v)]
                for v in VARIANTS
            ]
            chosen += next(filter(None, found), [])
    return chosen


def is_weights(file: str, stem: str, variant: str) -> bool:
    """Whether a file is a network's weights in one variant, or a part of them."""
    return bool(re.fullmatch(rf"{stem}{re.escape(variant)}(-\d+-of-\d+)?\.safetensors", file))
