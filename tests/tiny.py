"""Tiny models of every kind, with seeded weights, saved as their real counterparts are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from oms_core.families.uvit import UVit

SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WORDS = ["a photo of a cat", "a photo of a dog"]


def seeded(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight drawn anew, so that nothing is zero as some kinds begin."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            scale = weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.1
            weight.add_(scale * torch.randn(weight.shape, generator=random))
    return network.eval()


def vae(channels: int = 3, **config: Any) -> AutoencoderKL:
    """8 x 8 pixels to latents of 4 x 4 x 4."""
    kind = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"in_channels": channels, "out_channels": channels, "block_out_channels": (8, 8), "norm_num_groups": 4}
    return AutoencoderKL(latent_channels=4, layers_per_block=1, **kind, **shape, **config)


def clip_tokenizer() -> CLIPTokenizer:
    tokenizer = CLIPTokenizer().train_new_from_iterator(WORDS, 1000, show_progress=False)
    tokenizer.model_max_length = 16
    return tokenizer


def clip(kind: type, tokenizer: CLIPTokenizer, **config: Any) -> nn.Module:
    size = {"hidden_size": 8, "intermediate_size": 8, "projection_dim": 8, "max_position_embeddings": 16}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return seeded(kind(CLIPTextConfig(**size, **depth, **ends, pad_token_id=tokenizer.pad_token_id, **config)))


def t5(width: int = 8) -> tuple[T5Tokenizer, T5EncoderModel]:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(k)) for k, piece in enumerate(pieces)], extra_ids=0)
    size = {"d_model": width, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    return tokenizer, seeded(T5EncoderModel(T5Config(**size)))


def save_uvit(folder: Path, **config: Any) -> Path:
    """A U-ViT of grey 8 x 8 pictures."""
    torch.manual_seed(0)
    network = UVit(**({"sample_size": 8, "in_channels": 1, "width": 16, "depth": 2, "heads": 2} | config))
    seeded(network).save_pretrained(folder)
    return folder


def save_stable_diffusion(folder: Path, variant: str | None = None, text: dict | None = None, **schedule: Any) -> Path:
    """A text-to-image pipeline of 8 x 8 pictures in colour, or grey with `channels=1`."""
    channels = schedule.pop("channels", 3)
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae(channels),
        text_encoder=clip(CLIPTextModel, tokenizer, **(text or {})),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**SCALED_LINEAR, **({"steps_offset": 1, "skip_prk_steps": True} | schedule)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, variant=variant)
    return folder


def save_dit(folder: Path, **schedule: Any) -> Path:
    """A class-conditional transformer with a learned variance."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1,
        norm_num_groups=4, sample_size=4, num_embeds_ada_norm=10,
    )  # fmt: skip
    pipeline = DiTPipeline(seeded(transformer), vae(), DDIMScheduler(**schedule))
    pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    labels = {"id2label": {"3": "tench, Tinca tinca", "7": "cat"}}
    index.write_text(json.dumps(json.loads(index.read_text()) | labels))
    return folder


def save_pixart(folder: Path, **config: Any) -> Path:
    """A text-conditional transformer with a learned variance."""
    torch.manual_seed(0)
    tokenizer, text = t5()
    shape = {"num_attention_heads": 2, "attention_head_dim": 4, "cross_attention_dim": 8, "caption_channels": 8}
    transformer = PixArtTransformer2DModel(
        in_channels=4, out_channels=8, num_layers=1, norm_num_groups=4, sample_size=4, **(shape | config)
    )
    PixArtAlphaPipeline(tokenizer, text, vae(), seeded(transformer), DDIMScheduler()).save_pretrained(folder)
    return folder


def save_sd3(folder: Path, third: bool = False, **schedule: Any) -> Path:
    """A transformer trained by flow matching, with two text encoders or three."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    last_tokenizer, last_text = t5(32) if third else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=8, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=seeded(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**schedule),
        vae=vae(shift_factor=0.1),
        text_encoder=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=last_text,
        tokenizer_3=last_tokenizer,
    ).save_pretrained(folder)
    return folder


def save_blip(folder: Path) -> Path:
    """A captioner of 8 x 8 pictures that was never trained."""
    from oms_core.training import captioner

    torch.manual_seed(0)
    tokenizer = captioner.vocabulary()
    model = captioner.network(tokenizer, size=8, patch_size=4, width=16, layers=1)
    for part in (seeded(model), tokenizer, captioner.BlipImageProcessorPil(size={"height": 8, "width": 8})):
        part.save_pretrained(folder)
    return folder
