"""Research checkpoints become folders with the same outputs, as an independent reference network says."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from oms_core.catalog import describe
from oms_core.convert import convert
from oms_core.decode import Profile
from oms_core.device import Placement
from oms_core.errors import InputError
from oms_core.families import load
from oms_core.families.uvit import UVit
from oms_core.location import Location

CPU = Placement("cpu", "float32")
WIDTH, STEPS, SIDE = 32, 1000, 16


# The reference


def clock_table(width: int) -> Tensor:
    """Sine, cosine, sine, cosine ... of every timestep, (T, width)."""
    frequencies = torch.exp(-torch.arange(0, width, 2) / width * math.log(10_000))
    angles = torch.arange(STEPS).float()[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).view(STEPS, width)


class Clock(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        table = nn.Embedding.from_pretrained(clock_table(width))
        self.timembedding = nn.Sequential(table, nn.Linear(width, out), nn.SiLU(), nn.Linear(out, out))

    def forward(self, t: Tensor) -> Tensor:
        return self.timembedding(t)


class Down(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        return self.main(x)


class Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        return self.main(F.interpolate(x, scale_factor=2, mode="nearest"))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(32, width)
        self.proj_q, self.proj_k, self.proj_v, self.proj = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x)
        q, k, v = (proj(h).flatten(2) for proj in (self.proj_q, self.proj_k, self.proj_v))
        weights = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, dim=-1)  # (B, places, places)
        return x + self.proj((weights @ v.transpose(1, 2)).transpose(1, 2).view_as(x))


class Residual(nn.Module):
    def __init__(self, width: int, out: int, clock: int, attended: bool) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.temb_proj = nn.Sequential(nn.SiLU(), nn.Linear(clock, out))
        self.block2 = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1)
        )
        self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()
        self.attn = Attention(out) if attended else nn.Identity()

    def forward(self, x: Tensor, clock: Tensor) -> Tensor:
        h = self.block1(x) + self.temb_proj(clock)[:, :, None, None]
        return self.attn(self.block2(h) + self.shortcut(x))


class Reference(nn.Module):
    """The UNet of pytorch-ddpm, with its names."""

    def __init__(self, widths: tuple[int, ...] = (1, 2, 2), attended: tuple[int, ...] = (1,), each: int = 1) -> None:
        super().__init__()
        clock, now, kept = 4 * WIDTH, WIDTH, [WIDTH]
        self.time_embedding = Clock(WIDTH, clock)
        self.head = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.downblocks, self.upblocks = nn.ModuleList(), nn.ModuleList()
        for level, times in enumerate(widths):
            for _ in range(each):
                self.downblocks.append(Residual(now, WIDTH * times, clock, level in attended))
                now = WIDTH * times
                kept.append(now)
            if level < len(widths) - 1:
                self.downblocks.append(Down(now))
                kept.append(now)
        self.middleblocks = nn.ModuleList([Residual(now, now, clock, True), Residual(now, now, clock, False)])
        for level, times in reversed([*enumerate(widths)]):
            for _ in range(each + 1):
                self.upblocks.append(Residual(kept.pop() + now, WIDTH * times, clock, level in attended))
                now = WIDTH * times
            if level > 0:
                self.upblocks.append(Up(now))
        self.tail = nn.Sequential(nn.GroupNorm(32, now), nn.SiLU(), nn.Conv2d(now, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        clock = self.time_embedding(t)
        h = self.head(x)
        kept = [h]
        for block in self.downblocks:
            h = block(h, clock)
            kept.append(h)
        for block in self.middleblocks:
            h = block(h, clock)
        for block in self.upblocks:
            h = block(h if isinstance(block, Up) else torch.cat([h, kept.pop()], dim=1), clock)
        return self.tail(h)


def reference(seed: int = 0, **shape: Any) -> Reference:
    torch.manual_seed(0)
    network = Reference(**shape)
    for name, weight in tiny.seeded(network, seed).named_parameters():
        weight.requires_grad_(False)
        if "timembedding.0" in name:
            weight.copy_(clock_table(WIDTH))
        if "proj_q" in name:
            weight.mul_(0.2)  # sharper attention would make the rounding of float32 visible
    return network


def checkpoint(prefix: str = "", **shape: Any) -> dict[str, Any]:
    """What such projects save; the averaged weights are the reference of seed 0."""

    def state(seed: int) -> dict[str, Tensor]:
        return {prefix + key: value for key, value in reference(seed, **shape).state_dict().items()}

    optimiser = torch.optim.Adam(reference(**shape).tail.parameters())
    rest = {"sched": {"last_epoch": 3, "lr_lambdas": [None]}, "optim": optimiser.state_dict(), "step": 3}
    return {"net_model": state(1), "ema_model": state(0), **rest, "x_T": torch.randn(4, 3, SIDE, SIDE)}


def saved(content: Any, file: Path) -> Path:
    torch.save(content, file)
    return file


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference of seed 0 as a folder; not to be changed."""
    folder = tmp_path_factory.mktemp("converted")
    convert(saved(checkpoint(), folder / "ckpt.pt"), folder / "model")
    return folder / "model"


X_T = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
TIMES = (0, 1, 7, 200, 999)


@torch.inference_mode()
def apart(eps: Callable[[int], Tensor], network: Reference) -> float:
    """The largest difference from the reference, relative to its largest output."""
    differences = []
    for t in TIMES:
        expected = network(X_T, torch.full((2,), t))
        differences.append(((eps(t) - expected).abs().max() / expected.abs().max()).item())
    return max(differences)


def eps_of(folder: Path) -> Callable[[int], Tensor]:
    denoiser = load(describe(Location(folder)), CPU)
    return lambda t: denoiser.eps(X_T, t)


# The same outputs


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"each": 2},
        {"attended": (0, 2)},
        {"attended": ()},
        {"widths": (1, 1)},
        {"widths": (1,), "attended": (0,)},
        {"widths": (1, 2, 3, 4)},
    ],
    ids=str,
)
@torch.inference_mode()
def test_a_converted_checkpoint_gives_the_noise_of_the_network_that_it_was(tmp_path: Path, shape: dict) -> None:
    words = convert(saved(checkpoint(**shape), tmp_path / "ckpt.pt"), tmp_path / "deep" / "model")
    learned = sum(
        weight.numel() for key, weight in reference(**shape).named_parameters() if "timembedding.0" not in key
    )
    assert words == f"a DDPM of the pytorch-ddpm family, {learned:,} parameters, {SIDE} pixels"
    assert apart(eps_of(tmp_path / "deep" / "model"), reference(**shape)) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "deep"]


def test_its_schedule_is_the_linear_one(converted: Path) -> None:
    model = describe(Location(converted))
    assert (model.family, model.timesteps, model.profile) == ("ddpm", 1000, Profile((SIDE, SIDE), 3))
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    denoiser = load(model, CPU)
    for t in TIMES:
        assert denoiser.coefficients(t)[0] == pytest.approx(abar[t].sqrt().item(), rel=1e-6)


def test_a_prefix_of_several_gpus_is_taken_away(tmp_path: Path, converted: Path) -> None:
    convert(saved(checkpoint("module."), tmp_path / "ckpt.pt"), tmp_path / "model")
    assert describe(Location(tmp_path / "model")).fingerprint == describe(Location(converted)).fingerprint


def test_the_averaged_weights_are_used_and_the_plain_ones_only_where_there_are_no_others(tmp_path: Path) -> None:
    content = checkpoint()
    content["ema_model"] = None
    convert(saved(content, tmp_path / "none.pt"), tmp_path / "none")
    del content["ema_model"]
    convert(saved(content, tmp_path / "plain.pt"), tmp_path / "plain")
    for name in ("none", "plain"):
        assert apart(eps_of(tmp_path / name), reference(1)) < 1e-5
        assert apart(eps_of(tmp_path / name), reference(0)) > 0.01


# Every setting matters


def with_config(**changed: Any) -> Callable[[UNet2DModel], UNet2DModel]:
    def change(network: UNet2DModel) -> UNet2DModel:
        other = UNet2DModel.from_config(dict(network.config) | changed)
        other.load_state_dict(network.state_dict())
        return other.eval()

    return change


def interleaved(network: UNet2DModel) -> UNet2DModel:
    weight = network.time_embedding.linear_1.weight
    half = weight.shape[1] // 2
    with torch.no_grad():
        weight.copy_(torch.stack([weight[:, :half], weight[:, half:]], dim=2).flatten(1))
    return network


WRONG = {
    "sines after cosines": with_config(flip_sin_to_cos=True),
    "a shift of the frequencies": with_config(freq_shift=1),
    "columns as they were": interleaved,
    "another epsilon in the norms": with_config(norm_eps=1e-6),
    "padding on one side": with_config(downsample_padding=0),
    "heads of eight": with_config(attention_head_dim=8),
}


@pytest.mark.parametrize("name", WRONG)
@torch.inference_mode()
def test_a_wrong_setting_would_be_seen(converted: Path, name: str) -> None:
    """Small activations are asked about, where also the epsilon of the norms counts."""
    network = UNet2DModel.from_pretrained(converted / "unet", low_cpu_mem_usage=False).eval()
    assert apart(lambda t: network(X_T, t).sample, reference()) < 1e-5
    changed, quiet = WRONG[name](network), reference()
    if "epsilon" in name:
        for weights, prefix in ((changed, "conv_in"), (quiet, "head")):
            getattr(weights, prefix).weight.mul_(1e-3)
            getattr(weights, prefix).bias.mul_(1e-3)
    assert apart(lambda t: changed(X_T, t).sample, quiet) > 1e-4


# U-ViT


def test_a_bare_uvit_is_converted_strictly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UVit(sample_size=8, width=128, depth=4, heads=2).eval()
    words = convert(saved(network.state_dict(), tmp_path / "uvit.pth"), tmp_path / "model")
    assert words == f"a U-ViT, {network.num_parameters():,} parameters, 8 pixels"
    model = describe(Location(tmp_path / "model"))
    assert (model.family, model.profile) == ("uvit", Profile((8, 8), 3))
    loaded = load(model, CPU)
    assert loaded.network.config.heads == 2
    for name, weight in network.named_parameters():
        assert torch.equal(loaded.network.get_parameter(name), weight)


# What is refused


class Harmful:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


def without(key: str) -> Callable[[Path], Any]:
    def content(_: Path) -> dict[str, Any]:
        found = checkpoint()
        found["ema_model"].pop(key)
        return found

    return content


def changed(**values: Any) -> Callable[[Path], Any]:
    return lambda _: checkpoint() | values


def ema(**values: Any) -> Callable[[Path], Any]:
    def content(_: Path) -> dict[str, Any]:
        found = checkpoint()
        found["ema_model"] |= {key.replace("__", "."): value for key, value in values.items()}
        return found

    return content


CODE = "holds objects other than tensors, which could run code"
LAYOUT = "its layout is unknown"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "code": (lambda sentinel: {"ema_model": Harmful(sentinel)}, CODE),
    "code beside sound weights": (lambda sentinel: checkpoint() | {"optim": Harmful(sentinel)}, CODE),
    "a whole network": (lambda _: reference(), CODE),
    "a list": (lambda _: [torch.zeros(2)], "holds a list, not a dict of tensors"),
    "a tensor": (lambda _: torch.zeros(2), "holds a Tensor, not a dict of tensors"),
    "nothing": (lambda _: {}, LAYOUT),
    "another layout": (lambda _: {"state_dict": {"a": torch.zeros(2)}}, LAYOUT),
    "tensors for weights": (lambda _: {"ema_model": torch.zeros(2)}, LAYOUT),
    "empty weights": (lambda _: {"ema_model": {}}, LAYOUT),
    "weights of something else": (changed(ema_model={"a.weight": torch.zeros(2)}), "pytorch-ddpm checkpoint"),
    "numbers for names": (changed(ema_model={1: torch.zeros(2)}), "pytorch-ddpm checkpoint"),
    "numbers for tensors": (ema(head__weight=1), "pytorch-ddpm checkpoint"),
    "no size": (changed(x_T=None), "lacks x_T"),
    "no input": (without("head.weight"), "lacks 'head.weight'"),
    "no bias": (without("head.bias"), "lacks 'head.bias'"),
    "no output": (without("tail.2.weight"), "lacks 'tail.2.weight'"),
    "no table of times": (without("time_embedding.timembedding.0.weight"), "lacks 'time_embedding.timembedding.0"),
    "no first block": (without("downblocks.0.block1.2.weight"), "lacks 'downblocks.0.block1.2.weight'"),
    "no norm within": (without("middleblocks.1.block1.0.weight"), "do not fit its layout"),
    "no projection": (without("middleblocks.0.attn.proj_v.bias"), "do not fit its layout"),
    "a part too many": (ema(middleblocks__1__extra__weight=torch.zeros(2)), "do not fit its layout"),
    "another shape": (ema(head__bias=torch.zeros(3)), "do not fit its layout"),
    "not a number": (ema(head__bias=torch.full((WIDTH,), torch.nan)), "are not finite (conv_in.bias)"),
    "a U-ViT without patches": (lambda _: {"pos_embed": torch.zeros(1, 17, 16)}, "lacks its patch embedding"),
    "a U-ViT of words": (lambda _: {"pos_embed": "x"}, "lacks its patch embedding"),
    "half a U-ViT": (
        lambda _: {"pos_embed": torch.zeros(1, 17, 16), "patch_embed.proj.weight": torch.zeros(16, 3, 2, 2)},
        "do not fit its layout",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_checkpoint_is_refused_in_one_sentence_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    content, expected = REFUSED[name]
    file = saved(content(tmp_path / "sentinel"), tmp_path / "ckpt.pt")
    with pytest.raises(InputError) as refusal:
        convert(file, tmp_path / "deep" / "model")
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]  # no code ran, nothing is half-written


@pytest.mark.parametrize("length", [0, 10, 5000, -1, -300])
def test_a_truncated_file_is_refused_in_one_sentence(tmp_path: Path, length: int) -> None:
    file = saved(checkpoint(), tmp_path / "ckpt.pt")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match="is no checkpoint that torch can read") as refusal:
        convert(file, tmp_path / "model")
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_missing_file_and_an_existing_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no file .*nothing\.pt; name a checkpoint"):
        convert(tmp_path / "nothing.pt", tmp_path / "model")
    file = saved(checkpoint(), tmp_path / "ckpt.pt")
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="exists already"):
        convert(file, tmp_path / "model")
    assert not any((tmp_path / "model").iterdir())


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(checkpoint(), tmp_path / "ckpt.pt")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dumps", full)
    with pytest.raises(InputError, match=r"cannot be written .*No space left"):
        convert(file, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


# Stable Diffusion in one file: the published names, by which the small pipelines of these tests are written

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
AUTOENCODER = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "samplers.0": "sample",
    "resnets": "block",
}
OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
}


def spelled(key: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        key = key.replace(ours, theirs)
    return key


def published_unet(network: UNet2DConditionModel) -> dict[str, Tensor]:
    """Blocks are numbered through, a change of resolution is a block of its own or the end of one."""
    each = network.config.layers_per_block + 1

    def name(key: str) -> str:
        if "blocks" not in key and "mid_block" not in key:
            return spelled(key, ENDS)
        place, part, number, rest = re.fullmatch(r"(\w+?(?:\.\d+)?)\.(\w+)\.(\d+)\.(.+)", key).groups()
        side, _, level = place.partition("_block")
        rest = spelled(rest, RESNET) if part == "resnets" else rest
        if side == "mid":
            return f"middle_block.{1 if part == 'attentions' else 2 * int(number)}.{rest}"
        block = int(level.removeprefix("s.")) * each + int(number)
        if part == "downsamplers":
            return f"input_blocks.{block + each}.0.{rest.replace('conv', 'op')}"
        if part == "upsamplers":
            return f"output_blocks.{block + each - 1}.{1 + (f'{place}.attentions.0.norm.weight' in state)}.{rest}"
        return f"{'input' if side == 'down' else 'output'}_blocks.{block + (side == 'down')}.{part[0] == 'a':d}.{rest}"

    state = network.state_dict()
    return {name(key): value for key, value in state.items()}


def published_vae(network: AutoencoderKL) -> dict[str, Tensor]:
    """Levels of the decoder are counted from the finest; attention is made of 1 x 1 convolutions."""
    last = len(network.config.block_out_channels) - 1
    found = {}
    for key, value in network.state_dict().items():
        old = re.sub(r"up_blocks\.(\d)", lambda level: f"up.{last - int(level[1])}", key).replace("down_blocks", "down")
        flat = "attentions" in key and value.dim() == 2
        found[spelled(old, AUTOENCODER)] = value[:, :, None, None] if flat else value
    return found


def published_clip(network: nn.Module) -> dict[str, Tensor]:
    """The text encoder of 1.x."""
    named = {f"transformer.text_model.{key}": value for key, value in network.state_dict().items()}
    return named | {"transformer.text_model.embeddings.position_ids": torch.arange(16)[None]}


def published_open_clip(network: nn.Module) -> dict[str, Tensor]:
    """The text encoder of 2.x: q, k and v are one matrix; its last layer and its projection are never used."""
    state = {spelled(key, OPEN_CLIP): value for key, value in network.state_dict().items()}
    for key in [key for key in state if "q_proj" in key]:
        three = [state.pop(key.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        state[key.replace("q_proj.", "in_proj_")] = torch.cat(three)
    unused = {key.replace("blocks.0", "blocks.23"): value + 1 for key, value in state.items() if "blocks.0" in key}
    more = {"text_projection": torch.randn(8, 8), "logit_scale": torch.ones(()), "attn_mask": torch.zeros(16, 16)}
    return {f"model.{key}": value for key, value in (state | unused | more).items()}


def published(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """Everything that such a file holds."""
    text = published_open_clip if pipeline.unet.config.use_linear_projection else published_clip
    parts = {
        "model.diffusion_model": published_unet(pipeline.unet),
        "first_stage_model": published_vae(pipeline.vae),
        "cond_stage_model": text(pipeline.text_encoder),
    }
    named = {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}
    return named | {"betas": torch.rand(1000), "model_ema.num_updates": torch.tensor(3)}


DEEP = {"block_out_channels": (8, 16, 32, 32), "layers_per_block": 2}  # as deep as the real ones
DEEP_UNET = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "sample_size": 8,
}
DEEP_VAE = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
KINDS: dict[str, tuple[dict, dict, dict]] = {
    "tiny": ({}, {}, {}),
    "1.x": (DEEP | DEEP_UNET, DEEP | DEEP_VAE, {}),
    "2.x": (DEEP | DEEP_UNET | {"use_linear_projection": True}, {}, {"prediction_type": "v_prediction"}),
}


def changed_by(network: Any, config: dict[str, Any], seed: int = 0) -> Any:
    return tiny.seeded(type(network).from_config(dict(network.config) | config), seed)


def stable_diffusion(folder: Path, kind: str) -> StableDiffusionPipeline:
    """A pipeline with weights of which none is like another, also saved in a folder."""
    unet, vae, schedule = KINDS[kind]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny.save_stable_diffusion(folder, **schedule))
    pipeline.unet, pipeline.vae = changed_by(pipeline.unet, unet), changed_by(pipeline.vae, vae)
    pipeline.save_pretrained(folder)
    return pipeline


def single(state: dict[str, Tensor], file: Path) -> Path:
    save_file({key: value.clone().contiguous() for key, value in state.items()}, file)
    return file


def bare(folder: Path, to: Path) -> Path:
    """A pipeline's folder without its weights."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        pytest.fail("the network is asked")  # no OSError, which a library may take for an answer

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_names_are_the_published_ones(tmp_path: Path) -> None:
    """A few names of v1-5-pruned-emaonly.safetensors, and how many tensors its UNet and its autoencoder have."""
    found = published(stable_diffusion(tmp_path, "1.x"))
    assert sum(key.startswith("model.diffusion_model.") for key in found) == 686
    assert sum(key.startswith("first_stage_model.") for key in found) == 248
    assert found.keys() >= {
        "model.diffusion_model.time_embed.2.bias",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.weight",
        "model.diffusion_model.input_blocks.9.0.op.bias",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight",
        "model.diffusion_model.middle_block.2.out_layers.3.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.8.2.conv.weight",
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "first_stage_model.encoder.down.2.downsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.q.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.up.0.block.2.norm2.bias",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
    }


@torch.inference_mode()
def outputs(folder: Path) -> list[Tensor]:
    """Text, latents, the pictures of latents, and the noise at several times."""
    loaded = load(describe(Location(folder)), CPU)
    random = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, *describe(Location(folder)).latent, generator=random)
    pixels = torch.randint(256, (2, *loaded.profile.size, 3), dtype=torch.uint8, generator=random).numpy()
    text = loaded.condition(tiny.WORDS)
    noise = [loaded.eps(x_t, t, text) for t in TIMES]
    return [text, loaded.encode(pixels), loaded.vae.decode(x_t).sample, *noise]


def assert_alike(folder: Path, other: Path) -> None:
    for ours, theirs in zip(outputs(folder), outputs(other), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_stable_diffusion_in_one_file_gives_what_the_pipeline_gave(tmp_path: Path, kind: str) -> None:
    pipeline = stable_diffusion(tmp_path / "original", kind)
    file = single(published(pipeline), tmp_path / "x.safetensors")
    words = convert(file, tmp_path / "made", bare(tmp_path / "original", tmp_path / "config"))
    original, made = describe(Location(tmp_path / "original")), describe(Location(tmp_path / "made"))
    size = " x ".join(map(str, {*made.profile.size}))
    assert words == f"a Stable Diffusion in one file, {pipeline.unet.num_parameters():,} parameters, {size} pixels"
    assert (made.profile, made.parameters, made.latent) == (original.profile, original.parameters, original.latent)
    assert made.schedule == original.schedule
    assert_alike(tmp_path / "made", tmp_path / "original")


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a tiny file, and its pipeline's folder; not to be changed."""
    folder = tmp_path_factory.mktemp("single") / "original"
    return published(stable_diffusion(folder, "tiny")), folder


def test_averaged_weights_are_used_where_they_are_kept(tmp_path: Path, one_file: tuple) -> None:
    state, folder = one_file
    prefix = "model.diffusion_model."
    names = [key for key in state if key.startswith(prefix)]
    kept = {f"model_ema.diffusion_model{key.removeprefix(prefix).replace('.', '')}": state[key] for key in names}
    file = single(state | {key: state[key] + 1 for key in names} | kept, tmp_path / "x.safetensors")
    convert(file, tmp_path / "made", folder)
    assert_alike(tmp_path / "made", folder)


def test_weights_keep_their_precision(tmp_path: Path, one_file: tuple) -> None:
    state, folder = one_file
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    convert(single(half, tmp_path / "x.safetensors"), tmp_path / "made", folder)
    made = load_file(tmp_path / "made" / "unet" / "diffusion_pytorch_model.safetensors")
    for key, value in load_file(folder / "unet" / "diffusion_pytorch_model.safetensors").items():
        assert torch.equal(made[key], value.half())
    assert all(noise.isfinite().all() for noise in outputs(tmp_path / "made"))


def missing(key: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: value for name, value in state.items() if not name.startswith(key)}


def put(**tensors: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: state | {key.replace("__", "."): value for key, value in tensors.items()}


FIT = "do not fit the configs in"
BAD_FILES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "nothing": (lambda _: {}, LAYOUT),
    "something else": (lambda _: {"lora_unet.weight": torch.zeros(2)}, LAYOUT),
    "another text encoder": (missing("cond_stage_model."), LAYOUT),
    "no autoencoder": (missing("first_stage_model."), LAYOUT),
    "no weight in the UNet": (missing("model.diffusion_model.out.2.bias"), FIT),
    "no block in the UNet": (missing("model.diffusion_model.input_blocks.1."), FIT),
    "no weight in the autoencoder": (missing("first_stage_model.quant_conv.weight"), FIT),
    "no weight in the text encoder": (missing("cond_stage_model.transformer.text_model.final_layer_norm.bias"), FIT),
    "only places of words": (missing("cond_stage_model.transformer.text_model.enc"), FIT),
    "parts that are not known": (put(model__diffusion_model__label_emb__0__0__bias=torch.zeros(2)), "do not know"),
    "another shape": (put(model__diffusion_model__out__2__bias=torch.zeros(9)), FIT),
    "no dimension": (put(first_stage_model__encoder__mid__attn_1__q__weight=torch.zeros(())), FIT),
    "whole numbers": (put(model__diffusion_model__out__2__bias=torch.zeros(4, dtype=torch.int64)), FIT),
    "not a number": (
        put(first_stage_model__quant_conv__bias=torch.full((8,), torch.inf)),
        "not finite (quant_conv.bias",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(tmp_path: Path, one_file: tuple, name: str) -> None:
    change, expected = BAD_FILES[name]
    file = single(change(one_file[0]), tmp_path / "x.safetensors")
    assert expected in refusal(file, tmp_path, one_file[1])


def refusal(file: Path, folder: Path, config: Path | None) -> str:
    """The one sentence; nothing is written."""
    before = {*folder.iterdir()}
    with pytest.raises(InputError) as refused:
        convert(file, folder / "made", config)
    assert "\n" not in str(refused.value)
    assert {*folder.iterdir()} == before
    return str(refused.value)


def without_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def configured(name: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | values))

    return change


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
BAD_CONFIGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (shutil.rmtree, "has no model_index.json; name a diffusers folder"),
    "no index": (without_file("model_index.json"), "has no model_index.json; name a diffusers folder"),
    "an index that is none": (lambda folder: (folder / "model_index.json").write_text("["), "is not valid JSON"),
    "no UNet": (without_file(UNET), "unet/config.json is missing"),
    "no autoencoder": (without_file(VAE), "vae/config.json is missing"),
    "no text encoder": (without_file(TEXT), "text_encoder/config.json is missing"),
    "no schedule": (without_file("scheduler/scheduler_config.json"), "has no scheduler/scheduler_config.json"),
    "no vocabulary": (without_file("tokenizer/tokenizer.json"), "has 2 words, its text encoder"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "lists tokenizer"),
    "another kind": (configured(UNET, _class_name="UNet2DModel"), "describes a UNet2DModel; name a folder of Stable"),
    "an unknown kind": (configured(UNET, _class_name="X"), "describes 'X'"),
    "an unknown part": (configured("model_index.json", extra=["evil", "Code"]), "has extra ['evil', 'Code']"),
    "more than captions": (configured(UNET, addition_embed_type="text_time"), "addition_embed_type 'text_time'"),
    "other blocks": (configured(UNET, down_block_types=["X", "Y"]), FIT),
    "another width": (configured(UNET, cross_attention_dim=16), FIT),
    "more layers": (configured(UNET, layers_per_block=2), FIT),
    "layers without end": (configured(UNET, layers_per_block=10**9), "more than its weights hold"),
    "width without end": (configured(UNET, block_out_channels=[2**40, 2**40]), FIT),
    "another autoencoder": (configured(VAE, latent_channels=8), "its autoencoder's latents have 8"),
    "a narrower autoencoder": (configured(VAE, block_out_channels=[4, 4]), FIT),
    "another text encoder": (configured(TEXT, hidden_size=16), FIT),
    "text layers without end": (configured(TEXT, num_hidden_layers=10**9), "more than its weights hold"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configs_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path, one_file: tuple, name: str) -> None:
    change, expected = BAD_CONFIGS[name]
    config = bare(one_file[1], tmp_path / "config")
    change(config)
    assert expected in refusal(single(one_file[0], tmp_path / "x.safetensors"), tmp_path, config)


def test_without_a_folder_of_configs_the_sentence_says_what_to_name(tmp_path: Path, one_file: tuple) -> None:
    said = refusal(single(one_file[0], tmp_path / "x.safetensors"), tmp_path, None)
    assert "name a diffusers folder of the same kind of model with --config" in said


@pytest.mark.parametrize("length", [0, 10, 5000, -1])
def test_a_damaged_safetensors_file_is_refused_in_one_sentence(tmp_path: Path, one_file: tuple, length: int) -> None:
    file = single(one_file[0], tmp_path / "x.safetensors")
    file.write_bytes(file.read_bytes()[:length])
    assert "is no checkpoint that torch can read" in refusal(file, tmp_path, one_file[1])
    file.write_bytes(b"no tensors at all" * 99)
    assert "is no checkpoint that torch can read" in refusal(file, tmp_path, one_file[1])


def test_a_uvit_in_safetensors_is_converted_as_well(tmp_path: Path) -> None:
    network = UVit(sample_size=8, width=128, depth=2, heads=2)
    convert(single(network.state_dict(), tmp_path / "x.safetensors"), tmp_path / "model")
    assert describe(Location(tmp_path / "model")).family == "uvit"
