"""What a model folder holds, for each kind that is known; checked before anything of it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oms_core import schemas
from oms_core.decode import Profile
from oms_core.errors import InputError
from oms_core.files import (
    MAX_VOCABULARY_BYTES,
    Part,
    digest_of,
    digest_of_file,
    numbers_of,
    parse,
    read_bytes,
    read_json,
    refuse_code,
    shapes_of,
    weight_files,
    within,
    word_files,
)

MAX_PARAMETERS = 20 * 10**9
DIFFUSED = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
VOCABULARY = (".json", ".txt", ".model")  # how the files of a tokenizer end
WHOLE = {
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",), ("spiece.model",)),
}  # without all of one of these a tokenizer knows no words
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
        parts: each by its name in the pipeline; the network is `network`.
        schedule: the scheduler's config, with its class; empty where the family has its own clock.
        profile: the pictures it takes.
        latent: (C, H, W) of x_0 where it is a latent, else nothing.
        parameters: how many numbers all its parts hold.
        classes: the number of each class by each of its names.
        fingerprint: SHA-256 over everything that decides its outputs.
    """

    kind: str
    parts: dict[str, Part]
    schedule: dict[str, Any]
    profile: Profile
    latent: tuple[int, ...]
    parameters: int
    classes: dict[str, int]
    fingerprint: str


def read_folder(folder: Path) -> Folder:
    """Say what a diffusers folder is: a pipeline, or a bare `UNet2DModel` or U-ViT.

    Raises:
        InputError: naming the file and what is wrong with it.
    """
    index = read_index(folder)
    network = folder / next((name for name in ("unet", "transformer") if name in index), "" if not index else "unet")
    path = network / "config.json"
    data = read_bytes(path, folder)
    config = parse(data, path)
    kind = kind_of(config, path)
    folders = check_parts(index, kind, folder)
    check_settings(config, kind, path)
    refuse_code(folder)
    schedule, classes = schedule_of(folder, network, kind), classes_of(index)
    parts = {"network": network_part(network, folder, data, schemas.NETWORKS[kind])}
    for name, its in folders.items():
        parts[name] = part_of(name, its, folder, index[name][1])
    parameters = sum(part.numbers for part in parts.values())
    if parameters > MAX_PARAMETERS:
        raise InputError(f"{folder} holds more than {MAX_PARAMETERS // 10**9} billion parameters.")
    configs = {name: part.config for name, part in parts.items()}
    profile, latent = profile_of(configs, path), latent_of(configs, path)
    return Folder(kind, parts, schedule, profile, latent, parameters, classes, fingerprint(parts, schedule, classes))


def read_index(folder: Path) -> dict[str, Any]:
    """The model_index.json of a pipeline; empty where there is none."""
    path = folder / "model_index.json"
    if not os.path.lexists(path):
        return {}
    index = read_json(path, folder)
    schemas.check_bounds(index, path)
    return index


def part_of(name: str, folder: Path, home: Path, kind: str) -> Part:
    """A part of a pipeline, by its name and class there."""
    if "tokenizer" in name:
        return tokenizer_part(folder, home, kind)
    schema = schemas.AUTOENCODER if name == "vae" else schemas.TEXT[kind]
    return network_part(folder, home, read_bytes(folder / "config.json", home), schema)


def network_part(folder: Path, home: Path, data: bytes, schema: schemas.Schema) -> Part:
    """A network: its config and its weights.

    Args:
        folder: where they lie.
        home: the model's folder, which a link must not leave.
        data: its config.json.
        schema: of its class.

    Raises:
        InputError: see `schemas.check` and `oms_core.files.shapes_of`; or it has more layers than its weights.
    """
    path = folder / "config.json"
    config, shapes = parse(data, path), shapes_of(folder, home)
    numbers = numbers_of(shapes)
    if numbers > MAX_PARAMETERS:
        raise InputError(f"{folder} holds more than {MAX_PARAMETERS // 10**9} billion parameters.")
    check_depth(config, path, len(shapes))
    schemas.check(config, schema, path, shapes)
    digests = {"config.json": hashlib.sha256(data).digest()}
    digests |= {name: digest_of_file(folder / name, home) for name in weight_files(folder, home)}
    return Part(folder, home, config, digests, numbers)


def tokenizer_part(folder: Path, home: Path, kind: str) -> Part:
    """A tokenizer: all its files.

    Raises:
        InputError: those are missing without which it knows no words, or one cannot be read.
    """
    names = word_files(folder, home, VOCABULARY)
    choices = WHOLE[kind.removesuffix("Fast")]
    if not any({*choice} <= {*names} for choice in choices):
        needed = ", or ".join(" and ".join(choice) for choice in choices)
        raise InputError(f"{folder} holds no vocabulary, which is {needed}; restore the original files.")
    part = Part(folder, home, {}, {name: digest_of_file(folder / name, home, MAX_VOCABULARY_BYTES) for name in names})
    if "tokenizer_config.json" in names:
        path = folder / "tokenizer_config.json"
        schemas.check(parse(part.read(path.name), path), schemas.TOKENIZER, path)
    return part


def kind_of(config: dict[str, Any], path: Path) -> str:
    """The class of a network, a key of `KINDS`."""
    name, norm = config.get("_class_name"), config.get("norm_type")
    if name == "Transformer2DModel" and isinstance(norm, str):
        name = LEGACY.get(norm, name)
    if not isinstance(name, str) or name not in KINDS:
        raise InputError(f"{path} describes {schemas.shown(name)}; known are {', '.join(KINDS)}.")
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
                raise InputError(f"{path} has {name} {schemas.shown(part)}, but its config.json describes {kind}.")
        elif isinstance(part, list) and name in allowed and part != [None, None]:
            if len(part) != 2 or part[0] not in ("diffusers", "transformers") or part[1] not in allowed[name]:
                raise InputError(f"{path} has {name} {schemas.shown(part)}; known are {', '.join(allowed[name])}.")
            found[name] = folder / name
        elif isinstance(part, list) and part != [None, None]:
            raise InputError(f"{path} has {name} {schemas.shown(part)}, which no {kind} pipeline has.")
    for name in known.parts:
        if name not in found:
            raise InputError(f"{folder} has no {name}; a {kind} needs its whole pipeline folder.")
    for name, part in found.items():
        if not within(part, folder).is_dir():
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
            raise InputError(f"{path} has {key} {schemas.shown(config[key])}; for a {kind} only {known} is supported.")


def check_depth(config: dict[str, Any], path: Path, tensors: int) -> None:
    """Refuse, before anything is built, a config with more layers than its weights have tensors."""
    if schemas.layers(config) * schemas.LEAST_TENSORS > tensors:
        raise InputError(f"{path} asks for {schemas.layers(config):,} layers, more than its weights hold.")


def classes_of(index: dict[str, Any]) -> dict[str, int]:
    """The number of each class by each of its names, as the index of a class-conditional pipeline lists them.

    Raises:
        InputError: the list is not one of numbers and names.
    """
    names = index.get("id2label") or {}
    try:
        classes = {word.strip(): int(number) for number, words in names.items() for word in words.split(",")}
    except (AttributeError, ValueError) as error:
        raise InputError("model_index.json has an id2label that is not a list of numbers and names.") from error
    if not all(0 <= number <= schemas.MOST for number in classes.values()):
        raise InputError("model_index.json has an id2label with a number that no class has.")
    return classes


def schedule_of(folder: Path, network: Path, kind: str) -> dict[str, Any]:
    """The scheduler's config beside the network; without one, the linear schedule of Ho et al. (2020)."""
    known = KINDS[kind].schedulers
    if not known:
        return {}
    places = [folder / "scheduler", network / "scheduler", network.parent / "scheduler", network]
    found = [p / "scheduler_config.json" for p in places if os.path.lexists(p / "scheduler_config.json")]
    if not found and kind != "UNet2DModel":
        raise InputError(f"{folder} has no scheduler/scheduler_config.json; a {kind} needs the one it came with.")
    if not found:
        return DEFAULT_SCHEDULE
    config = read_json(found[0], folder if found[0].is_relative_to(folder) else network.parent)
    name = config.get("_class_name")
    if name not in known:
        raise InputError(f"{found[0]} names the scheduler {schemas.shown(name)}; known are {', '.join(known)}.")
    schemas.check(config, schemas.SCHEDULER, found[0])
    steps = config.get("num_train_timesteps", 1000)
    if steps is None:
        raise InputError(f"{found[0]} has num_train_timesteps None; a number of timesteps is needed.")
    return config | {"num_train_timesteps": steps}


def profile_scale(configs: dict[str, dict[str, Any]], path: Path) -> int:
    """How many pixels a side of x_0's grid stands for: 1, or what the autoencoder's blocks halve.

    Raises:
        InputError: its blocks are no list.
    """
    if "vae" not in configs:
        return 1
    blocks = configs["vae"].get("block_out_channels", [64])
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 8:
        raise InputError(f"The autoencoder of {path} has block_out_channels {schemas.shown(blocks)}; a list is needed.")
    return 2 ** (len(blocks) - 1)


def grid_of(config: dict[str, Any]) -> tuple[Any, Any]:
    """Height and width of what a network takes, as its config gives them."""
    size = config.get("sample_size")
    return tuple(size) if isinstance(size, list) and len(size) == 2 else (size, size)


def latent_of(configs: dict[str, dict[str, Any]], path: Path) -> tuple[int, ...]:
    """(C, H, W) of x_0 where it is a latent, else nothing."""
    config = configs["network"]
    return (config["in_channels"], *grid_of(config)) if "vae" in configs else ()


def profile_of(configs: dict[str, dict[str, Any]], path: Path) -> Profile:
    """Size and channels of the pictures, from the network's config and, if it works on latents, its autoencoder's.

    Args:
        configs: of the parts, by their names.
        path: of the network's.

    Raises:
        InputError: they give none, or do not fit each other.
    """
    config, (height, width) = configs["network"], grid_of(configs["network"])
    own = channels = config.get("in_channels")
    scale = profile_scale(configs, path)
    if "vae" in configs:
        latent, channels = configs["vae"].get("latent_channels", 4), configs["vae"].get("in_channels", 3)
        if own != latent:
            said = f"{path} has in_channels {schemas.shown(own)}, but its autoencoder's latents"
            raise InputError(f"{said} have {schemas.shown(latent)}.")
    if not all(type(side) is int and 2 <= side * scale <= 4096 for side in (height, width)):
        raise InputError(
            f"{path} has sample_size {schemas.shown(config.get('sample_size'))}; a size in pixels is needed."
        )
    if type(own) is not int or channels not in (1, 3):
        raise InputError(f"{path} has in_channels {schemas.shown(own)}; models of 1 or 3 are supported.")
    if config.get("out_channels") not in (None, own, 2 * own):
        raise InputError(f"{path} has out_channels that are neither its in_channels nor twice them.")
    return Profile((height * scale, width * scale), channels)


def fingerprint(parts: dict[str, Part], schedule: dict[str, Any], classes: dict[str, int]) -> str:
    """SHA-256 over the schedule, the classes, and the configuration and weights (or vocabulary) of every part."""
    network = parts["network"]
    total = [network.read("config.json"), json.dumps(schedule, sort_keys=True).encode()]
    total += [network.digests[name] for name in network.weights]
    for name, part in sorted(parts.items()):
        if name != "network":
            total += [name.encode(), *part.digests.values()]
    if classes:
        total.append(json.dumps(classes, sort_keys=True).encode())
    return digest_of(total)
