"""A small Stable Diffusion (Rombach et al., 2022): text encoder and UNet learn together on latents and captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from oms_core.files import read_json
from oms_core.images import ImageSet
from oms_core.training.autoencoder import modes
from oms_core.training.pictures import COLUMNS, ROWS, drawn, sheet, tensor_of, words_of
from oms_core.training.recipes import Recipe

WITHOUT_CAPTION = 0.1  # of the pictures, so that the model also knows the empty caption
LONGEST = 24  # tokens of a caption
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def vocabulary() -> CLIPTokenizer:
    """CLIP's tokenizer with every byte and the words of fashion's captions."""
    kept = words_of("clip")
    ids = {token: k for k, token in enumerate(kept["tokens"])}
    merges = [tuple(pair.split(" ")) for pair in kept["merges"]]
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=LONGEST)


def text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """A small CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=LONGEST,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def network(side: int, blocks: tuple[int, ...], width: int) -> UNet2DConditionModel:
    """A small UNet on latents whose every block looks at the caption."""
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=blocks,
        down_block_types=("CrossAttnDownBlock2D",) * len(blocks),
        up_block_types=("CrossAttnUpBlock2D",) * len(blocks),
        cross_attention_dim=width,
        attention_head_dim=4,
    )


class Subject:
    """UNet and text encoder; the autoencoder is a part that was trained before."""

    def __init__(self, recipe: Recipe, images: ImageSet, part: Path) -> None:
        self.recipe, self.part_card = recipe, read_json(part.parent / "card.json")
        vae = AutoencoderKL.from_pretrained(part, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        vae.register_to_config(_name_or_path=recipe.part)  # a name, not a place on some machine
        self.vae = vae.eval().requires_grad_(False)
        self.latents = modes(self.vae, tensor_of(images, recipe.size)).clone() * self.vae.config.scaling_factor
        captions = [*images.table.caption]
        self.tokenizer = vocabulary()
        width, layers, blocks = (recipe.network[key] for key in ("width", "layers", "blocks"))
        text = text_encoder(self.tokenizer, width, layers)
        self.module = nn.ModuleDict({"text_encoder": text, "unet": network(self.latents.shape[-1], blocks, width)})
        self.tokens, self.no_tokens = self.tokens_of(captions), self.tokens_of([""])
        self.captions = captions
        self.schedule = DDPMScheduler(**SCHEDULE, clip_sample=False)

    def tokens_of(self, captions: list[str]) -> Tensor:
        """Captions as the text encoder reads them, (B, LONGEST)."""
        shape = {"padding": "max_length", "max_length": LONGEST, "truncation": True}
        return self.tokenizer(captions, return_tensors="pt", **shape).input_ids

    def loss(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Eq. 5 on latents, with the caption as condition."""
        x_0 = self.latents[rows]
        eps = torch.randn(x_0.shape, generator=random)
        t = torch.randint(1000, (len(x_0),), generator=random)
        without = torch.rand(len(x_0), generator=random) < WITHOUT_CAPTION
        tokens = torch.where(without[:, None], self.no_tokens, self.tokens[rows])
        predicted = self.ask(self.module, self.schedule.add_noise(x_0, eps, t), t, tokens)
        return nn.functional.mse_loss(predicted, eps)

    def ask(self, module: nn.ModuleDict, x_t: Tensor, t: Tensor | int, tokens: Tensor) -> Tensor:
        """eps_theta(x_t, t, caption)."""
        text = module["text_encoder"](tokens).last_hidden_state
        return module["unet"](x_t, t, encoder_hidden_states=text).sample

    def save(self, module: nn.ModuleDict, folder: Path) -> None:
        """As a `StableDiffusionPipeline`, without a safety checker."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae.half(),
            text_encoder=module["text_encoder"],
            tokenizer=self.tokenizer,
            unet=module["unet"],
            scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder)
        self.vae.float()

    def samples(self, module: nn.ModuleDict) -> np.ndarray:
        """Pictures drawn for the captions of the first members, without guidance."""
        tokens = self.tokens[: ROWS * COLUMNS]
        shape = (len(tokens), *self.latents.shape[1:])
        latents = drawn(lambda x_t, t: self.ask(module, x_t, t, tokens), self.schedule, shape, self.recipe.seed)
        with torch.inference_mode():
            return sheet(self.vae.decode(latents / self.vae.config.scaling_factor).sample, COLUMNS)

    def facts(self, module: nn.ModuleDict) -> dict[str, Any]:
        """How many different captions it was trained with, and how its autoencoder was made."""
        vae = {key: self.part_card[key] for key in ("parameters", "auxiliary", "minutes", "held_out_mse", "recipe")}
        return {"captions": len({*self.captions}), "latent": [*self.latents.shape[1:]], "autoencoder": vae}
