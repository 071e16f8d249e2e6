"""What a config may say: the type and the bounds of each of its values, checked before anything is built.

Every schema is a table from a key to a rule. A key that no table knows may stand in a config, as public ones have many,
but its value must be within general bounds. A value of null is a library's own default. Sizes are checked against the
tensors: a width that a config gives is a side of some tensor, and there are no more layers than tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oms_core.errors import InputError
from oms_core.files import Shapes

MOST = 10**7  # of any whole number, known or not
MAX_VALUES, MAX_DEPTH = 50_000, 8  # of one config, and how deep they lie
MAX_KEY, MAX_TEXT = 200, 10_000  # letters
MAX_TIMESTEPS = 10_000
MAX_TOKENS = 512  # of a caption: then a text encoder computes little for each of its parameters
MAX_PATCHES = 2**15  # of a picture
MAX_BLOCKS = 16
LEAST_TENSORS = 4  # a layer of any network has more


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        what: the same in words.
        fits: whether a value is that, for a network whose tensors have certain sides; None if they are not known.
    """

    what: str
    fits: Callable[[Any, set[int] | None], bool]


Schema = dict[str, Rule]


def is_whole(value: Any) -> bool:
    return type(value) is int


def is_real(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def whole(least: int, most: int) -> Rule:
    return Rule(f"a whole number of {least:,} to {most:,}", lambda value, _: is_whole(value) and least <= value <= most)


def real(least: float, most: float) -> Rule:
    return Rule(f"a number of {least:g} to {most:g}", lambda value, _: is_real(value) and least <= value <= most)


def word(*known: str) -> Rule:
    if known:
        return Rule(f"one of {', '.join(known)}", lambda value, _: isinstance(value, str) and value in known)
    return Rule("a word", lambda value, _: isinstance(value, str) and len(value) <= 200)


def only(*values: Any) -> Rule:
    def fits(value: Any, _: set[int] | None) -> bool:
        return any(type(value) is type(one) and value == one for one in values)

    return Rule(" or ".join(map(repr, values)), fits)


def each(rule: Rule, most: int, least: int = 0) -> Rule:
    def fits(value: Any, sides: set[int] | None) -> bool:
        return isinstance(value, list) and least <= len(value) <= most and all(rule.fits(one, sides) for one in value)

    return Rule(f"a list of {least} to {most:,}, each {rule.what}", fits)


def either(*rules: Rule) -> Rule:
    return Rule(
        " or ".join(rule.what for rule in rules), lambda value, sides: any(rule.fits(value, sides) for rule in rules)
    )


def side_of(name: str, of: Callable[[int], Iterable[int]]) -> Rule:
    """A whole number from which a side of a tensor is made."""

    def fits(value: Any, sides: set[int] | None) -> bool:
        return is_whole(value) and value >= 1 and (sides is None or any(one in sides for one in of(value)))

    return Rule(name, fits)


flag = Rule("true or false", lambda value, _: isinstance(value, bool))
side = side_of("a side of one of its tensors", lambda n: (n,))
rows_of_classes = side_of("the number of classes that its weights know", lambda n: (n, n + 1))
square = side_of("the side of the grid in its weights", lambda n: (n * n,))
count = whole(1, 4096)
depth = whole(0, 4096)
number = real(-1e6, 1e6)
small = whole(0, 64)
share = real(0, 1)
absent = Rule("null", lambda value, _: value is None)
size = either(count, each(count, 2, 2))
words = each(word(), MAX_BLOCKS, 1)
token = whole(-1, MOST)
length = whole(1, 1024)
lengths = either(
    length,
    Rule(
        "an object of lengths of 1 to 1,024",
        lambda value, sides: isinstance(value, dict) and all(length.fits(one, sides) for one in value.values()),
    ),
)

BLOCKS: Schema = {
    "_class_name": word(),
    "act_fn": word(),
    "block_out_channels": each(side, MAX_BLOCKS, 1),
    "down_block_types": words,
    "up_block_types": words,
    "mid_block_type": word(),
    "in_channels": whole(1, 256),
    "out_channels": whole(1, 512),
    "layers_per_block": either(depth, each(depth, MAX_BLOCKS, 1)),
    "norm_num_groups": count,
    "sample_size": size,
    "quantization_config": absent,
    "dropout": share,
}
UNET: Schema = BLOCKS | {
    "add_attention": flag,
    "attention_head_dim": either(count, each(count, MAX_BLOCKS, 1)),
    "attn_norm_num_groups": count,
    "center_input_sample": flag,
    "downsample_padding": small,
    "downsample_type": word(),
    "flip_sin_to_cos": flag,
    "freq_shift": number,
    "mid_block_scale_factor": number,
    "norm_eps": share,
    "num_train_timesteps": whole(1, MAX_TIMESTEPS),
    "resnet_time_scale_shift": word(),
    "time_embedding_dim": side,
    "time_embedding_type": word(),
    "upsample_type": word(),
}
TRANSFORMERS = either(depth, each(either(depth, each(depth, MAX_BLOCKS)), MAX_BLOCKS))
CONDITIONED: Schema = UNET | {
    "addition_embed_type_num_heads": count,
    "addition_time_embed_dim": count,
    "attention_type": word(),
    "class_embeddings_concat": flag,
    "conv_in_kernel": whole(1, 15),
    "conv_out_kernel": whole(1, 15),
    "cross_attention_dim": either(side, each(side, MAX_BLOCKS, 1)),
    "cross_attention_norm": word(),
    "dual_cross_attention": flag,
    "encoder_hid_dim": side,
    "mid_block_only_cross_attention": flag,
    "num_attention_heads": either(count, each(count, MAX_BLOCKS, 1)),
    "only_cross_attention": either(flag, each(flag, MAX_BLOCKS, 1)),
    "projection_class_embeddings_input_dim": count,
    "resnet_out_scale_factor": number,
    "resnet_skip_time_act": flag,
    "reverse_transformer_layers_per_block": TRANSFORMERS,
    "time_cond_proj_dim": count,
    "time_embedding_act_fn": word(),
    "timestep_post_act": word(),
    "transformer_layers_per_block": TRANSFORMERS,
    "upcast_attention": flag,
    "use_linear_projection": flag,
}
PATCHED: Schema = {
    "_class_name": word(),
    "activation_fn": word(),
    "attention_bias": flag,
    "attention_head_dim": count,
    "dropout": share,
    "in_channels": whole(1, 256),
    "norm_elementwise_affine": flag,
    "norm_eps": share,
    "norm_num_groups": count,
    "norm_type": word(),
    "num_attention_heads": count,
    "num_layers": depth,
    "out_channels": whole(1, 512),
    "patch_size": whole(1, 64),
    "quantization_config": absent,
    "sample_size": size,
    "upcast_attention": flag,
}
DIT: Schema = PATCHED | {"num_embeds_ada_norm": rows_of_classes}
PIXART: Schema = PATCHED | {
    "attention_type": word(),
    "caption_channels": side,
    "cross_attention_dim": side,
    "interpolation_scale": number,
    "num_embeds_ada_norm": whole(1, MAX_TIMESTEPS),
    "use_additional_conditions": flag,
}
SD3: Schema = PATCHED | {
    "caption_projection_dim": side,
    "dual_attention_layers": each(depth, 4096),
    "joint_attention_dim": side,
    "pooled_projection_dim": side,
    "pos_embed_max_size": square,
    "qk_norm": word(),
}
UVIT: Schema = {
    "_class_name": word(),
    "depth": depth,
    "heads": count,
    "in_channels": whole(1, 256),
    "patch_size": whole(1, 64),
    "quantization_config": absent,
    "sample_size": count,
    "width": side,
}
NETWORKS: dict[str, Schema] = {
    "UNet2DModel": UNET,
    "UVit": UVIT,
    "UNet2DConditionModel": CONDITIONED,
    "DiTTransformer2DModel": DIT,
    "PixArtTransformer2DModel": PIXART,
    "SD3Transformer2DModel": SD3,
}
AUTOENCODER: Schema = BLOCKS | {
    "force_upcast": flag,
    "latent_channels": whole(1, 256),
    "latents_mean": each(number, 256),
    "latents_std": each(number, 256),
    "mid_block_add_attention": flag,
    "scaling_factor": either(real(1e-6, 1e6), real(-1e6, -1e-6)),
    "shift_factor": number,
    "use_post_quant_conv": flag,
    "use_quant_conv": flag,
}
TRANSFORMER: Schema = {
    "_attn_implementation": word("eager", "sdpa"),
    "attn_implementation": word("eager", "sdpa"),
    "bos_token_id": token,
    "chunk_size_feed_forward": only(0),
    "distributed_config": absent,
    "eos_token_id": token,
    "fusion_config": absent,
    "hidden_act": word(),
    "is_encoder_decoder": flag,
    "layer_norm_eps": share,
    "model_type": word(),
    "num_labels": whole(0, 100_000),
    "output_attentions": flag,
    "output_hidden_states": flag,
    "pad_token_id": token,
    "pruned_heads": only({}),
    "quantization_config": absent,
    "return_dict": only(True),
    "tie_word_embeddings": flag,
    "torchscript": only(False),
    "transformers_weights": absent,
    "use_cache": flag,
    "use_return_dict": only(True),
    "vocab_size": side,
}
LAYERED: Schema = TRANSFORMER | {
    "attention_dropout": share,
    "hidden_size": side,
    "initializer_factor": number,
    "initializer_range": number,
    "intermediate_size": side,
    "num_attention_heads": count,
    "num_hidden_layers": depth,
    "projection_dim": whole(1, 2**16),
}
CLIP: Schema = LAYERED | {
    "max_position_embeddings": whole(1, MAX_TOKENS),
    "use_attention_mask": flag,
}
T5: Schema = TRANSFORMER | {
    "classifier_dropout": share,
    "d_ff": side,
    "d_kv": count,
    "d_model": side,
    "dense_act_fn": word(),
    "dropout_rate": share,
    "feed_forward_proj": word(),
    "is_gated_act": flag,
    "layer_norm_epsilon": share,
    "num_decoder_layers": depth,
    "num_heads": count,
    "num_layers": depth,
    "relative_attention_max_distance": whole(1, 2**16),
    "relative_attention_num_buckets": side,
}
BEAMS: Schema = {
    "diversity_penalty": number,
    "do_sample": only(False),
    "max_length": whole(0, MAX_TOKENS),
    "max_new_tokens": whole(1, MAX_TOKENS),
    "min_length": whole(0, MAX_TOKENS),
    "num_beam_groups": only(1),
    "num_beams": whole(1, 16),
    "num_return_sequences": only(1),
}
BLIP: Schema = TRANSFORMER | {
    "image_text_hidden_size": count,
    "initializer_factor": number,
    "projection_dim": count,
    "text_config": Rule("an object", lambda value, _: isinstance(value, dict)),
    "vision_config": Rule("an object", lambda value, _: isinstance(value, dict)),
}
BLIP_TEXT: Schema = (
    LAYERED | BEAMS | {"encoder_hidden_size": side, "is_decoder": flag, "max_position_embeddings": whole(8, MAX_TOKENS)}
)
BLIP_VISION: Schema = LAYERED | {"image_size": whole(1, 1024), "num_channels": only(3), "patch_size": side}
PROCESSOR: Schema = {
    "do_convert_rgb": flag,
    "do_normalize": flag,
    "do_pad": flag,
    "do_rescale": flag,
    "do_resize": flag,
    "image_mean": each(number, 3, 3),
    "image_std": each(real(1e-6, 1e6), 3, 3),
    "resample": whole(0, 5),
    "rescale_factor": number,
    "crop_size": lengths,
    "size": lengths,
}
TEXT: dict[str, Schema] = {"CLIPTextModel": CLIP, "CLIPTextModelWithProjection": CLIP, "T5EncoderModel": T5}
SCHEDULER: Schema = {
    "_class_name": word(),
    "base_image_seq_len": count,
    "base_shift": number,
    "beta_end": number,
    "beta_schedule": word(),
    "beta_start": number,
    "clip_sample": flag,
    "clip_sample_range": number,
    "dynamic_thresholding_ratio": number,
    "invert_sigmas": flag,
    "lambda_min_clipped": either(number, only(-math.inf)),
    "lower_order_final": flag,
    "max_image_seq_len": whole(1, MAX_PATCHES),
    "max_shift": number,
    "num_train_timesteps": whole(1, MAX_TIMESTEPS),
    "prediction_type": word(),
    "rescale_betas_zero_snr": flag,
    "sample_max_value": number,
    "set_alpha_to_one": flag,
    "shift": number,
    "skip_prk_steps": flag,
    "solver_order": whole(1, 3),
    "solver_type": word(),
    "steps_offset": whole(0, MAX_TIMESTEPS),
    "stochastic_sampling": flag,
    "thresholding": flag,
    "time_shift_type": word(),
    "timestep_spacing": word(),
    "timestep_type": word(),
    "trained_betas": each(share, MAX_TIMESTEPS),
    "use_dynamic_shifting": flag,
    "variance_type": word(),
}
TOKENIZER: Schema = dict.fromkeys(
    ("init_inputs", "vocab", "merges", "tokenizer_object", "auto_map", "local_path", "gguf_file"), absent
)  # what would take the place of its files
CAPTIONER = {
    "config.json": BLIP,
    "generation_config.json": BEAMS,
    "preprocessor_config.json": PROCESSOR,
    "tokenizer_config.json": TOKENIZER,
}
NOT_NULL = ("in_channels", "latent_channels", "scaling_factor", "block_out_channels", "layers_per_block")
REVERSED = "reverse_transformer_layers_per_block"
BEYOND = ("model_max_length", "lambda_min_clipped")  # which public configs set to what stands for no bound


def check(config: dict[str, Any], schema: Schema, path: Path, shapes: Shapes | None = None) -> None:
    """Refuse a config with a value that is of another type or beyond its bounds.

    Args:
        config: what a file says.
        schema: of its class.
        path: the file, for the sentence.
        shapes: of the tensors that belong to it, if they are known.

    Raises:
        InputError: naming the key, its value and what is needed.
    """
    check_bounds(config, path)
    sides = None if shapes is None else {length for shape in shapes.values() if all(shape) for length in shape}
    for key, rule in schema.items():
        missing = key not in config or (config[key] is None and key not in NOT_NULL)
        if not missing and not rule.fits(config[key], sides):
            raise InputError(f"{path} has {key} {shown(config[key])}; {rule.what} is needed.")
    check_divisions(config, path)


def check_divisions(config: dict[str, Any], path: Path) -> None:
    """Refuse a width that its heads do not divide, and a picture that is cut into more patches than any model takes.

    Raises:
        InputError: naming the keys.
    """
    for width, heads in (("width", "heads"), ("hidden_size", "num_attention_heads")):
        if is_whole(config.get(width)) and is_whole(config.get(heads)) and config[width] % config[heads]:
            raise InputError(f"{path} has {width} {config[width]}, which its {heads} {config[heads]} do not divide.")
    size, patch = largest(config.get("sample_size")), config.get("patch_size")
    if is_whole(patch) and (size // patch) ** 2 > MAX_PATCHES:
        raise InputError(
            f"{path} has sample_size {size} and patch_size {patch}, which are more patches than are known."
        )


def check_bounds(config: dict[str, Any], path: Path) -> None:
    """Refuse a value, whatever its key, that no config would have.

    Raises:
        InputError: naming the key.
    """
    for number, (key, value, level) in enumerate(values(config)):
        if number > MAX_VALUES or level > MAX_DEPTH:
            raise InputError(f"{path} has more values than a config would; restore the original file.")
        if len(key) > MAX_KEY or not key.isprintable():
            raise InputError(f"{path} has a key {shown(key)}, which no config has; restore the original file.")
        beyond = (
            (isinstance(value, str) and len(value) > MAX_TEXT)
            or (is_whole(value) and abs(value) > MOST)
            or (isinstance(value, float) and not math.isfinite(value))
        )
        if beyond and key not in BEYOND:
            raise InputError(f"{path} has {key} {shown(value)}, which is beyond all bounds; restore the original file.")


def values(config: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Every value in a config, with the key that it stands under and how deep it lies."""
    waiting = [(key, value, 1) for key, value in config.items()]
    while waiting:
        key, value, level = waiting.pop()
        yield key, value, level
        if isinstance(value, dict):
            waiting += [(inner, one, level + 1) for inner, one in value.items()]
        elif isinstance(value, list):
            waiting += [(key, one, level + 1) for one in value]


def shown(value: Any) -> str:
    """A value, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def layers(config: dict[str, Any]) -> int:
    """At least as many layers as one way through a network has, of which each has some tensors."""
    blocks = config.get("block_out_channels")
    inner = max(largest(config.get(key)) for key in ("transformer_layers_per_block", REVERSED))
    across = (len(blocks) if isinstance(blocks, list) else 1) * largest(config.get("layers_per_block"))
    return max(across * inner, *(largest(config.get(key)) for key in ("num_layers", "depth", "num_hidden_layers")))


def largest(value: Any) -> int:
    """The largest number in nested lists, or 1."""
    found = [value]
    while any(isinstance(one, list) for one in found):
        found = [inner for one in found for inner in (one if isinstance(one, list) else [one])]
    return max((one for one in found if is_whole(one)), default=1)
