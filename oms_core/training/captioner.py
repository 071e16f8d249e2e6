"""A small BLIP (Li et al., 2022) that captions pictures, trained on pictures that no diffusion model sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from oms_core.images import ImageSet, open_images
from oms_core.training.pictures import COLUMNS, sheet, tensor_of, words_of
from oms_core.training.recipes import Recipe

LONGEST = 24  # tokens of a caption


def vocabulary() -> BertTokenizer:
    """BERT's tokenizer with the words of fashion's captions, and BLIP's mark for a caption's beginning."""
    ids = {token: k for k, token in enumerate(words_of("bert")["tokens"])}
    return BertTokenizer(vocab=ids, bos_token="[DEC]", model_max_length=LONGEST)


def network(
    tokenizer: BertTokenizer, size: int, patch_size: int, width: int, layers: int
) -> BlipForConditionalGeneration:
    """A small BLIP: a vision transformer and a decoder that looks at it."""
    common = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    vision = {"image_size": size, "patch_size": patch_size, "initializer_range": 0.02}
    text = {
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": width,
        "max_position_embeddings": LONGEST,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = BlipConfig(vision_config=common | vision, text_config=common | text, projection_dim=width)
    return BlipForConditionalGeneration(config)


class Subject:
    """A `BlipForConditionalGeneration` with its tokenizer and its image processor."""

    def __init__(self, recipe: Recipe, images: ImageSet, part: Path | None = None) -> None:
        self.recipe, self.captions = recipe, [*images.table.caption]
        self.tokenizer = vocabulary()
        self.module = network(self.tokenizer, recipe.size, **recipe.network)
        self.processor = BlipImageProcessorPil(size={"height": recipe.size, "width": recipe.size})
        self.pixels = self.seen(images)
        self.tokens = self.tokenizer(self.captions, return_tensors="pt", padding=True)
        self.tokens.input_ids[:, 0] = self.tokenizer.bos_token_id

    def seen(self, images: ImageSet) -> Tensor:
        """Pictures as BLIP sees them, (N, 3, H, W)."""
        grey = ((tensor_of(images, self.recipe.size)[:, 0] + 1) * 127.5).round().byte().numpy()
        return self.processor([np.stack([p, p, p], axis=-1) for p in grey], return_tensors="pt").pixel_values

    def loss(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Cross-entropy of the next token."""
        tokens, mask = self.tokens.input_ids[rows], self.tokens.attention_mask[rows]
        labels = tokens.masked_fill(mask == 0, -100)
        return self.module(self.pixels[rows], tokens, attention_mask=mask, labels=labels).loss

    def save(self, module: BlipForConditionalGeneration, folder: Path) -> None:
        """The network, its tokenizer and its image processor in one folder."""
        for part in (module, self.tokenizer, self.processor):
            part.save_pretrained(folder)

    def samples(self, module: BlipForConditionalGeneration) -> np.ndarray:
        """The first pictures that it was trained to caption."""
        seen = open_images(self.recipe.images).with_role(self.recipe.role)
        return sheet(tensor_of(seen, self.recipe.size)[:COLUMNS], COLUMNS)

    def facts(self, module: BlipForConditionalGeneration) -> dict[str, Any]:
        """How often its caption is the right one on pictures that it was not trained on."""
        return {f"right_on_{role}s": self.right(module, role) for role in ("member", "nonmember")}

    @torch.inference_mode()
    def right(self, module: BlipForConditionalGeneration, role: str) -> float:
        images = open_images(self.recipe.images).with_role(role)
        tokens = module.generate(pixel_values=self.seen(images), max_new_tokens=LONGEST - 1)
        captions = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return round(float(np.mean([a == b for a, b in zip(captions, images.table.caption, strict=True)])), 4)
