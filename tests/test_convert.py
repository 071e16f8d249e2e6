"""Research checkpoints become folders with the same outputs, as an independent reference network says."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from oms_core.catalog import describe
from oms_core.convert import convert
from oms_core.decode import Profile
from oms_core.device import Placement
from oms_core.errors import InputError
from oms_core.families import load
from oms_core.families.uvit import UVit

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
    denoiser = load(describe(str(folder)), CPU)
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
    model = describe(str(converted))
    assert (model.family, model.timesteps, model.profile) == ("ddpm", 1000, Profile((SIDE, SIDE), 3))
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    denoiser = load(model, CPU)
    for t in TIMES:
        assert denoiser.coefficients(t)[0] == pytest.approx(abar[t].sqrt().item(), rel=1e-6)


def test_a_prefix_of_several_gpus_is_taken_away(tmp_path: Path, converted: Path) -> None:
    convert(saved(checkpoint("module."), tmp_path / "ckpt.pt"), tmp_path / "model")
    assert describe(str(tmp_path / "model")).fingerprint == describe(str(converted)).fingerprint


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
    model = describe(str(tmp_path / "model"))
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
    with pytest.raises(OSError, match="No space left"):
        convert(file, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
