"""What models there are and what each is, read from files alone: nothing here imports torch.

A model is named by a built-in name (``ddpm-digits``, or ``ddpm-digits@300`` for the weights after epoch 300),
by ``ideal:SET`` for the closed-form memoriser of an image set's members, by a diffusers folder, or by the
``owner/name`` of a Hugging Face repository.
"""

import hashlib
import json
import math
import os
import re
import struct
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from oms_core.decode import Profile, decode
from oms_core.errors import InputError
from oms_core.images import ASSETS, ImageSet, open_images

MODELS = ASSETS / "models"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
MAX_CONFIG_BYTES = 2**20
MAX_PARAMETERS = 20 * 10**9
MAX_TIMESTEPS = 10_000
IDEAL_SIDE = 64  # its pictures are no larger: it compares each with every member
IDEAL_WIDTH = 0.25  # tau of the ideal denoiser, in units of pixels in [-1, 1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
PARTS_OF_WEIGHTS = "diffusion_pytorch_model-*-of-*.safetensors"
CONFIGS = ("config.json", "model_index.json", "scheduler_config.json", f"{WEIGHTS}.index.json")
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
UNCONDITIONAL = {  # what a network's config may say, the default first
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "time_embedding_type": ("positional", "learned"),
}
DEFAULT_SCHEDULE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}


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
        unet: folder of the network's config and weights.
        schedule: the scheduler's config.
    """

    name: str
    family: str
    fingerprint: str
    profile: Profile
    timesteps: int
    parameters: int = 0
    images: str = ""
    card: dict[str, Any] = field(default_factory=dict, compare=False)
    unet: Path | None = None
    schedule: dict[str, Any] = field(default_factory=dict, compare=False)


def built_in() -> dict[str, dict[str, Any]]:
    """The card of each shipped model, by name."""
    cards = [read_json(path) for path in sorted(MODELS.glob("*/card.json"))]
    return {card["name"]: card for card in cards}


def epochs(name: str) -> list[int]:
    """The epochs after which a built-in model's weights were kept."""
    return built_in()[name.partition("@")[0]]["recipe"]["snapshots"]


def describe(name: str) -> Model:
    """Say what a model is without loading it.

    Raises:
        InputError: no such model, or its files are incomplete, unsafe or not supported.
    """
    if name.startswith("ideal:"):
        return ideal(open_images(name.removeprefix("ideal:")), name)
    base, _, epoch = name.partition("@")
    if base in built_in():
        return shipped(base, epoch)
    if os.path.isdir(name):
        return in_folder(Path(name), name)
    if os.path.isfile(name):
        raise InputError(f"{name} is a file; name the diffusers folder that holds config.json and its weights.")
    if HUB_ID.fullmatch(name):
        return in_folder(download(name), name)
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


def in_folder(folder: Path, name: str, images: str = "", card: dict[str, Any] | None = None) -> Model:
    """A `DDPMPipeline` folder or a bare `UNet2DModel` folder.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    unet = folder
    if os.path.isfile(folder / "model_index.json"):
        check_pipeline(folder / "model_index.json")
        unet = folder / "unet"
    config = read_json(unet / "config.json")
    check_network(config, unet / "config.json")
    refuse_code(folder)
    schedule = schedule_of(folder, unet)
    shapes = weight_shapes(unet)
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int) or layers > len(shapes):
        raise InputError(f"{unet / 'config.json'} has layers_per_block {layers!r}, more than its weights hold.")
    parts = [read_bytes(unet / "config.json"), json.dumps(schedule, sort_keys=True).encode()]
    fingerprint = digest_of([*parts, *(digest_of_file(path) for path in weight_files(unet))])
    parameters = sum(size for _, size in shapes)
    profile = profile_of(config, unet)
    timesteps = schedule["num_train_timesteps"]
    return Model(name, "ddpm", fingerprint, profile, timesteps, parameters, images, card or {}, unet, schedule)


def check_pipeline(path: Path) -> None:
    """A pipeline of a pixel-space network and its scheduler, and of nothing else, from diffusers alone."""
    parts = {key: part for key, part in read_json(path).items() if not key.startswith("_")}
    known = {"unet": [["diffusers", "UNet2DModel"]], "scheduler": [["diffusers", name] for name in SCHEDULERS]}
    for key in (*known, *parts):
        if parts.get(key) not in known.get(key, []):
            part = parts.get(key)
            raise InputError(f"{path} has {key} {part!r}; supported are a UNet2DModel and its scheduler.")


def check_network(config: dict[str, Any], path: Path) -> None:
    """An unconditional `UNet2DModel` on discrete timesteps."""
    if config.get("_class_name") != "UNet2DModel":
        raise InputError(f"{path} describes {config.get('_class_name')!r}; UNet2DModel is supported.")
    for key, allowed in UNCONDITIONAL.items():
        if config.get(key, allowed[0]) not in allowed:
            raise InputError(f"{path} has {key} {config[key]!r}; unconditional discrete-time models are supported.")


def refuse_code(folder: Path) -> None:
    """A model folder holds data; code in it is refused, never run."""
    for path in folder.rglob("*.py"):
        raise InputError(f"{path} is code; remove it, a model folder holds only configurations and weights.")


def profile_of(config: dict[str, Any], folder: Path) -> Profile:
    """Size and channels from a network's config."""
    size, channels = config.get("sample_size"), config.get("in_channels")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if not all(isinstance(side, int) and 2 <= side <= 4096 for side in (height, width)):
        raise InputError(f"{folder / 'config.json'} has sample_size {size!r}; a size in pixels is needed.")
    if channels not in (1, 3):
        raise InputError(f"{folder / 'config.json'} has in_channels {channels!r}; models of 1 or 3 are supported.")
    if config.get("out_channels", 3) not in (channels, 2 * channels):  # the second half is a learned variance
        raise InputError(f"{folder / 'config.json'} has out_channels that are neither its in_channels nor twice them.")
    return Profile((height, width), channels)


def schedule_of(folder: Path, unet: Path) -> dict[str, Any]:
    """The scheduler's config beside the network; without one, the linear schedule of Ho et al. (2020)."""
    places = [folder / "scheduler", unet / "scheduler", unet.parent / "scheduler", unet]
    found = [p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()]
    config = read_json(found[0]) if found else DEFAULT_SCHEDULE
    name, steps = config.get("_class_name"), config.get("num_train_timesteps", 1000)
    if name not in SCHEDULERS:
        raise InputError(f"{found[0]} names the scheduler {name!r}; known are {', '.join(SCHEDULERS)}.")
    if not isinstance(steps, int) or not 1 <= steps <= MAX_TIMESTEPS:
        raise InputError(f"{found[0]} has num_train_timesteps {steps!r}; 1 to {MAX_TIMESTEPS} are supported.")
    return config | {"num_train_timesteps": steps}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a network: one file, or the parts that a large one was split into."""
    whole = folder / WEIGHTS
    return [whole] if whole.is_file() else sorted(folder.glob(PARTS_OF_WEIGHTS))


def weight_shapes(folder: Path) -> list[tuple[str, int]]:
    """Name and size of each tensor, read from the headers alone.

    Raises:
        InputError: there are no safetensors, or a header is not one.
    """
    files = weight_files(folder)
    if not files:
        raise InputError(f"{folder} holds no {WEIGHTS}; only safetensors weights are loaded, never pickles.")
    shapes = [(key, math.prod(entry["shape"])) for path in files for key, entry in safetensors_header(path).items()]
    if sum(size for _, size in shapes) > MAX_PARAMETERS:
        raise InputError(f"{folder} holds more than {MAX_PARAMETERS // 10**9} billion parameters.")
    return shapes


def safetensors_header(path: Path) -> dict[str, Any]:
    """The tensors that a safetensors file lists: eight bytes of length, then JSON (the format's documentation)."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(100 * 2**20, path.stat().st_size):
                raise ValueError("its header is longer than the file")
            tensors = json.loads(file.read(length))
        tensors.pop("__metadata__", None)
        if not all(isinstance(n, int) and n >= 0 for entry in tensors.values() for n in entry["shape"]):
            raise ValueError("a shape is not one")
        if 8 + length + max(entry["data_offsets"][1] for entry in tensors.values()) != path.stat().st_size:
            raise ValueError("it is not as long as its header says")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise InputError(f"{path} is not a complete safetensors file; copy it again.") from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most `MAX_CONFIG_BYTES`.

    Raises:
        InputError: the file is missing, too large, or not a JSON object.
    """
    data = read_bytes(path)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON; restore the original file.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object; restore the original file.")
    return content


def read_bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InputError(f"{path} is larger than a configuration should be ({MAX_CONFIG_BYTES >> 20} MB).")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} is missing or cannot be read.") from error


def digest_of(parts: list[bytes]) -> str:
    """SHA-256 over parts, each preceded by its length."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()


def digest_of_file(path: Path) -> bytes:
    """SHA-256 of a file; asked again, an unchanged file is not read again."""
    status = os.stat(path)
    return _digest_of_file(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest_of_file(path: Path, size: int, changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def download(name: str) -> Path:
    """A Hugging Face repository's configurations and safetensors, at one commit.

    Raises:
        InputError: it cannot be reached or does not exist.
    """
    from huggingface_hub import snapshot_download

    names = (*CONFIGS, WEIGHTS, PARTS_OF_WEIGHTS)
    patterns = [folder + file for folder in ("", "unet/", "scheduler/") for file in names]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the client raises many kinds, some of its own and some of its HTTP library
        raise InputError(
            f"{name!r} is no folder here and cannot be fetched from Hugging Face; check the name and the connection."
        ) from error
