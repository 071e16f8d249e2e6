"""U-ViT (Bao et al., 2023, "All are Worth Words"): a transformer with long skip connections, in continuous time.

The names and shapes of its tensors are those of the public CIFAR-10 checkpoint, which therefore loads strictly.
Noise levels are those of the variance-preserving SDE with beta from 0.1 to 20 (Song et al., 2021, App. B):
abar(t) = exp(-(0.1 t + 9.95 t^2)) for t in [0, 1]. A discrete timestep n stands for t = n / 1000; the network is
called with 999 t.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from oms_core.families.base import PixelSpace, load_network

if TYPE_CHECKING:
    from torch import Tensor

    from oms_core.catalog import Model
    from oms_core.device import Placement

CLOCK = 999  # the network's unit of time


def alpha_bar(t: Tensor) -> Tensor:
    """abar(t) for t in [0, 1]."""
    return torch.exp(-(0.1 * t + 9.95 * t**2))


class Attention(nn.Module):
    """Self-attention with several heads; queries, keys and values come from one matrix without bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, tokens, width / heads)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two layers, four times as wide in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A transformer block; with `skip`, a long skip connection is joined before it."""

    def __init__(self, width: int, heads: int, skip: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """Pictures as tokens, one per patch."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, patches, width)


class UVit(ModelMixin, ConfigMixin):
    """The network: time and patches are tokens, the first half of the blocks feeds the second.

    The defaults are the public CIFAR-10 checkpoint's: 164 tensors, 44.26 million parameters.

    Args:
        sample_size: height and width in pixels, a multiple of `patch_size`.
        in_channels: C.
        patch_size: side of a token's patch in pixels.
        width: of a token; a multiple of `heads`.
        depth: how many blocks, half of them before the middle one and half after.
        heads: of the attention.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        patch_size: int = 2,
        width: int = 512,
        depth: int = 12,
        heads: int = 8,
    ) -> None:
        super().__init__()
        patches = (sample_size // patch_size) ** 2
        self.patch_embed = Patches(in_channels, patch_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, width))
        self.in_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth // 2))
        self.mid_block = Block(width, heads)
        self.out_blocks = nn.ModuleList(Block(width, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch_size**2 * in_channels)
        self.final_layer = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(initialise)

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        """The predicted noise, (B, C, H, W), from x_t and 999 t of shape (B,)."""
        clock = embedding(time, self.config.width).to(x_t.dtype)
        x = torch.cat([clock[:, None], self.patch_embed(x_t)], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        patches = self.decoder_pred(self.norm(x))[:, 1:]  # without the token of time
        return self.final_layer(self.unpatched(patches))

    def unpatched(self, patches: Tensor) -> Tensor:
        """Tokens of (B, patches, patch^2 C) as pictures, (B, C, H, W)."""
        side, patch = self.config.sample_size // self.config.patch_size, self.config.patch_size
        pixels = patches.unflatten(1, (side, side)).unflatten(3, (patch, patch, -1))  # (B, h, w, p, q, C)
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def initialise(module: nn.Module) -> None:
    """Linear layers as in the reference implementation."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def embedding(time: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of the time at width / 2 frequencies, (B, width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=time.device) / half)
    angles = time[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ContinuousTime(PixelSpace):
    """A `UVit` as a `Denoiser`."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.network = load_network(UVit, model.parts["network"], model.name, self.dtype).to(self.device)
        self.alpha_bar = alpha_bar(torch.arange(self.timesteps, dtype=torch.float64) / self.timesteps).tolist()
        self.check(model.name)

    def coefficients(self, t: int) -> tuple[float, float]:
        """sqrt(abar(t / 1000)) and sqrt(1 - abar(t / 1000))."""
        return self.alpha_bar[t] ** 0.5, (1 - self.alpha_bar[t]) ** 0.5

    def eps(self, x_t: Tensor, t: int, condition: None = None) -> Tensor:
        """eps_theta(x_t, 999 t / 1000)."""
        time = torch.full((len(x_t),), CLOCK * t / self.timesteps, device=self.device)
        return self.network(x_t, time)


load = ContinuousTime
