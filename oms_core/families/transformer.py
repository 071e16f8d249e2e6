"""Latent transformers: DiT (Peebles & Xie, 2023), PixArt (Chen et al., 2024) and SD3 (Esser et al., 2024).

SD3 is trained by flow matching (Lipman et al., 2023): x_t = (1 - s) x_0 + s eps, and the network predicts
eps - x_0. A timestep t stands for the t-th noise level s of its own scheduler, from the smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from oms_core.denoiser import to_eps
from oms_core.errors import InputError
from oms_core.families.base import (
    Diffused,
    LatentSpace,
    load_network,
    load_text_encoder,
    scheduler_of,
    tokenizer_for,
)

if TYPE_CHECKING:
    from torch import Tensor

    from oms_core.catalog import Model
    from oms_core.device import Placement

NETWORKS = {kind.__name__: kind for kind in (DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel)}
TEXT_ENCODERS = {
    "text_encoder": CLIPTextModelWithProjection,
    "text_encoder_2": CLIPTextModelWithProjection,
    "text_encoder_3": T5EncoderModel,
}
TOKENIZERS = {"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5Tokenizer}


class Transformer(LatentSpace):
    """A transformer on an autoencoder's latents."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        network = load_network(NETWORKS[model.kind], model.parts["network"], model.name, self.dtype)
        self.network = network.to(self.device)

    def clock(self, time: float, count: int) -> Tensor:
        """The network's time for each picture, (B,)."""
        return torch.full((count,), time, device=self.device)


class Dit(Transformer, Diffused):
    """A class-conditional DiT; a caption that names no class asks for the unconditional answer."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.classes = model.classes
        self.check(model.name)

    def condition(self, captions: Sequence[str]) -> Tensor:
        """The class that each caption names, by number or word, (B,)."""
        none = self.network.config.num_embeds_ada_norm
        numbers = [int(word) if word.isdecimal() else self.classes.get(word, none) for word in captions]
        return torch.tensor([number if number < none else none for number in numbers], device=self.device)

    def eps(self, x_t: Tensor, t: int, condition: Tensor) -> Tensor:
        """eps_theta(x_t, t, class), without the learned variance."""
        time = self.clock(t, len(x_t)).long()
        output = self.network(x_t, timestep=time, class_labels=condition).sample[:, : x_t.shape[1]]
        return to_eps(output, x_t, *self.coefficients(t), self.predicts)


class PixArt(Transformer, Diffused):
    """A text-conditional PixArt."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.text = load_text_encoder(T5EncoderModel, model.parts["text_encoder"], model.name, self.dtype)
        tokenizer = tokenizer_for(T5Tokenizer, model.parts["tokenizer"], self.text, model.name)
        scheduler = scheduler_of(model.schedule)
        self.pipeline = PixArtAlphaPipeline(tokenizer, self.text.to(self.device), self.vae, self.network, scheduler)
        self.check(model.name)

    def condition(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """T5's answer to each caption and which of its tokens count."""
        embeds, mask, *_ = self.pipeline.encode_prompt(list(captions), False, device=self.device)
        return embeds, mask

    def eps(self, x_t: Tensor, t: int, condition: tuple[Tensor, Tensor]) -> Tensor:
        """eps_theta(x_t, t, caption), without the learned variance."""
        embeds, mask = condition
        output = self.network(
            x_t,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=self.clock(t, len(x_t)).long(),
            added_cond_kwargs=self.size_of_picture(len(x_t)),
        ).sample[:, : x_t.shape[1]]
        return to_eps(output, x_t, *self.coefficients(t), self.predicts)

    def size_of_picture(self, count: int) -> dict[str, Any]:
        """What the networks for large pictures also want to know."""
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = self.profile.size
        told = {"resolution": [height, width], "aspect_ratio": [height / width]}
        return {
            key: torch.tensor(value, device=self.device, dtype=self.dtype).repeat(count, 1)
            for key, value in told.items()
        }


class StableDiffusion3(Transformer):
    """A text-conditional transformer trained by flow matching."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        scheduler = scheduler_of(model.schedule)
        self.levels = scheduler.sigmas.double().flip(0).tolist()  # s, the smallest first
        parts = dict.fromkeys((*TEXT_ENCODERS, *TOKENIZERS))
        for (encoder, kind), (tokenizer, its) in zip(TEXT_ENCODERS.items(), TOKENIZERS.items(), strict=True):
            if encoder in model.parts and tokenizer in model.parts:
                text = load_text_encoder(kind, model.parts[encoder], model.name, self.dtype)
                parts[tokenizer] = tokenizer_for(its, model.parts[tokenizer], text, model.name)
                parts[encoder] = text.to(self.device)
                check_length(parts[tokenizer], text, model.name)
        self.pipeline = StableDiffusion3Pipeline(transformer=self.network, scheduler=scheduler, vae=self.vae, **parts)
        self.check(model.name)

    def coefficients(self, t: int) -> tuple[float, float]:
        """1 - s and s."""
        return 1 - self.levels[t], self.levels[t]

    def condition(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What the text encoders make of each caption: (B, tokens, width), and pooled (B, width)."""
        words = list(captions)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(words, words, words, self.device, 1, False)
        return embeds, pooled

    def eps(self, x_t: Tensor, t: int, condition: tuple[Tensor, Tensor]) -> Tensor:
        """x_t + (1 - s) v."""
        embeds, pooled = condition
        time = self.clock(1000 * self.levels[t], len(x_t))
        output = self.network(x_t, embeds, pooled, time).sample
        return to_eps(output, x_t, *self.coefficients(t), "flow_prediction")


def check_length(tokenizer: Any, text: Any, name: str) -> None:
    """Refuse a CLIP's tokenizer that fills captions up to more tokens than the text encoder has positions.

    Raises:
        InputError: it does.
    """
    positions = getattr(text.config, "max_position_embeddings", tokenizer.model_max_length)
    if not 2 <= tokenizer.model_max_length <= positions:
        raise InputError(
            f"A tokenizer of {name} makes captions of {tokenizer.model_max_length:,} tokens, its text encoder takes "
            f"{positions}; restore the original tokenizer_config.json."
        )


CLASSES = {"DiTTransformer2DModel": Dit, "PixArtTransformer2DModel": PixArt, "SD3Transformer2DModel": StableDiffusion3}


def load(model: Model, placement: Placement) -> Transformer:
    """The denoiser of a model's kind."""
    return CLASSES[model.kind](model, placement)
