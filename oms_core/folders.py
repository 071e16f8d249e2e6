"""What a model folder holds, for each kind that is known; checked before anything of it is loaded."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oms_core.decode import Profile
from oms_core.errors import InputError
from oms_core.files import digest_of, digest_of_file, read_bytes, read_json, refuse_code, weight_files, weight_sizes

MAX_PARAMETERS = 20 * 10**9
MAX_TIMESTEPS = 10_000
DIFFUSED = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
DEPTHS = ("layers_per_block", "num_layers", "depth", "num_hidden_layers", "transformer_layers_per_block")
FLOW = ("FlowMatchEulerDiscreteScheduler",)
DEFAULT_SCHEDULE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
NEVER_LOADED = ("safety_checker", "feature_extractor", "image_encoder")
CLIP = {"text_encoder": ("CLIPTextModel",), "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast")}
CLIP_PROJECTED = {
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": CLIP["tokenizer"],
    "tokenizer_2": CLIP["tokenizer"],
}
T5 = {"text_encoder": ("T5EncoderModel",), "tokenizer": ("T5Tokenizer", "T5TokenizerFast")}
T5_THIRD = {"text_encoder_3": T5["text_encoder"], "tokenizer_3": T5["tokenizer"]}
VAE = {"vae": ("AutoencoderKL",)}


@dataclass(frozen=True)
class Kind:
    """A kind of model folder, by the class of its network.

    Attributes:
        family: which file of `oms_core.families` loads it.
        parts: what else the pipeline must have, with the classes that are known.
        optional: the same for what it may have.
        settings: what the network's config may say, the default first.
        schedulers: the classes that are known.
    """

    family: str
    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    optional: dict[str, tuple[str, ...]] = field(default_factory=dict)
    settings: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    schedulers: tuple[str, ...] = DIFFUSED

    @property
    def captioned(self) -> bool:
        """Whether its noise depends on a caption, or on the name of a class: every latent kind here does."""
        return "vae" in self.parts


UNCONDITIONAL = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "time_embedding_type": ("positional", "learned"),
}
ONLY_CAPTIONS = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "time_embedding_type": ("positional",),
}
KINDS = {
    "UNet2DModel": Kind("ddpm", settings=UNCONDITIONAL),
    "UVit": Kind("uvit", schedulers=()),
    "UNet2DConditionModel": Kind("stable_diffusion", VAE | CLIP, settings=ONLY_CAPTIONS),
    "DiTTransformer2DModel": Kind("transformer", VAE),
    "PixArtTransformer2DModel": Kind("transformer", VAE | T5),
    "SD3Transformer2DModel": Kind("transformer", VAE | CLIP_PROJECTED, T5_THIRD, schedulers=FLOW),
}
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}  # as diffusers does


@dataclass(frozen=True)
class Folder:
    """What was found in a model folder.

    Attributes:
        kind: the class of its network, a key of `KINDS`.
        parts: folder of each part by its name in the pipeline; the network's is `network`.
        config: the network's.
        schedule: the scheduler's config, with its class; empty where the family has its own clock.
        profile: the pictures it takes.
        latent: (C, H, W) of x_0 where it is a latent, else nothing.
        parameters: how many numbers all its parts hold.
        fingerprint: SHA-256 over everything that decides its outputs.
    """

    kind: str
    parts: dict[str, Path]
    config: dict[str, Any]
    schedule: dict[str, Any]
    profile: Profile
    latent: tuple[int, ...]
    parameters: int
    fingerprint: str


def read_folder(folder: Path) -> Folder:
    """Say what a diffusers folder is: a pipeline, or a bare `UNet2DModel` or U-ViT.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    index = read_json(folder / "model_index.json") if os.path.isfile(folder / "model_index.json") else {}
    network = folder / next((name for name in ("unet", "transformer") if name in index), "" if not index else "unet")
    config = read_json(network / "config.json")
    kind = kind_of(config, network / "config.json")
    parts = {"network": network} | check_parts(index, kind, folder)
    check_settings(config, kind, network / "config.json")
    refuse_code(folder)
    schedule = schedule_of(folder, network, kind)
    sizes = {name: weight_sizes(part) for name, part in parts.items() if "tokenizer" not in name}
    parameters = sum(sum(part) for part in sizes.values())
    if parameters > MAX_PARAMETERS:
        raise InputError(f"{folder} holds more than {MAX_PARAMETERS // 10**9} billion parameters.")
    for name, part in sizes.items():
        check_depth(parts[name] / "config.json", len(part))
    profile, classes = profile_of(config, parts), classes_of(index)
    sides = [side // profile_scale(parts) for side in profile.size]
    latent = (config["in_channels"], *sides) if "vae" in parts else ()
    return Folder(kind, parts, config, schedule, profile, latent, parameters, fingerprint(parts, schedule, classes))


def kind_of(config: dict[str, Any], path: Path) -> str:
    """The class of a network, a key of `KINDS`."""
    name = config.get("_class_name")
    if name == "Transformer2DModel":
        name = LEGACY.get(config.get("norm_type"), name)
    if name not in KINDS:
        raise InputError(f"{path} describes {name!r}; known are {', '.join(KINDS)}.")
    return name


def check_parts(index: dict[str, Any], kind: str, folder: Path) -> dict[str, Path]:
    """The other parts of a pipeline, all of known classes, from diffusers and transformers alone."""
    path, known = folder / "model_index.json", KINDS[kind]
    listed = {name: part for name, part in index.items() if not name.startswith("_") and name not in NEVER_LOADED}
    allowed = {"scheduler": known.schedulers} | known.parts | known.optional
    found = {}
    for name, part in listed.items():
        if name in ("unet", "transformer"):
            if part not in (["diffusers", kind], ["diffusers", "Transformer2DModel"]):
                raise InputError(f"{path} has {name} {part!r}, but its config.json describes {kind}.")
        elif isinstance(part, list) and name in allowed and part != [None, None]:
            if len(part) != 2 or part[0] not in ("diffusers", "transformers") or part[1] not in allowed[name]:
                raise InputError(f"{path} has {name} {part!r}; known are {', '.join(allowed[name])}.")
            found[name] = folder / name
        elif isinstance(part, list) and part != [None, None]:
            raise InputError(f"{path} has {name} {part!r}, which no {kind} pipeline has.")
    for name in known.parts:
        if name not in found:
            raise InputError(f"{folder} has no {name}; a {kind} needs its whole pipeline folder.")
    for name, part in found.items():
        if not part.is_dir():
            raise InputError(f"{path} lists {name}, but {part} is missing.")
    if index and known.schedulers and "scheduler" not in found:
        raise InputError(f"{path} has no scheduler; known are {', '.join(known.schedulers)}.")
    found.pop("scheduler", None)
    return found


def check_settings(config: dict[str, Any], kind: str, path: Path) -> None:
    """Refuse what a network's config asks for beyond what its family knows."""
    for key, allowed in KINDS[kind].settings.items():
        if config.get(key, allowed[0]) not in allowed:
            known = " or ".join(map(repr, allowed))
            raise InputError(f"{path} has {key} {config[key]!r}; for a {kind} only {known} is supported.")


def check_depth(path: Path, tensors: int) -> None:
    """Refuse, before anything is built, a config with more layers than its weights have tensors."""
    config = read_json(path)
    for key in DEPTHS:
        layers = config.get(key, 1)
        for number in layers if isinstance(layers, list) else [layers]:
            if not isinstance(number, int) or number > tensors:
                raise InputError(f"{path} has {key} {layers!r}, more than its weights hold.")


def classes_of(index: dict[str, Any]) -> dict[str, int]:
    """The number of each class by each of its names, as the index of a class-conditional pipeline lists them.

    Raises:
        InputError: the list is not one of numbers and names.
    """
    names = index.get("id2label") or {}
    try:
        return {word.strip(): int(number) for number, words in names.items() for word in words.split(",")}
    except (AttributeError, ValueError) as error:
        raise InputError("model_index.json has an id2label that is not a list of numbers and names.") from error


def schedule_of(folder: Path, network: Path, kind: str) -> dict[str, Any]:
    """The scheduler's config beside the network; without one, the linear schedule of Ho et al. (2020)."""
    known = KINDS[kind].schedulers
    if not known:
        return {}
    places = [folder / "scheduler", network / "scheduler", network.parent / "scheduler", network]
    found = [p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").is_file()]
    if not found and kind != "UNet2DModel":
        raise InputError(f"{folder} has no scheduler/scheduler_config.json; a {kind} needs the one it came with.")
    config = read_json(found[0]) if found else DEFAULT_SCHEDULE
    name, steps = config.get("_class_name"), config.get("num_train_timesteps", 1000)
    if name not in known:
        raise InputError(f"{found[0]} names the scheduler {name!r}; known are {', '.join(known)}.")
    if not isinstance(steps, int) or not 1 <= steps <= MAX_TIMESTEPS:
        raise InputError(f"{found[0]} has num_train_timesteps {steps!r}; 1 to {MAX_TIMESTEPS} are supported.")
    return config | {"num_train_timesteps": steps}


def profile_scale(parts: dict[str, Path]) -> int:
    """How many pixels a side of x_0's grid stands for: 1, or what the autoencoder's blocks halve.

    Raises:
        InputError: its blocks are no list.
    """
    if "vae" not in parts:
        return 1
    path = parts["vae"] / "config.json"
    blocks = read_json(path).get("block_out_channels", [64])
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 8:
        raise InputError(f"{path} has block_out_channels {blocks!r}; a list is needed.")
    return 2 ** (len(blocks) - 1)


def profile_of(config: dict[str, Any], parts: dict[str, Path]) -> Profile:
    """Size and channels of the pictures, from the network's config and, if it works on latents, its autoencoder's."""
    path = parts["network"] / "config.json"
    size, channels = config.get("sample_size"), config.get("in_channels")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    scale = 1
    if "vae" in parts:
        vae = read_json(parts["vae"] / "config.json")
        if channels != vae.get("latent_channels", 4):
            latent = vae.get("latent_channels", 4)
            raise InputError(f"{path} has in_channels {channels!r}, but its autoencoder's latents have {latent!r}.")
        scale, channels = profile_scale(parts), vae.get("in_channels", 3)
    if not all(isinstance(side, int) and 2 <= side * scale <= 4096 for side in (height, width)):
        raise InputError(f"{path} has sample_size {size!r}; a size in pixels is needed.")
    if channels not in (1, 3):
        raise InputError(f"{path} has in_channels {channels!r}; models of 1 or 3 are supported.")
    if config.get("out_channels") not in (None, config["in_channels"], 2 * config["in_channels"]):
        raise InputError(f"{path} has out_channels that are neither its in_channels nor twice them.")
    return Profile((height * scale, width * scale), channels)


def fingerprint(parts: dict[str, Path], schedule: dict[str, Any], classes: dict[str, int]) -> str:
    """SHA-256 over the schedule, the classes, and the configuration and weights (or vocabulary) of every part."""
    total = [read_bytes(parts["network"] / "config.json"), json.dumps(schedule, sort_keys=True).encode()]
    total += [digest_of_file(path) for path in weight_files(parts["network"])]
    for name, part in sorted(parts.items()):
        if name != "network":
            words = sorted(path for path in part.iterdir() if path.suffix in (".json", ".txt", ".model"))
            files = words if "tokenizer" in name else [part / "config.json", *weight_files(part)]
            total += [name.encode(), *(digest_of_file(path) for path in files)]
    if classes:
        total.append(json.dumps(classes, sort_keys=True).encode())
    return digest_of(total)
