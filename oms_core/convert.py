"""Research checkpoints as diffusers folders: ``python -m oms_core convert FILE --to FOLDER``.

Three layouts are read, told apart by their tensors:

- the UNet of the pytorch-ddpm family, which SecMI, PIA and later work train: a dict with `ema_model` (or only
  `net_model`) and `x_T`. It becomes a `DDPMPipeline` with the same outputs.
- U-ViT's bare state dict. It becomes a folder of this program's `UVit`, which has the same tensors.
- Stable Diffusion 1.x and 2.x in one file, as first published: `model.diffusion_model`, `first_stage_model` and
  `cond_stage_model`. It becomes a `StableDiffusionPipeline`, with the configs and the tokenizer of another one.

A file is safetensors or opened with ``weights_only=True``: tensors and plain containers come out of it, code never
runs. A network is the tensors of the file and nothing else, so it takes as much memory as the file has bytes: what is
packed, or seen larger than it is stored, is refused before.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    ModelMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
    is_open_clip_model,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

from oms_core import schemas
from oms_core.errors import InputError
from oms_core.families.base import scheduler_of, tokenizer_for
from oms_core.families.uvit import UVit
from oms_core.files import Part, digest_of_file, read_json, reason, word_files
from oms_core.folders import (
    VOCABULARY,
    check_depth,
    check_parts,
    check_settings,
    kind_of,
    profile_of,
    schedule_of,
)
from oms_core.layouts import archive_of
from oms_core.writing import unwritable, whole_folder

State = dict[str, Tensor]
Configs = dict[str, dict[str, Any]]
SCHEMAS = {
    "unet": schemas.NETWORKS["UNet2DConditionModel"],
    "vae": schemas.AUTOENCODER,
    "text_encoder": schemas.TEXT["CLIPTextModel"],
}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
HEAD_WIDTH = 64  # of every public U-ViT
MAX_BLOCKS = 200  # of a network; the largest public U-ViT has 29
SHARED = 2  # times the bytes of a file that its tensors may have in all, as some are kept under two names
RESNET = {
    "block1.0": "norm1",
    "block1.2": "conv1",
    "temb_proj.1": "time_emb_proj",
    "block2.0": "norm2",
    "block2.3": "conv2",
    "shortcut": "conv_shortcut",
}
ORIGINAL = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")  # UNet, autoencoder, text encoder
ATTENTION = {"group_norm": "group_norm", "proj_q": "to_q", "proj_k": "to_k", "proj_v": "to_v", "proj": "to_out.0"}


def convert(file: Path, to: Path, config: Path | None = None) -> str:
    """Write a checkpoint as a diffusers folder; what it was is returned in a few words.

    Args:
        file: the checkpoint.
        to: the folder to make; it must not exist.
        config: for Stable Diffusion in one file, a diffusers folder of the same kind of model, with or without weights.

    Raises:
        InputError: the file cannot be read, holds more than tensors, is of no known layout, or does not fit `config`;
            or `to` exists or cannot be written.
    """
    if os.path.lexists(to):
        raise InputError(f"{to} exists already; name a folder that does not.")
    content = read(file)
    try:
        words, network, made = converted(content, file, config)
    except InputError:
        raise
    except Exception as error:  # tensors that are not as they should be fail in many ways
        raise InputError(f"{file} cannot be made a diffusers folder: {reason(error)}") from error
    transformers.utils.logging.disable_progress_bar()
    try:
        with whole_folder(to) as folder:
            made.save_pretrained(folder)
    except Exception as error:  # each of the libraries that write has its own
        raise unwritable(to, reason(error), "--to") from error
    size = np.ravel(network.config.sample_size) * getattr(made, "vae_scale_factor", 1)
    return f"{words}, {network.num_parameters():,} parameters, {' x '.join(map(str, size))} pixels"


def converted(content: dict[str, Any], file: Path, config: Path | None) -> tuple[str, ModelMixin, Any]:
    """What a checkpoint is, its denoising network, and what that is to be saved in."""
    if "pos_embed" in content:
        network = uvit(content, file)
        return "a U-ViT", network, network
    if all(any(str(key).startswith(part) for key in content) for part in ORIGINAL):
        pipeline = stable_diffusion(content, file, config)
        return "a Stable Diffusion in one file", pipeline.unet, pipeline
    if state := averaged(content):
        pipeline = research_ddpm(state, content.get("x_T"), file)
        return "a DDPM of the pytorch-ddpm family", pipeline.unet, pipeline
    raise InputError(
        f"{file} has neither ema_model nor net_model (pytorch-ddpm), nor pos_embed (U-ViT), nor all of "
        f"{', '.join(part[:-1] for part in ORIGINAL)} (Stable Diffusion 1.x and 2.x); its layout is unknown."
    )


def read(file: Path) -> dict[str, Any]:
    """The content of a checkpoint.

    Raises:
        InputError: it is missing, damaged, or holds anything but tensors in plain containers.
    """
    if not os.path.isfile(file):
        raise InputError(f"There is no file {file}; name a checkpoint.")
    try:
        refuse_packed(file)
        if file.suffix.lower() == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # unpickling fails in many ways
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise InputError(
                f"{file} holds objects other than tensors, which could run code; save its state dicts alone."
            ) from error
        raise InputError(f"{file} is no checkpoint that torch can read: {reason(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not a dict of tensors.")
    return content


def refuse_packed(file: Path) -> None:
    """Refuse an archive that holds more than its own bytes; torch.save packs nothing.

    Raises:
        InputError: it does.
    """
    with file.open("rb") as opened:
        if opened.read(4) != b"PK\x03\x04":
            return
    entries = archive_of(file).infolist()
    stored = all(one.compress_type == zipfile.ZIP_STORED and one.file_size == one.compress_size for one in entries)
    if not stored or sum(one.file_size for one in entries) > file.stat().st_size:
        raise InputError(f"{file} is packed, and unpacks to more than it is; load it in torch and save it again.")


def check_tensors(state: dict[Any, Any], file: Path, layout: str) -> None:
    """Refuse, before anything is built, what is no dict of plain tensors that the file holds.

    Raises:
        InputError: naming the first that is none.
    """
    for key, value in state.items():
        if not isinstance(key, str) or not is_stored(value):
            raise InputError(f"{file} is not laid out as {layout}: {str(key)[:80]!r} is no tensor that it holds.")
    if sum(value.nbytes for value in state.values()) > SHARED * file.stat().st_size:
        raise InputError(f"{file} is not laid out as {layout}: its tensors are larger than the file.")


def is_stored(value: Any) -> bool:
    """Whether a value is a tensor with memory of its own for each of its numbers, and has any."""
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_meta:
        return False
    return not (value.is_complex() or value.is_quantized) and 0 < value.nbytes <= value.untyped_storage().nbytes()


def alone(state: State) -> State:
    """The tensors, each with memory that nothing else uses, as they can be saved."""
    seen: set[int] = set()
    found = {}
    for key, value in state.items():
        memory = value.untyped_storage()
        whole = value.is_contiguous() and memory.nbytes() == value.nbytes and memory.data_ptr() not in seen
        seen.add(memory.data_ptr())
        found[key] = value if whole else value.clone(memory_format=torch.contiguous_format)
    return found


def averaged(content: dict[str, Any]) -> State:
    """The averaged weights, or the plain ones where there are no others, without DataParallel's prefix."""
    states = [content[name] for name in ("ema_model", "net_model") if isinstance(content.get(name), dict)]
    return {str(key).removeprefix("module."): value for key, value in states[0].items()} if states else {}


def filled(network: ModelMixin | PreTrainedModel, state: State, file: Path, layout: str = "its layout") -> Any:
    """A network that has no memory of its own yet (meta), with exactly these tensors as its weights.

    Raises:
        InputError: a tensor is missing, left over, of another shape, or not finite.
    """
    try:
        network.load_state_dict(alone(state), strict=True, assign=True)
    except RuntimeError as error:
        raise InputError(f"The tensors of {file} do not fit {layout}: {reason(error)}") from error
    for key, value in state.items():
        if not value.float().isfinite().all():
            raise InputError(f"The weights in {file} are not finite ({key}); the file is damaged or diverged.")
    return network.eval()


def uvit(state: State, file: Path) -> UVit:
    """A U-ViT whose sizes are read off its tensors."""
    try:
        _, tokens, width = state["pos_embed"].shape
        _, channels, patch, _ = state["patch_embed.proj.weight"].shape
    except (KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{file} looks like a U-ViT, but lacks its patch embedding.") from error
    check_tensors(state, file, "a U-ViT")
    depth = 2 * len({key.split(".")[1] for key in state if key.startswith("in_blocks.")})
    if depth > MAX_BLOCKS:
        raise InputError(
            f"{file} is not laid out as a U-ViT: it has {depth} blocks, at most {MAX_BLOCKS} are supported."
        )
    side = round((tokens - 1) ** 0.5) * patch
    with torch.device("meta"):
        network = UVit(side, channels, patch, width, depth, max(1, width // HEAD_WIDTH))
    return filled(network, state, file).float()


def research_ddpm(state: State, noise: Tensor | None, file: Path) -> DDPMPipeline:
    """A UNet of the pytorch-ddpm family as a `UNet2DModel` with the same outputs, and its schedule.

    Args:
        state: its tensors.
        noise: the `x_T` of the checkpoint, which alone knows the size of the pictures.
        file: the checkpoint.
    """
    if not isinstance(noise, Tensor):
        raise InputError(f"{file} lacks x_T, which tells the size of its pictures.")
    check_tensors(state | {"x_T": noise}, file, "a pytorch-ddpm checkpoint")
    try:
        levels = levels_of(state)
        network, tensors = research_unet(state, levels, noise.shape[-1]), renamed(state, levels)
        steps = len(state["time_embedding.timembedding.0.weight"])
        if steps > schemas.MAX_TIMESTEPS:
            raise ValueError(f"it has {steps} timesteps, at most {schemas.MAX_TIMESTEPS} are supported")
    except KeyError as error:
        raise InputError(f"{file} lacks {error} of a pytorch-ddpm checkpoint.") from error
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{file} is not laid out as a pytorch-ddpm checkpoint: {reason(error)}") from error
    return DDPMPipeline(filled(network, tensors, file).float(), DDPMScheduler(num_train_timesteps=steps, **LINEAR))


def research_unet(state: State, levels: list[list[int]], size: int) -> UNet2DModel:
    """A `UNet2DModel` of the sizes that are read off the tensors, which takes no memory yet."""
    width, channels = state["head.weight"].shape[:2]
    attended = [f"downblocks.{level[0]}.attn.proj_q.weight" in state for level in levels]
    with torch.device("meta"):
        return UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=state["tail.2.weight"].shape[0],
            block_out_channels=[state[f"downblocks.{level[0]}.block1.2.weight"].shape[0] for level in levels],
            layers_per_block=len(levels[0]),
            down_block_types=["AttnDownBlock2D" if attn else "DownBlock2D" for attn in attended],
            up_block_types=["AttnUpBlock2D" if attn else "UpBlock2D" for attn in reversed(attended)],
            attention_head_dim=None,
            flip_sin_to_cos=False,
            freq_shift=0,
            downsample_padding=1,
            norm_eps=1e-5,
            norm_num_groups=min(32, width),
        )


def levels_of(state: State) -> list[list[int]]:
    """The numbers of the residual blocks at each resolution, on the way down."""
    count = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("downblocks."))
    if count > MAX_BLOCKS:
        raise ValueError(f"it has {count} blocks, at most {MAX_BLOCKS} are supported")
    levels: list[list[int]] = [[]]
    for number in range(count):
        if f"downblocks.{number}.main.weight" in state:
            levels.append([])
        else:
            levels[-1].append(number)
    return levels


def renamed(state: State, levels: list[list[int]]) -> State:
    """The tensors under the names and in the shapes of a `UNet2DModel`."""
    found: State = {}
    for name in ("weight", "bias"):
        found[f"conv_in.{name}"] = state[f"head.{name}"]
        found[f"conv_norm_out.{name}"] = state[f"tail.0.{name}"]
        found[f"conv_out.{name}"] = state[f"tail.2.{name}"]
        found[f"time_embedding.linear_1.{name}"] = state[f"time_embedding.timembedding.1.{name}"]
        found[f"time_embedding.linear_2.{name}"] = state[f"time_embedding.timembedding.3.{name}"]
    clock = found["time_embedding.linear_1.weight"]  # its columns: sin, cos, sin, cos, ...
    found["time_embedding.linear_1.weight"] = torch.cat([clock[:, 0::2], clock[:, 1::2]], dim=1)
    for old, new in blocks_of(levels):
        found |= block(state, old, *new)
    return found


def blocks_of(levels: list[list[int]]) -> list[tuple[str, tuple[str, str]]]:
    """Old name, new prefix and new number of every block."""
    pairs = [(f"middleblocks.{k}", ("mid_block", str(k))) for k in (0, 1)]
    depth, up = len(levels), 0
    for level, numbers in enumerate(levels):
        pairs += [(f"downblocks.{n}", (f"down_blocks.{level}", str(k))) for k, n in enumerate(numbers)]
        if level < depth - 1:
            pairs.append((f"downblocks.{numbers[-1] + 1}", (f"down_blocks.{level}", "downsamplers.0")))
    for level, numbers in enumerate(reversed(levels)):
        for k in range(len(numbers) + 1):
            pairs.append((f"upblocks.{up}", (f"up_blocks.{level}", str(k))))
            up += 1
        if level < depth - 1:
            pairs.append((f"upblocks.{up}", (f"up_blocks.{level}", "upsamplers.0")))
            up += 1
    return pairs


def block(state: State, old: str, prefix: str, number: str) -> State:
    """The tensors of one residual block (with its attention) or of one change of resolution."""
    found: State = {}
    for key, value in state.items():
        if not key.startswith(f"{old}."):
            continue
        part, name = re.fullmatch(rf"{re.escape(old)}\.(.+)\.(\w+)", key).groups()
        if part == "main":
            found[f"{prefix}.{number}.conv.{name}"] = value
        elif part.startswith("attn."):
            value = value.flatten(1) if value.dim() == 4 else value  # a 1 x 1 convolution is a linear layer
            found[f"{prefix}.attentions.{number}.{ATTENTION[part.removeprefix('attn.')]}.{name}"] = value
        else:
            found[f"{prefix}.resnets.{number}.{RESNET.get(part, part)}.{name}"] = value
    return found


def stable_diffusion(state: State, file: Path, config: Path | None) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x or 2.x in the layout in which it was first published.

    Args:
        state: its tensors.
        file: the checkpoint, which has neither configs nor a tokenizer.
        config: a diffusers folder that has them.
    """
    if config is None:
        raise InputError(
            f"{file} is a Stable Diffusion in one file, which has no configs and no tokenizer; name a diffusers folder "
            "of the same kind of model with --config (its weights are not needed)."
        )
    check_tensors(state, file, "a Stable Diffusion in one file")
    configs, tokenizer, schedule = settings(config, len(state))
    unet, vae, text = networks(state, file, configs, config)
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer_for(CLIPTokenizer, tokenizer, text, str(config)),
        scheduler=scheduler_of(schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def networks(state: State, file: Path, configs: Configs, config: Path) -> list[Any]:
    """The UNet, the autoencoder and the text encoder that the configs describe, with exactly the file's weights."""
    layout = f"the configs in {config}"
    try:
        shapes = {key: tuple(value.shape) for key, value in state.items() if isinstance(value, Tensor)}
        for name, schema in SCHEMAS.items():
            schemas.check(configs[name], schema, config / name / "config.json", shapes)
        unet, vae, text = empty = unfilled(configs)
        tensors = [unet_tensors(state, unet), convert_ldm_vae_checkpoint(state, vae.config), text_tensors(state, text)]
    except Exception as error:  # the libraries raise many kinds for configs and tensors that are not as they should be
        raise InputError(f"The tensors of {file} do not fit {layout}: {reason(error)}") from error
    return [filled(network, its, file, layout) for network, its in zip(empty, tensors, strict=True)]


def words_in(folder: Path, config: Path) -> Part:
    """The files of a tokenizer."""
    names = word_files(folder, config, VOCABULARY)
    return Part(folder, config, {}, {name: digest_of_file(folder / name, config) for name in names})


def settings(config: Path, tensors: int) -> tuple[Configs, Part, dict[str, Any]]:
    """The configs of a diffusers folder of Stable Diffusion, with or without weights, its tokenizer and its scheduler.

    Raises:
        InputError: it is no such folder, or asks for more layers than there are tensors.
    """
    if not (config / "model_index.json").is_file():
        raise InputError(f"{config} has no model_index.json; name a diffusers folder of the same kind of model.")
    path = config / "unet" / "config.json"
    unet = read_json(path, config)
    kind = kind_of(unet, path)
    if kind != "UNet2DConditionModel":
        raise InputError(f"{path} describes a {kind}; name a folder of Stable Diffusion.")
    parts = check_parts(read_json(config / "model_index.json", config), kind, config)
    check_settings(unet, kind, path)
    configs = {"unet": unet} | {
        name: read_json(parts[name] / "config.json", config) for name in ("vae", "text_encoder")
    }
    for name, content in configs.items():
        check_depth(content, config / name / "config.json", tensors)
    profile_of({"network": unet, "vae": configs["vae"]}, path)
    return configs, words_in(parts["tokenizer"], config), schedule_of(config, path.parent, kind)


def unfilled(configs: Configs) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    """The networks that configs describe, which take no memory yet."""
    with torch.device("meta"):
        return (
            UNet2DConditionModel.from_config(configs["unet"]),
            AutoencoderKL.from_config(configs["vae"]),
            CLIPTextModel(CLIPTextConfig.from_dict(dict(configs["text_encoder"]))),
        )


def unet_tensors(state: State, network: UNet2DConditionModel) -> State:
    """The UNet's tensors under the names of diffusers; the averaged ones where there are any."""
    prefix = ORIGINAL[0]
    old = {
        key: state.get("model_ema." + key.removeprefix("model.").replace(".", ""), value)
        for key, value in state.items()
        if key.startswith(prefix)
    }
    new = convert_ldm_unet_checkpoint(old, network.config)
    if len(new) != len(old):
        raise ValueError("its UNet has parts that they do not know")
    return new


def text_tensors(state: State, network: CLIPTextModel) -> State:
    """The text encoder's tensors, those of CLIP (1.x) or of OpenCLIP (2.x), under the names of transformers."""
    found = (
        convert_open_clip_checkpoint(network, state)
        if is_open_clip_model(state)
        else convert_ldm_clip_checkpoint(state)
    )
    return {key.removeprefix("text_model."): value for key, value in found.items() if "position_ids" not in key}
