"""Latent text-to-image models: Stable Diffusion 1.x and 2.x (Rombach et al., 2022).

x_0 is the mode of the autoencoder's posterior times its scaling factor. There is no guidance: the noise is the
one that the model predicts for the caption alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from oms_core.denoiser import to_eps
from oms_core.families.base import Diffused, latents, load_network, load_text_encoder

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from oms_core.catalog import Model
    from oms_core.device import Placement


class StableDiffusion(Diffused):
    """A `StableDiffusionPipeline`'s autoencoder, text encoder and UNet as a `Denoiser`."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        parts, name = model.parts, model.name
        self.vae = load_network(AutoencoderKL, parts["vae"], name, self.dtype).to(self.device)
        self.unet = load_network(UNet2DConditionModel, parts["network"], name, self.dtype).to(self.device)
        self.text = load_text_encoder(CLIPTextModel, parts["text_encoder"], name, self.dtype).to(self.device)
        self.tokenizer = CLIPTokenizer.from_pretrained(parts["tokenizer"], local_files_only=True)
        self.check(name)

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Pixels of (B, H, W, C) uint8 as scaled latents, (B, c, h, w)."""
        return latents(self.vae, super().encode(pixels))

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
        output = self.unet(x_t, t, encoder_hidden_states=condition).sample[:, : x_t.shape[1]]
        return to_eps(output, x_t, *self.coefficients(t), self.predicts)


load = StableDiffusion
