"""What the families have in common: pixels in, noise levels, and weights that are what their config says."""

from __future__ import annotations

import copy
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import no_init_weights
from safetensors.torch import load as tensors_in
from torch.utils.flop_counter import FlopCounterMode

from oms_core.device import out_of_memory
from oms_core.errors import InputError
from oms_core.files import Part, reason

if TYPE_CHECKING:
    import numpy as np
    from diffusers import ModelMixin
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from oms_core.catalog import Model
    from oms_core.device import Placement

LEAST_COST, MOST_COST = 2e10, 3e14  # floating-point operations of one pass that are always, and never, accepted
COST_OF_PARAMETER = 4e5  # in between: more than any network at the largest size of its kind
SPARE = 2**24  # numbers that a network may make for itself
FULL = 0.9  # of a text encoder's words its tokenizer has at least
PREDICTS = ("epsilon", "sample", "v_prediction")  # what makes sense where alpha^2 + sigma^2 = 1


class PixelSpace:
    """An unconditional model of pictures; a family adds `coefficients` and `eps`."""

    def __init__(self, model: Model, placement: Placement) -> None:
        self.fingerprint, self.profile, self.timesteps = model.fingerprint, model.profile, model.timesteps
        self.device, self.dtype = torch.device(placement.device), getattr(torch, placement.dtype)
        self.latent = model.latent
        self.compiled = placement.mode == "compiled"

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Pixels of (B, H, W, C) uint8 as x_0 in [-1, 1], (B, C, H, W)."""
        given = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            given = given.pin_memory()  # which the device fetches by itself
        x_0 = given.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        x_0 = x_0.to(self.dtype) / 127.5 - 1
        # in memory as every x_t will be: for each order of dimensions a network is compiled again
        return x_0.clone(memory_format=torch.contiguous_format) if self.compiled else x_0

    def decode(self, x_0: Tensor) -> np.ndarray:
        """x_0 in [-1, 1] as pixels of (B, H, W, C) uint8."""
        pixels = ((x_0.float().clamp(-1, 1) + 1) * 127.5).round()
        return pixels.byte().permute(0, 2, 3, 1).cpu().numpy()

    def condition(self, captions: Sequence[str]) -> Any:
        """Nothing: the model is unconditional."""
        return None

    @torch.inference_mode()
    def check(self, name: str) -> None:
        """One forward pass on an empty picture, after its cost was counted.

        Raises:
            InputError: it fails, costs too much, or gives no finite noise.
        """
        empty = torch.zeros(1, *self.profile.size, self.profile.channels, dtype=torch.uint8).numpy()
        try:
            condition = self.condition([""])
            self.count(name, condition)
            x_0 = self.encode(empty)
            output = self.eps(x_0, self.timesteps - 1, condition)
        except Exception as error:  # torch and the libraries raise many kinds for settings that do not fit each other
            if isinstance(error, InputError) or out_of_memory(error):
                raise
            raise InputError(f"{name} cannot take pictures of its own sample_size {self.profile.size}.") from error
        if output.shape != x_0.shape or not output.isfinite().all():
            raise InputError(f"{name} gives no finite noise of its input's shape, even for an empty picture.")

    def count(self, name: str, condition: Any) -> None:
        """Refuse a forward pass that costs too much, see `refuse_costly`; nothing is computed.

        Raises:
            InputError: it does.
        """
        shape = self.latent or (self.profile.channels, *self.profile.size)
        if is_cheap(self.network, math.prod(shape[1:]) + tokens_of(condition)):
            return
        x_t = torch.empty(1, *shape, dtype=self.dtype, device="meta")
        network, device = self.network, self.device
        self.network, self.device = hollow(network), x_t.device
        try:
            refuse_costly(name, network, lambda: self.eps(x_t, self.timesteps - 1, on_meta(condition)))
        finally:
            self.network, self.device = network, device


class Diffused(PixelSpace):
    """A model on a discrete variance-preserving schedule."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.alpha_bar = alpha_bar(model.schedule).tolist()
        self.predicts = model.schedule.get("prediction_type", "epsilon")
        if self.predicts not in PREDICTS:
            raise InputError(f"{model.name} predicts {self.predicts!r}; supported are {', '.join(PREDICTS)}.")

    def coefficients(self, t: int) -> tuple[float, float]:
        """sqrt(abar_t) and sqrt(1 - abar_t)."""
        return self.alpha_bar[t] ** 0.5, (1 - self.alpha_bar[t]) ** 0.5


class LatentSpace(PixelSpace):
    """A model of an autoencoder's latents."""

    def __init__(self, model: Model, placement: Placement) -> None:
        super().__init__(model, placement)
        self.vae = load_network(AutoencoderKL, model.parts["vae"], model.name, self.dtype).to(self.device)
        self.shift, self.scale = self.vae.config.shift_factor or 0, self.vae.config.scaling_factor

    def count(self, name: str, condition: Any) -> None:
        """The same, the autoencoder first."""
        if not is_cheap(self.vae, math.prod(self.profile.size)):
            picture = torch.empty(1, self.profile.channels, *self.profile.size, dtype=self.dtype, device="meta")
            vae = hollow(self.vae)
            refuse_costly(name, self.vae, lambda: vae.encode(picture))
        super().count(name, condition)

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Pixels of (B, H, W, C) uint8 as scaled latents: the mode of the posterior, never a sample, (B, c, h, w)."""
        mode = self.vae.encode(super().encode(pixels)).latent_dist.mode()
        return (mode - self.shift) * self.scale

    def decode(self, x_0: Tensor) -> np.ndarray:
        """Scaled latents as pixels of (B, H, W, C) uint8."""
        return super().decode(self.vae.decode(x_0 / self.scale + self.shift).sample)


def scheduler_of(schedule: dict[str, Any]) -> Any:
    """The scheduler of diffusers that a config describes.

    Raises:
        InputError: it does not know the config's settings.
    """
    known = {key: value for key, value in schedule.items() if not key.startswith("_")}
    try:
        return getattr(diffusers, schedule["_class_name"]).from_config(known)
    except Exception as error:  # diffusers raises many kinds for settings that it does not know
        raise InputError(f"The scheduler's config cannot be used: {reason(error)}") from error


def alpha_bar(schedule: dict[str, Any]) -> Tensor:
    """abar_t for t = 0 ... T - 1 in float64, from the betas of the model's own scheduler, (T,)."""
    abar = torch.cumprod(1 - scheduler_of(schedule).betas.double(), dim=0)
    if len(abar) != schedule["num_train_timesteps"] or not ((abar >= 0) & (abar < 1)).all():
        raise InputError("The scheduler's config gives no noise levels between 0 and 1 for its num_train_timesteps.")
    return abar


def load_network(kind: type[ModelMixin], part: Part, name: str, dtype: torch.dtype) -> Any:
    """A network of diffusers, refused unless its weights are exactly those that its config asks for, and finite.

    Raises:
        InputError: they are not; they changed since they were looked at; or the config asks for more memory than the
            weights could fill.
    """
    with fitting(f"The weights of {name} do"):
        check_memory(lambda: kind.from_config(part.config), part)
        state = state_of(part)
        with default_dtype(dtype), no_init_weights():
            network = kind.from_config(part.config)
        network._fix_state_dict_keys_on_load(state)  # attention had other names once
        missing, unexpected = network.load_state_dict(state, strict=False)
    return verified(network, {"missing": missing, "unexpected": unexpected}, name)


def load_text_encoder(kind: type[PreTrainedModel], part: Part, name: str, dtype: torch.dtype, **more: Any) -> Any:
    """The same for a network of transformers.

    Args:
        kind: its class.
        part: its config and weights.
        name: of the model, for a sentence.
        dtype: precision of its parameters.
        more: what its ``from_pretrained`` is told besides.
    """
    transformers.utils.logging.disable_progress_bar()
    settings = part.config.get(kind.config_class.base_config_key) or part.config
    with fitting(f"The {part.folder.name} of {name} does"):
        config = kind.config_class.from_dict(copy.deepcopy(settings))
        check_memory(lambda: kind(config), part)
        network, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state_of(part),
            dtype=dtype,
            local_files_only=True,
            output_loading_info=True,
            **more,
        )
    return verified(network, {key.removesuffix("_keys"): found for key, found in info.items()}, name)


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Say in one sentence that weights do not fit; what our own code said and a lack of memory stay what they are.

    Raises:
        InputError: in place of the many kinds that the libraries raise.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{what} not fit its config.json: {reason(error)}") from error


def state_of(part: Part) -> dict[str, Tensor]:
    """The tensors of a network, made of the bytes that were digested; one file's bytes are held at a time.

    Raises:
        InputError: a file changed since it was looked at.
    """
    return {key: tensor for name in part.weights for key, tensor in tensors_in(part.read(name)).items()}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors in a precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_tokenizer(kind: type, part: Part, name: str) -> Any:
    """What comes before a network of transformers: a tokenizer, or an image processor.

    It is read from a folder of its own with the bytes that were digested, as transformers chooses files by itself.

    Raises:
        InputError: its files are missing, damaged, or changed since they were looked at.
    """
    with tempfile.TemporaryDirectory() as folder:
        for file in part.words:
            (Path(folder) / file).write_bytes(part.read(file))
        try:
            return kind.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise InputError(f"The {part.folder.name} of {name} cannot be read: {reason(error)}") from error


def tokenizer_for(kind: type, part: Part, text: PreTrainedModel, name: str) -> Any:
    """The tokenizer of a text encoder, which must have a word for each that the encoder knows.

    T5 and BLIP have some spare rows in their tables, CLIP has none.

    Raises:
        InputError: it has too few or too many, or it cannot join letters to words; a folder without vocabulary reads
            as a tokenizer of two words.
    """
    tokenizer, known = load_tokenizer(kind, part, name), text.config.get_text_config().vocab_size
    least = known if kind is transformers.CLIPTokenizer else FULL * known
    if not least <= len(tokenizer) <= known:
        raise InputError(
            f"The tokenizer in {part.folder} has {len(tokenizer):,} words, its text encoder {known:,}; "
            "restore the original files."
        )
    if joinless(tokenizer):
        raise InputError(f"The tokenizer in {part.folder} lacks some of its merges; restore the original files.")
    return tokenizer


def joinless(tokenizer: Any) -> bool:
    """Whether byte pairs lack the merges that make words of letters: then every caption is spelled."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        return False
    end = model.get("end_of_word_suffix") or ""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    made = {first + second for first, second in model["merges"]}
    return any(len(word.removesuffix(end)) > 1 and word not in made | special for word in model["vocab"])


def verified(network: Any, info: dict[str, Any], name: str) -> Any:
    """A network ready to be asked.

    Raises:
        InputError: a tensor is missing, left over, of another shape, or not finite.
    """
    for what in ("missing", "unexpected", "mismatched"):
        if found := info.get(what):
            raise InputError(f"The weights of {name} do not fit its config.json: {what} {min(map(str, found))}.")
    for key, weight in network.named_parameters():
        if not weight.isfinite().all():
            raise InputError(f"The weights of {name} are not finite ({key}); the file is damaged or diverged.")
    return network.eval().requires_grad_(False)


def check_memory(build: Callable[[], nn.Module], part: Part) -> None:
    """Refuse, before memory is taken, a config that asks for far more than the weights hold.

    Args:
        build: makes the network; here of shapes alone.
        part: its weights.

    Raises:
        ValueError: it asks for more.
    """
    with torch.device("meta"):
        network = build()
    asked = sum(tensor.numel() for tensor in itertools.chain(network.parameters(), network.buffers()))
    if asked > 2 * part.numbers + SPARE:
        raise ValueError(f"it asks for {asked:,} numbers, they are {part.numbers:,}")


def hollow(network: nn.Module) -> Any:
    """A copy of a network that has shapes and no numbers, so that its passes cost nothing."""
    held = [
        *(
            (tensor, torch.nn.Parameter(torch.empty_like(tensor, device="meta"), False))
            for tensor in network.parameters()
        ),
        *((tensor, torch.empty_like(tensor, device="meta")) for tensor in network.buffers()),
    ]
    return copy.deepcopy(network, {id(tensor): empty for tensor, empty in held})


def on_meta(value: Any) -> Any:
    """Tensors, alone or in a tuple, as shapes alone."""
    if isinstance(value, tuple):
        return tuple(on_meta(one) for one in value)
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def tokens_of(condition: Any) -> int:
    """How many tokens a network takes besides a picture's."""
    found = condition if isinstance(condition, tuple) else (condition,)
    return sum(one.shape[1] for one in found if isinstance(one, torch.Tensor) and one.dim() > 1)


def is_cheap(network: nn.Module, positions: int) -> bool:
    """Whether a pass costs little even if each weight met every position, and each attention every pair of them."""
    size = sum(weight.numel() for weight in network.parameters())
    inner = [module for module in network.modules() if "Attention" in type(module).__name__]
    attention = sum(weight.numel() for module in inner for weight in module.parameters())
    return 2 * size * positions + attention * positions**2 <= LEAST_COST


def refuse_costly(name: str, network: nn.Module, forward: Callable[[], object]) -> None:
    """Refuse a network, before it computes, whose pass costs more than any of its size does.

    Args:
        name: of the model.
        network: whose parameters count.
        forward: the pass, on shapes alone.

    Raises:
        InputError: it costs too much.
    """
    with FlopCounterMode(display=False) as counter:
        forward()
    cost, size = counter.get_total_flops(), sum(weight.numel() for weight in network.parameters())
    if cost > min(MOST_COST, max(LEAST_COST, COST_OF_PARAMETER * size)):
        raise InputError(
            f"{name} would compute {cost:.1g} operations for one picture of its own sample_size, too many for its "
            f"{size:,} parameters; restore its original config.json."
        )
