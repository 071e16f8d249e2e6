"""Latent text-to-image models: Stable Diffusion 1.x and 2.x (Rombach et al., 2022).

x_0 is the mode of the autoencoder's posterior times its scaling factor. There is no guidance: the noise is the
one that the model predicts for the caption alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from oms_core.denoiser import to_eps
from oms_core.families.base import Diffused, LatentSpace, load_network, load_text_encoder, tokenizer_for

if TYPE_CHECKING:
    from torch import Tensor

    from oms_core.catalog import Model
    from oms_core.device import Placement


class StableDiffusion(LatentSpace, Diffused):
    """A `StableDiffusionPipeline`'s autoencoder, text encoder and UNet as a `Denoiser`."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        parts, name = model.parts, model.name
        self.network = load_network(UNet2DConditionModel, parts["network"], name, self.dtype).to(self.device)
        self.text = load_text_encoder(CLIPTextModel, parts["text_encoder"], name, self.dtype).to(self.device)
        self.tokenizer = tokenizer_for(CLIPTokenizer, parts["tokenizer"], self.text, name)
        self.check(name)

    def condition(self, captions: Sequence[str]) -> Tensor:
        """What the text encoder makes of each caption, (B, tokens, width)."""
        longest = self.text.config.max_position_embeddings
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        ).to(self.device)
        masked = getattr(self.text.config, "use_attention_mask", False)
        return self.text(tokens.input_ids, tokens.attention_mask if masked else None).last_hidden_state

    def eps(self, x_t: Tensor, t: int, condition: Tensor) -> Tensor:
        """eps_theta(x_t, t, caption)."""
        output = self.network(x_t, t, encoder_hidden_states=condition).sample[:, : x_t.shape[1]]
        return to_eps(output, x_t, *self.coefficients(t), self.predicts)


load = StableDiffusion
