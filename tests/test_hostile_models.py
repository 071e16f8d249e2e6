"""Model folders that somebody made to do harm, or that changed meanwhile: one sentence, or no difference at all."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import watch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from oms_core import captions, schemas
from oms_core.catalog import Model, describe
from oms_core.denoiser import Denoiser
from oms_core.device import Placement
from oms_core.errors import InputError
from oms_core.families import load
from oms_core.folders import check_depth
from oms_core.location import Location

Change = Callable[[Path], object]

CPU = Placement("cpu", "float32")
SECONDS = 20  # of a CPU
INDEX, NETWORK, SCHEDULER = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"
TEXT, VAE, TRANSFORMER = "text_encoder/config.json", "vae/config.json", "transformer/config.json"
UNET_WEIGHTS, VAE_WEIGHTS = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT_WEIGHTS, WORDS = "text_encoder/model.safetensors", "tokenizer/tokenizer.json"
SAVE: dict[str, Callable[[Path], Path]] = {
    "uvit": tiny.save_uvit,
    "sd": tiny.save_stable_diffusion,
    "dit": tiny.save_dit,
    "pixart": tiny.save_pixart,
    "sd3": lambda folder: tiny.save_sd3(folder, third=True),
    "blip": tiny.save_blip,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> dict[str, Path]:
    """A tiny model of every kind; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    return {"ddpm": pipeline} | {kind: save(folder / kind) for kind, save in SAVE.items()}


def read(folder: Path) -> Model:
    return describe(Location(folder))


def used(folder: Path) -> Denoiser | None:
    """Look at a folder and load it, as a model or as a captioner that writes a caption."""
    if (folder / "preprocessor_config.json").exists():
        captions.loaded.cache_clear()
        captions.loaded(captions.describe(Location(folder)), CPU)([Image.new("L", (8, 8))])
        return None
    return load(read(folder), CPU)


@torch.inference_mode()
def answer(denoiser: Denoiser) -> torch.Tensor:
    """What a model says of one noise."""
    shape = denoiser.encode(torch.zeros(1, *denoiser.profile.size, denoiser.profile.channels).byte().numpy()).shape
    x_t = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return denoiser.eps(x_t, 300, denoiser.condition(["a photo of a cat"]))


# Ways to do harm


def setting(file: str, **values: Any) -> Change:
    """Put values into a configuration."""
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_bytes()) | values))


def replaced(file: str, make: Callable[[Path], object]) -> Change:
    """Put something that is no regular file in the place of one."""

    def change(folder: Path) -> None:
        path = folder / file
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        make(path)

    return change


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def outside(file: str) -> Change:
    """Move a file or a part out of the folder and link to it."""

    def change(folder: Path) -> None:
        there = folder.parent / "outside" / file.replace("/", "-")
        there.parent.mkdir(exist_ok=True)
        shutil.move(folder / file, there)
        (folder / file).symlink_to(there)

    return change


def split(file: str, parts: int, changed: Callable[[list[dict]], object] = lambda parts: None) -> Change:
    """Save weights in parts instead, perhaps changed."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        (folder / file).unlink()
        pieces = [{key: tensors[key] for key in [*tensors][number::parts]} for number in range(parts)]
        changed(pieces)
        for number, piece in enumerate(pieces, 1):
            name = file.replace(".safetensors", f"-{number:05d}-of-{parts:05d}.safetensors")
            save_file(piece, folder / name, {"format": "pt"})

    return change


def indexed(file: str, target: str) -> Change:
    """Beside weights an index which says that all of them lie in another file."""

    def change(folder: Path) -> None:
        names = [key for path in (folder / file).parent.glob("*.safetensors") for key in load_file(path)]
        listed = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        (folder / f"{file}.index.json").write_text(json.dumps(listed))

    return change


def added(file: str, tensor: torch.Tensor) -> Change:
    """Weights with a tensor more."""
    return lambda folder: save_file(load_file(folder / file) | {"more": tensor}, folder / file, {"format": "pt"})


def copied(file: str, to: str) -> Change:
    return lambda folder: shutil.copy(folder / file, folder / to)


def after(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def headed(text: bytes, length: int | None = None) -> Change:
    """A safetensors file of a header alone."""
    data = struct.pack("<Q", len(text) if length is None else length) + text
    return lambda folder: (folder / UNET_WEIGHTS).write_bytes(data)


def many(count: int) -> bytes:
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(f'"{number}":{entry}' for number in range(count)) + "}").encode()


def pairs(folder: Path, merges: list[str]) -> None:
    """The vocabulary in two files, as CLIP's was published."""
    words = json.loads((folder / WORDS).read_bytes())["model"]["vocab"]
    (folder / WORDS).unlink()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer/merges.txt").write_text("\n".join(["#version: 0.2", *merges]))


def unjoined(folder: Path) -> None:
    content = json.loads((folder / WORDS).read_bytes())
    content["model"]["merges"] = []
    (folder / WORDS).write_text(json.dumps(content))


def emptied(name: str) -> Change:
    return lambda folder: [path.unlink() for path in (folder / name).iterdir()]


def removed(file: str) -> Change:
    return lambda folder: (folder / file).unlink()


NOT_REGULAR, LEADS_OUT, NO_WORDS = "no regular file", "is a link out of the model's folder", "holds no vocabulary"
TWO, COSTS = "either of which could be its weights; keep one", "operations for one picture of its own sample_size"
HUGE = [8] * 2000
REFUSED: dict[str, tuple[str, Change, str]] = {
    # what is no regular file
    "a pipe for a config": ("ddpm", replaced(NETWORK, os.mkfifo), NOT_REGULAR),
    "a device for a config": ("ddpm", replaced(NETWORK, link("/dev/zero")), LEADS_OUT),
    "a folder for a config": ("ddpm", replaced(NETWORK, Path.mkdir), NOT_REGULAR),
    "a broken link for a config": ("ddpm", replaced(NETWORK, link("nowhere")), NOT_REGULAR),
    "a link to itself for a config": ("ddpm", replaced(NETWORK, link("config.json")), NOT_REGULAR),
    "a pipe for weights": ("ddpm", replaced(UNET_WEIGHTS, os.mkfifo), NOT_REGULAR),
    "a folder for weights": ("ddpm", replaced(UNET_WEIGHTS, Path.mkdir), NOT_REGULAR),
    "a device for weights": ("ddpm", replaced(UNET_WEIGHTS, link("/dev/zero")), LEADS_OUT),
    "a pipe for an index": ("ddpm", replaced(INDEX, os.mkfifo), NOT_REGULAR),
    "a pipe for a schedule": ("ddpm", replaced(SCHEDULER, os.mkfifo), NOT_REGULAR),
    "a pipe for a text encoder's config": ("sd", replaced(TEXT, os.mkfifo), NOT_REGULAR),
    "a pipe for words": ("sd", replaced(WORDS, os.mkfifo), NOT_REGULAR),
    "a folder for words": ("sd", replaced("tokenizer/x.json", Path.mkdir), NOT_REGULAR),
    "a broken link for words": ("sd", replaced("tokenizer/x.json", link("nowhere")), NOT_REGULAR),
    "a device for words": ("sd", replaced("tokenizer/merges.txt", link("/dev/zero")), LEADS_OUT),
    "a pipe for a captioner's config": ("blip", replaced("generation_config.json", os.mkfifo), NOT_REGULAR),
    "a device for a captioner's words": ("blip", replaced("vocab.txt", link("/dev/zero")), LEADS_OUT),
    # what lies elsewhere
    "a config elsewhere": ("ddpm", outside(NETWORK), LEADS_OUT),
    "weights elsewhere": ("ddpm", outside(UNET_WEIGHTS), LEADS_OUT),
    "a schedule elsewhere": ("ddpm", outside("scheduler"), LEADS_OUT),
    "an index elsewhere": ("ddpm", outside(INDEX), LEADS_OUT),
    "a network elsewhere": ("ddpm", outside("unet"), LEADS_OUT),
    "a part elsewhere": ("sd", outside("vae"), LEADS_OUT),
    "words elsewhere": ("sd", outside(WORDS), LEADS_OUT),
    "a captioner's weights elsewhere": ("blip", outside("model.safetensors"), LEADS_OUT),
    # more than one choice of weights
    "an index beside whole weights": (
        "ddpm",
        after(copied(UNET_WEIGHTS, "unet/other.safetensors"), indexed(UNET_WEIGHTS, "other.safetensors")),
        "lists other weights than",
    ),
    "an index that leaves the folder": (
        "sd",
        after(split(TEXT_WEIGHTS, 2), indexed(TEXT_WEIGHTS, "../../outside.safetensors")),
        "lists other weights than",
    ),
    "an index of an unknown kind": (
        "sd",
        after(split(TEXT_WEIGHTS, 2), lambda folder: (folder / f"{TEXT_WEIGHTS}.index.json").write_text("{}")),
        "lists other weights than",
    ),
    "the weights of two libraries": ("sd", copied(TEXT_WEIGHTS, f"text_encoder/{Path(UNET_WEIGHTS).name}"), TWO),
    "whole weights beside a part": (
        "ddpm",
        copied(UNET_WEIGHTS, "unet/diffusion_pytorch_model-00001-of-00001.safetensors"),
        TWO,
    ),
    "weights that lack a part": (
        "ddpm",
        after(split(UNET_WEIGHTS, 3), removed("unet/diffusion_pytorch_model-00002-of-00003.safetensors")),
        "copy all of them",
    ),
    "parts of two ways to split": (
        "ddpm",
        after(
            split(UNET_WEIGHTS, 2),
            copied(
                "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                "unet/diffusion_pytorch_model-00003-of-00003.safetensors",
            ),
        ),
        "copy all of them",
    ),
    "a tensor in two parts": (
        "ddpm",
        split(UNET_WEIGHTS, 2, lambda parts: parts[1].update({"conv_in.bias": torch.zeros(8)})),
        "holds conv_in.bias in two parts",
    ),
    "a config that names its weights": (
        "sd",
        after(copied(TEXT_WEIGHTS, "text_encoder/o.safetensors"), setting(TEXT, transformers_weights="o.safetensors")),
        "has transformers_weights 'o.safetensors'",
    ),
    # headers
    "a header of 50,000 tensors": ("ddpm", headed(many(50_000)), "is not a complete safetensors file"),
    "a header of 20 MB": ("ddpm", headed(b" " * 20 * 2**20), "is not a complete safetensors file"),
    "a shape of 10^6 sides": (
        "ddpm",
        headed(b'{"a":{"dtype":"F32","shape":[' + b"1," * 10**6 + b'1],"data_offsets":[0,4]}}'),
        "is not a complete safetensors file",
    ),
    # words
    "no words": ("sd", emptied("tokenizer"), NO_WORDS),
    "no words of T5": ("pixart", emptied("tokenizer"), NO_WORDS),
    "no words of the second of three": ("sd3", emptied("tokenizer_2"), NO_WORDS),
    "no words of the third": ("sd3", emptied("tokenizer_3"), NO_WORDS),
    "no words of a captioner": ("blip", removed("tokenizer.json"), "has 6 words, its text encoder"),
    "words that cannot be made": (
        "sd",
        after(lambda folder: pairs(folder, []), removed("tokenizer/merges.txt")),
        NO_WORDS,
    ),
    "no merges": ("sd", lambda folder: pairs(folder, []), "lacks some of its merges"),
    "no merges in one file": ("sd", unjoined, "lacks some of its merges"),
    "half the words": ("sd", lambda folder: (folder / WORDS).write_text("{"), "cannot be read"),
    "words from elsewhere": ("sd", setting("tokenizer/tokenizer_config.json", init_inputs=["/etc/passwd"]), "init_inp"),
    "a vocabulary in a config": ("sd", setting("tokenizer/tokenizer_config.json", vocab="/etc/passwd"), "has vocab"),
    "captions of 10^9 tokens": (
        "sd3",
        setting("tokenizer/tokenizer_config.json", model_max_length=10**9),
        "makes captions of 1,000,000,000 tokens",
    ),
    "100 files of words": (
        "sd",
        lambda folder: [(folder / f"tokenizer/{number}.txt").write_text("") for number in range(100)],
        "a tokenizer has at most 50",
    ),
    # values without bounds
    "10^8 labels": ("sd", setting(TEXT, num_labels=10**8), "num_labels 100000000"),
    "10^6 labels": ("sd", setting(TEXT, num_labels=10**6), "num_labels 1000000; a whole"),
    "10^6 words": ("sd", setting(TEXT, vocab_size=10**6), "vocab_size 1000000; a side of one of its tensors"),
    "10^6 words that an empty tensor stands for": (
        "sd",
        after(added(TEXT_WEIGHTS, torch.zeros(10**6, 0)), setting(TEXT, vocab_size=10**6)),
        "vocab_size 1000000; a side of one of its tensors",
    ),
    "10^6 words, each as wide as all": (
        "sd",
        after(
            added(TEXT_WEIGHTS, torch.zeros(10**6, dtype=torch.uint8)),
            setting(TEXT, vocab_size=10**6, hidden_size=10**6),
        ),
        "it asks for 5,0",
    ),
    "10^5 positions": ("sd", setting(TEXT, max_position_embeddings=10**5), "max_position_embeddings 100000"),
    "10^6 buckets": ("pixart", setting(TEXT, relative_attention_num_buckets=10**6), "relative_attention_num_buckets"),
    "a grid of 30,000": ("sd3", setting(TRANSFORMER, pos_embed_max_size=30_000), "pos_embed_max_size 30000"),
    "a solver of order 10^6": (
        "ddpm",
        setting(SCHEDULER, _class_name="DPMSolverMultistepScheduler", solver_order=10**6),
        "solver_order 1000000",
    ),
    "2,000 blocks": (
        "ddpm",
        setting(NETWORK, block_out_channels=HUGE, down_block_types=["DownBlock2D"] * 2000),
        "asks for 2,000 layers",
    ),
    "10^5 layers reversed": (
        "sd",
        setting(NETWORK, reverse_transformer_layers_per_block=[[10**5], 10**5]),
        "asks for 200,000 layers",
    ),
    "10^6 dual layers": ("sd3", setting(TRANSFORMER, dual_attention_layers=[0] * 10**5), "more values than a config"),
    "10^6 beams": ("blip", setting("generation_config.json", num_beams=10**6), "num_beams 1000000"),
    "pictures of 10^6 pixels": (
        "blip",
        setting("preprocessor_config.json", size={"height": 10**6, "width": 10**6}),
        "has size {'height': 1000000",
    ),
    "any number beyond all": ("ddpm", setting(NETWORK, unheard_of={"deep": [[10**9]]}), "has deep 1000000000"),
    "a config that is too deep": ("ddpm", setting(NETWORK, unheard_of=[[[[[[[[[[]]]]]]]]]]), "more values than a conf"),
    # values of another type
    "a list for a class": ("ddpm", setting(NETWORK, _class_name=["UNet2DModel"]), "describes ['UNet2DModel']"),
    "a list for a norm": (
        "ddpm",
        setting(NETWORK, _class_name="Transformer2DModel", norm_type=["x"]),
        "describes 'Transformer2DModel'",
    ),
    "objects for channels": (
        "sd",
        after(setting(VAE, latent_channels={}), setting(NETWORK, in_channels={})),
        "has in_channels {}",
    ),
    "no scale": ("sd", setting(VAE, scaling_factor=None), "has scaling_factor None"),
    "a scale of nothing": ("sd", setting(VAE, scaling_factor=0), "has scaling_factor 0"),
    "a scale in words": ("sd", setting(VAE, scaling_factor="x"), "has scaling_factor 'x'"),
    "a shift in words": ("sd", setting(VAE, shift_factor="x"), "has shift_factor 'x'"),
    "a shift that is true": ("sd", setting(VAE, shift_factor=True), "has shift_factor True"),
    "betas in lists": ("ddpm", setting(SCHEDULER, trained_betas=[[0.1] * 10] * 10), "has trained_betas [[0.1"),
    "a list of ends": ("sd", setting(TEXT, eos_token_id=[1]), "has eos_token_id [1]"),
    "no dictionary": ("sd", setting(TEXT, return_dict=False), "has return_dict False"),
    "tuples": ("sd", setting(TEXT, torchscript=True), "has torchscript True"),
    "attention from a repository": ("sd", setting(TEXT, _attn_implementation="some/kernel"), "some/kernel"),
    "no heads": ("uvit", setting("config.json", heads=0), "has heads 0"),
    "heads that do not divide the width": (
        "uvit",
        setting("config.json", heads=3),
        "has width 16, which its heads 3 do not divide",
    ),
    "a negative class": ("dit", setting(INDEX, id2label={"-5": "cat"}), "id2label"),
    # passes that cost too much
    "pictures of 512 pixels": ("ddpm", setting(NETWORK, sample_size=512), COSTS),
    "pictures of 4,096 pixels": ("ddpm", setting(NETWORK, sample_size=4096), COSTS),
    "a transformer of 256 pixels": ("dit", setting(TRANSFORMER, sample_size=256, patch_size=2), COSTS),
    "latents of 2,048 pixels": ("sd", setting(NETWORK, sample_size=2048), COSTS),
    "a transformer of 2,048 pixels": ("dit", setting(TRANSFORMER, sample_size=2048), "more patches than are known"),
}


@pytest.fixture
def folder(tmp_path: Path, saved: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """A copy of a tiny model that may be changed."""
    return shutil.copytree(saved[request.param], tmp_path / "model")


@pytest.mark.parametrize(
    ("folder", "change", "expected"),
    [pytest.param(*case, id=name) for name, case in REFUSED.items()],
    indirect=["folder"],
)
def test_a_hostile_folder_is_refused_in_one_sentence_and_nothing_outside_is_opened(
    folder: Path, change: Change, expected: str
) -> None:
    change(folder)
    began = time.process_time()
    with watch.watched() as seen, pytest.raises(InputError) as refusal:
        used(folder)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert time.process_time() - began < SECONDS
    elsewhere = (str(folder.parent / "outside"), "/dev/zero", "/etc/passwd")
    assert not [one for one in seen if os.path.realpath(one.path).startswith(elsewhere)]


# What does no harm


def twin(file: str, to: str) -> Change:
    """Weights of zeros beside those of a folder."""
    return lambda folder: save_file({key: 0 * value for key, value in load_file(folder / file).items()}, folder / to)


def moved_within(folder: Path) -> None:
    (folder / "kept").mkdir()
    shutil.move(folder / UNET_WEIGHTS, folder / "kept" / "weights")
    (folder / UNET_WEIGHTS).symlink_to("../kept/weights")


def listed_parts(folder: Path) -> None:
    split(TEXT_WEIGHTS, 2)(folder)
    names = [path.name for path in sorted((folder / "text_encoder").glob("*.safetensors"))]
    listed = {"weight_map": {key: name for name in names for key in load_file(folder / "text_encoder" / name)}}
    (folder / f"{TEXT_WEIGHTS}.index.json").write_text(json.dumps(listed))


HARMLESS: dict[str, tuple[str, Change]] = {
    "a link within": ("ddpm", moved_within),
    "a half precision beside": ("ddpm", twin(UNET_WEIGHTS, "unet/diffusion_pytorch_model.fp16.safetensors")),
    "other weights beside": ("ddpm", twin(UNET_WEIGHTS, "unet/diffusion_pytorch_model.non_ema.safetensors")),
    "an adapter": ("sd", lambda folder: (folder / "text_encoder/adapter_config.json").write_text("{}")),
    "parts with their index": ("sd", listed_parts),
    "parts without an index": ("sd", split(TEXT_WEIGHTS, 3)),
    "keys that nobody knows": ("sd", setting(TEXT, unheard_of={"a": [1, 2.5, None, "x"]}, temperature=1.0)),
    "an address of words": ("sd", setting("tokenizer/tokenizer_config.json", vocab_file="/etc/passwd")),
    "no bound of a caption": ("sd", setting("tokenizer/tokenizer_config.json", model_max_length=int(1e30))),
}


@pytest.mark.parametrize(
    ("folder", "change"), [pytest.param(*case, id=name) for name, case in HARMLESS.items()], indirect=["folder"]
)
def test_what_is_harmless_makes_no_difference(folder: Path, change: Change) -> None:
    expected = answer(used(folder))
    change(folder)
    with watch.watched() as seen:
        denoiser = used(folder)
    assert torch.equal(answer(denoiser), expected)
    assert not [one for one in seen if one.path == "/etc/passwd"]


def test_a_snapshot_of_the_hub_is_loaded_and_nothing_outside_its_repository(tmp_path: Path, saved: dict) -> None:
    home = tmp_path / "models--owner--name"
    snapshot = shutil.copytree(saved["ddpm"], home / "snapshots" / "0123abc")
    (home / "blobs").mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        shutil.move(path, home / "blobs" / str(number))
        path.symlink_to(os.path.relpath(home / "blobs" / str(number), path.parent))
    assert torch.equal(answer(used(snapshot)), answer(used(saved["ddpm"])))
    weights = snapshot / UNET_WEIGHTS
    shutil.copy(weights, tmp_path / "elsewhere")
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=LEADS_OUT):
        used(snapshot)


CIFAR = {
    "_class_name": "UNet2DModel", "_diffusers_version": "0.0.4", "act_fn": "silu", "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256], "center_input_sample": False, "downsample_padding": 0,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"], "flip_sin_to_cos": False,
    "freq_shift": 1, "in_channels": 3, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-06,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
LATENTS = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu", "sample_size": 512,
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
PICTURES = {
    "_class_name": "DiTTransformer2DModel", "activation_fn": "gelu-approximate", "attention_bias": True,
    "attention_head_dim": 72, "dropout": 0.0, "in_channels": 4, "norm_elementwise_affine": False, "norm_eps": 1e-05,
    "norm_num_groups": 32, "norm_type": "ada_norm_zero", "num_attention_heads": 16, "num_embeds_ada_norm": 1000,
    "num_layers": 28, "num_vector_embeds": None, "out_channels": 8, "patch_size": 2, "sample_size": 64,
    "upcast_attention": False, "use_linear_projection": False,
}  # fmt: skip
CAPTIONED = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12, "pad_token_id": 1,
    "num_hidden_layers": 12, "projection_dim": 768, "torch_dtype": "float32", "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}  # fmt: skip
SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "dynamic_thresholding_ratio": 0.995, "lambda_min_clipped": -math.inf,
    "lower_order_final": True, "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0,
    "solver_order": 2, "solver_type": "midpoint", "steps_offset": 0, "thresholding": False, "trained_betas": None,
    "variance_type": None,
}  # fmt: skip
PUBLIC: dict[str, tuple[dict[str, Any], schemas.Schema, Callable[[dict[str, Any]], torch.nn.Module] | None]] = {
    "a DDPM of CIFAR-10": (CIFAR, schemas.UNET, UNet2DModel.from_config),
    "the autoencoder of Stable Diffusion": (LATENTS, schemas.AUTOENCODER, AutoencoderKL.from_config),
    "a DiT": (PICTURES, schemas.DIT, DiTTransformer2DModel.from_config),
    "the text encoder of Stable Diffusion": (
        CAPTIONED,
        schemas.CLIP,
        lambda config: CLIPTextModel(CLIPTextConfig.from_dict(dict(config))),
    ),
    "a solver": (SOLVER, schemas.SCHEDULER, None),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_configs_as_they_are_published_fit_their_schemas(name: str) -> None:
    config, schema, build = PUBLIC[name]
    shapes = None
    if build:
        with torch.device("meta"):
            shapes = {key: tuple(tensor.shape) for key, tensor in build(config).state_dict().items()}
        check_depth(config, Path("config.json"), len(shapes))
    schemas.check(config, schema, Path("config.json"), shapes)


# What is loaded is what was looked at


def flipped(file: str) -> Change:
    """Change the last byte but one, which is a digit or a weight."""

    def change(folder: Path) -> None:
        data = bytearray((folder / file).read_bytes())
        data[-2] ^= 1
        (folder / file).write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("ddpm", UNET_WEIGHTS),
        ("uvit", "diffusion_pytorch_model.safetensors"),
        ("sd", VAE_WEIGHTS),
        ("sd", TEXT_WEIGHTS),
        ("sd", WORDS),
        ("pixart", TEXT_WEIGHTS),
        ("sd3", "tokenizer_3/tokenizer.json"),
    ],
    indirect=["folder"],
)
def test_a_file_that_changed_since_it_was_looked_at_is_refused_and_then_read_anew(folder: Path, file: str) -> None:
    before = read(folder)
    whole = (folder / file).read_bytes()
    flipped(file)(folder)
    with pytest.raises(InputError, match=r"changed since it was looked at; run again\."):
        load(before, CPU)
    assert read(folder).fingerprint != before.fingerprint
    (folder / file).write_bytes(whole)
    assert read(folder).fingerprint == before.fingerprint
    load(read(folder), CPU)


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "preprocessor_config.json"])
@pytest.mark.parametrize("folder", ["blip"], indirect=True)
def test_a_captioner_that_changed_since_it_was_looked_at_is_refused(folder: Path, file: str) -> None:
    captions.loaded.cache_clear()
    before = captions.describe(Location(folder))
    flipped(file)(folder)
    with pytest.raises(InputError, match=r"changed since it was looked at; run again\."):
        captions.loaded(before, CPU)


@pytest.mark.parametrize("folder", ["ddpm"], indirect=True)
def test_a_config_that_changed_since_it_was_looked_at_is_not_read_again(folder: Path) -> None:
    before = read(folder)
    expected = answer(load(before, CPU))
    setting(NETWORK, flip_sin_to_cos=False)(folder)
    assert torch.equal(answer(load(before, CPU)), expected)
    assert read(folder).fingerprint != before.fingerprint
    assert not torch.equal(answer(used(folder)), expected)


@pytest.mark.parametrize("folder", ["ddpm"], indirect=True)
def test_weights_that_were_written_with_the_old_size_and_time_are_digested_anew(folder: Path) -> None:
    before, status = read(folder), os.stat(folder / UNET_WEIGHTS)
    flipped(UNET_WEIGHTS)(folder)
    os.utime(folder / UNET_WEIGHTS, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert os.stat(folder / UNET_WEIGHTS).st_mtime_ns == status.st_mtime_ns
    assert read(folder).fingerprint != before.fingerprint


# Any value of any config


HOSTILE = (
    None, "", "x", "../../x", "a\nb", [], [[]], [[[1]]], {}, {"a": 1}, -1, 0, 1, 3, 1e-30, 0.5, 10**4, 10**6, 10**9,
    10**30, 1e30, -1e30, math.nan, math.inf, True, False, [0], ["x"], [None] * 3, [10**6] * 2, [1] * 1000,
)  # fmt: skip
MUTATIONS = 8  # of each file of each kind


def places(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value in a config."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A config with one value changed."""
    *path, last = rng.choice([*places(content)])
    changed = inner = copy.deepcopy(content)
    for key in path:
        inner = inner[key]
    inner[last] = rng.choice(HOSTILE)
    return changed


@pytest.mark.parametrize("folder", ["ddpm", *SAVE], indirect=True)
def test_any_value_of_any_config_is_taken_or_refused_in_a_moment(folder: Path, request: pytest.FixtureRequest) -> None:
    rng = random.Random(request.node.callspec.params["folder"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = [path for path in sorted(folder.rglob("*.json")) if path.name != "tokenizer.json"]
    for path in files:
        whole = path.read_bytes()
        for _ in range(MUTATIONS):
            path.write_text(json.dumps(mutated(json.loads(whole), rng)))
            began = time.process_time()
            with suppress(InputError):
                used(folder)
            assert time.process_time() - began < SECONDS, path.read_text()
        path.write_bytes(whole)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2 * 2**20  # KB
