"""One contract for every family of models and every attack, and the weights that must be refused."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import oms_core.families
from oms_core import catalog, compute
from oms_core.attacks import ATTACKS, SEARCHES, Learned, Probe, quantile
from oms_core.catalog import Model, describe
from oms_core.convert import convert
from oms_core.decode import Profile
from oms_core.denoiser import Denoiser
from oms_core.device import DTYPES, Placement
from oms_core.errors import InputError
from oms_core.families import FAMILIES, load
from oms_core.families.uvit import UVit
from oms_core.location import Location
from oms_core.run import Run, plan, scores
from oms_core.search import fixed_point

Save = Callable[..., Path]
CPU = Placement("cpu", "float32")
NETWORK, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


KINDS = ("ddpm", "uvit", "stable_diffusion", "dit", "pixart", "sd3", "ideal")
ON_PIXELS = ("ddpm", "uvit", "ideal")
FLOW = ("sd3",)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, pipeline: Path, pictures: Path) -> dict[str, Location]:
    """A model of every kind, by kind; a new kind needs a line here. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    places = {
        "ddpm": pipeline,
        "uvit": tiny.save_uvit(folder / "uvit"),
        "stable_diffusion": tiny.save_stable_diffusion(folder / "stable_diffusion"),
        "dit": tiny.save_dit(folder / "dit"),
        "pixart": tiny.save_pixart(folder / "pixart"),
        "sd3": tiny.save_sd3(folder / "sd3", third=True),
        "ideal": f"ideal:{pictures}",
    }
    return {kind: Location(place) for kind, place in places.items()}


def test_every_family_is_tried(models: dict[str, Location]) -> None:
    assert tuple(models) == KINDS
    assert {describe(model).family for model in models.values()} == set(FAMILIES)


# The contract


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def denoiser(kind: str, models: dict[str, Location]) -> Denoiser:
    return load(describe(models[kind]), CPU)


def random_pixels(profile: Profile, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *profile.size, profile.channels), np.uint8)


def test_a_denoiser_says_what_its_description_says(denoiser: Denoiser, kind: str, models: dict[str, Location]) -> None:
    model = describe(models[kind])
    assert denoiser.fingerprint == model.fingerprint
    assert (denoiser.profile, denoiser.timesteps) == (model.profile, model.timesteps)
    assert model.captioned == (denoiser.condition(["a cat"]) is not None)
    shape = denoiser.encode(random_pixels(model.profile)).shape[1:]
    assert model.latent == (() if kind in ON_PIXELS else tuple(shape))
    assert model.dimension == shape.numel()


@torch.inference_mode()
def test_what_was_encoded_is_decoded_to_pictures(denoiser: Denoiser, kind: str) -> None:
    pixels = random_pixels(denoiser.profile)
    decoded = denoiser.decode(denoiser.encode(pixels))
    assert (decoded.shape, decoded.dtype) == (pixels.shape, np.uint8)
    if kind in ON_PIXELS:
        np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize("kind", ON_PIXELS, indirect=True, scope="session")
def test_pixels_are_encoded_from_minus_one_to_one(denoiser: Denoiser) -> None:
    pixels = random_pixels(denoiser.profile)
    x_0 = denoiser.encode(pixels)
    assert x_0.shape == (3, denoiser.profile.channels, *denoiser.profile.size)
    expected = pixels.transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(x_0.numpy(), expected, atol=1e-6)


def test_coefficients_make_up_one_and_fall_and_rise(denoiser: Denoiser, kind: str) -> None:
    alphas, sigmas = np.array([denoiser.coefficients(t) for t in range(denoiser.timesteps)]).T
    np.testing.assert_allclose(alphas + sigmas if kind in FLOW else alphas**2 + sigmas**2, 1, rtol=1e-14)
    assert (np.diff(alphas) < 0).all()
    assert (np.diff(sigmas) > 0).all()


@pytest.mark.parametrize("t", [0, 500, 999])
def test_noise_is_finite_shaped_like_its_input_and_the_same_when_asked_again(denoiser: Denoiser, t: int) -> None:
    x_t = drawn(0, *denoiser.encode(random_pixels(denoiser.profile)).shape)
    before = x_t.clone()
    eps = denoiser.eps(x_t, t, denoiser.condition(["", "", ""]))
    assert eps.shape == x_t.shape
    assert eps.isfinite().all()
    assert torch.equal(x_t, before)
    assert torch.equal(denoiser.eps(x_t, t, denoiser.condition(["", "", ""])), eps)


@pytest.mark.parametrize("name", SEARCHES)
def test_every_search_works_on_every_family(denoiser: Denoiser, name: str, kind: str) -> None:
    at_rest = (kind, name) == ("ideal", "SimA")  # no noise is the fixed point at a member, and SimA starts there
    x_0 = denoiser.encode(random_pixels(denoiser.profile))
    probe = Probe(denoiser, x_0, denoiser.condition(["", "", ""]), lambda k: drawn(k, *x_0.shape))
    given, f = ATTACKS[name].search(probe, ATTACKS[name].t)
    with torch.inference_mode():
        trajectory = fixed_point(f, given, 3)
    for n in (0, 1, 2, 3):
        distance = trajectory.distance(0, n, ATTACKS[name].p)
        assert distance.shape == (3,)
        assert distance.isfinite().all()
        assert (distance > 0).all() == (n > 0 and not at_rest)


def measured(model: str) -> tuple[str, ...]:
    """The attacks that ask a model something themselves, as far as it can answer."""
    captioned = describe(model).captioned
    fitting = (one for one in ATTACKS.values() if not isinstance(one, Learned) and (captioned or not one.captioned))
    return tuple(one.name for one in fitting)


def test_a_picture_alone_scores_as_in_company(
    tmp_path: Path, kind: str, models: dict[str, Location], pictures: Path
) -> None:
    alone = tmp_path / "alone" / "member" / "0.png"
    alone.parent.mkdir(parents=True)
    shutil.copy(pictures / "member" / "3.png", alone)
    names = measured(models[kind])
    run = Run(model=models[kind], images=Location(pictures), attacks=names, captions="text:a cat", batch=8)
    company, single = compute.score(run), compute.score(replace(run, images=Location(tmp_path / "alone")))
    for name in names:
        assert len(single[name]) == 1
        again = company[name][company[name].image == single[name].image[0]].reset_index(drop=True)
        pd.testing.assert_frame_equal(single[name], again, check_exact=True)


@pytest.fixture(scope="session")
def three_roles(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The six members and six non-members, and twenty auxiliary pictures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("roles") / "all"
    shutil.copytree(pictures, folder)
    (folder / "auxiliary").mkdir()
    for k, pixels in enumerate(np.random.default_rng(5).integers(0, 256, (20, 8, 8), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "auxiliary" / f"{k}.png")
    return folder


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if isinstance(attack, Learned)])
def test_every_learned_attack_judges_on_every_family(
    kind: str, name: str, models: dict[str, Location], three_roles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantile, "STEPS", 20)  # of a training whose quality is tested elsewhere
    run = Run(
        model=models[kind], images=Location(three_roles), attacks=(name,), captions="text:a cat", batch=8, steps=2
    )  # fmt: skip
    if kind == "ideal" and name.startswith("GSA"):
        with pytest.raises(InputError, match="have no weights"):
            compute.score(run)
        return
    table = scores(plan(run), compute.score(run))
    assert set(table.n) == {1, 2}
    assert {True, False} == set(table.member)
    assert np.isfinite(table.score).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_family_scores_in_every_precision(
    models: dict[str, Location], pictures: Path, kind: str, dtype: str
) -> None:
    run = Run(
        model=models[kind], images=Location(pictures), attacks=tuple(SEARCHES), captions="none", dtype=dtype, batch=6
    )
    signals = compute.score(run)
    exact = compute.score(Run(**(vars(run) | {"dtype": "float32"})))
    for name in SEARCHES:
        rows = signals[name].drop(columns="image")
        assert np.isfinite(rows).all(axis=None)
        assert (rows.dtypes == np.float32).all()
        np.testing.assert_allclose(rows["d(0,1) p=2"], exact[name]["d(0,1) p=2"], rtol=0.3)


def test_the_network_is_that_of_diffusers(pipeline: Path) -> None:
    unet = UNet2DModel.from_pretrained(pipeline / "unet", low_cpu_mem_usage=False).eval()
    x_t = drawn(0, 2, 1, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(load(describe(Location(pipeline)), CPU).eps(x_t, 300), unet(x_t, 300).sample)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [50, 300, 900])
def test_a_prediction_means_the_noise_that_the_scheduler_takes_it_for(
    tmp_path: Path, save_pipeline: Save, predicts: str, t: int
) -> None:
    folder = save_pipeline(tmp_path / "model", prediction_type=predicts, clip_sample=False)
    denoiser = load(describe(Location(folder)), CPU)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    x_t = drawn(0, 2, 1, 8, 8)
    with torch.inference_mode():
        output, eps = denoiser.network(x_t, t).sample, denoiser.eps(x_t, t)
    x_0 = scheduler.step(output, t, x_t).pred_original_sample
    back = scheduler.add_noise(x_0, eps, torch.tensor([t]))  # the picture and the noise make up x_t
    torch.testing.assert_close(back, x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_of_a_learned_variance_only_the_prediction_is_taken(tmp_path: Path, save_pipeline: Save, channels: int) -> None:
    folder = save_pipeline(tmp_path / "model", channels=channels, learned_variance=True)
    denoiser = load(describe(Location(folder)), CPU)
    x_t = drawn(0, 2, channels, 8, 8)
    with torch.inference_mode():
        output = denoiser.network(x_t, 300).sample
        assert output.shape[1] == 2 * channels
        assert torch.equal(denoiser.eps(x_t, 300), output[:, :channels])


def test_weights_saved_in_half_precision_are_used_in_single(
    tmp_path: Path, save_pipeline: Save, pipeline: Path
) -> None:
    half = load(describe(Location(save_pipeline(tmp_path / "half", dtype=torch.half))), CPU)
    saved = load_file(tmp_path / "half" / WEIGHTS)
    assert {weight.dtype for weight in saved.values()} == {torch.half}
    for name, weight in half.network.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, saved[name].float())
    x_t = drawn(0, 2, 1, 8, 8)
    torch.testing.assert_close(
        half.eps(x_t, 300), load(describe(Location(pipeline)), CPU).eps(x_t, 300), rtol=0, atol=0.01
    )


def test_weights_in_parts_are_loaded_whole(tmp_path: Path, pipeline: Path) -> None:
    folder = shutil.copytree(pipeline, tmp_path / "model")
    unet = UNet2DModel.from_pretrained(pipeline / "unet", low_cpu_mem_usage=False)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    loaded = load(describe(Location(folder)), CPU)
    for name, weight in unet.named_parameters():
        assert torch.equal(loaded.network.get_parameter(name), weight)
    sorted((folder / "unet").glob("*.safetensors"))[0].unlink()
    with pytest.raises(InputError, match="is one; copy all of them"):
        load(describe(Location(folder)), CPU)


def test_a_model_is_ready_to_be_asked_and_not_to_be_trained(pipeline: Path) -> None:
    unet = load(describe(Location(pipeline)), CPU).network
    assert not unet.training
    assert not any(weight.requires_grad for weight in unet.parameters())


# Stable Diffusion

CAPTIONS = ["a photo of a cat", "", "A dog, photo of a dog! " * 20]


def scaled_linear(start: float, end: float) -> Tensor:
    """abar_t of the schedule that was published with Stable Diffusion."""
    return torch.cumprod(1 - torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2, 0)


def test_a_latent_is_the_scaled_mode_of_its_posterior(models: dict[str, Location]) -> None:
    for kind in ("stable_diffusion", "dit", "pixart", "sd3"):
        denoiser = load(describe(models[kind]), CPU)
        vae = AutoencoderKL.from_pretrained(f"{models[kind]}/vae", low_cpu_mem_usage=False).eval()
        pixels = random_pixels(denoiser.profile)
        x_0 = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.inference_mode():
            expected = vae.encode(x_0).latent_dist.mode()
            encoded = denoiser.encode(pixels)
        assert vae.config.scaling_factor != 1
        shift = 0.1 if kind == "sd3" else 0  # as tiny.save_sd3 sets it
        torch.testing.assert_close(encoded, (expected - shift) * vae.config.scaling_factor)
        assert torch.equal(denoiser.encode(pixels), encoded)


@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_a_caption_means_to_stable_diffusion_what_its_pipeline_makes_of_it(tmp_path: Path, masked: bool) -> None:
    folder = tiny.save_stable_diffusion(tmp_path / "model", text={"use_attention_mask": masked})
    pipeline = StableDiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    expected, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)
    condition = load(describe(Location(folder)), CPU).condition(CAPTIONS)
    torch.testing.assert_close(condition, expected)
    config = pipeline.text_encoder.config
    config.use_attention_mask = not masked
    assert not torch.allclose(condition, pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)[0])


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("t", [50, 300, 900])
@torch.inference_mode()
def test_a_prediction_of_stable_diffusion_means_the_noise_that_the_scheduler_takes_it_for(
    tmp_path: Path, predicts: str, t: int
) -> None:
    folder = tiny.save_stable_diffusion(tmp_path / "model", prediction_type=predicts)
    denoiser = load(describe(Location(folder)), CPU)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", clip_sample=False)
    assert scheduler.config.prediction_type == predicts
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
    x_t, condition = drawn(0, 3, 4, 4, 4), denoiser.condition(CAPTIONS)
    output, eps = unet(x_t, t, condition).sample, denoiser.eps(x_t, t, condition)
    x_0 = scheduler.step(output, t, x_t).pred_original_sample
    torch.testing.assert_close(scheduler.add_noise(x_0, eps, torch.tensor([t])), x_t, rtol=1e-4, atol=1e-4)
    assert torch.equal(output, eps) == (predicts == "epsilon")
    assert not torch.allclose(eps[0], denoiser.eps(x_t, t, denoiser.condition([""] * 3))[0], rtol=1e-4)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_scheduler_that_steps_differently_has_the_same_noise_levels(tmp_path: Path, offset: int) -> None:
    folder = tiny.save_stable_diffusion(tmp_path / "model", steps_offset=offset, skip_prk_steps=not offset)
    denoiser = load(describe(Location(folder)), CPU)
    expected = scaled_linear(0.00085, 0.012)
    for t in (0, 1, 500, 999):
        assert denoiser.coefficients(t)[0] == pytest.approx(expected[t].sqrt().item(), rel=1e-6)


def test_betas_that_were_listed_one_by_one_are_used(tmp_path: Path) -> None:
    betas = torch.linspace(0.001, 0.03, 1000)
    folder = tiny.save_stable_diffusion(tmp_path / "model", trained_betas=betas.tolist())
    denoiser = load(describe(Location(folder)), CPU)
    expected = torch.cumprod(1 - betas.double(), 0)
    for t in (0, 1, 500, 999):
        assert denoiser.coefficients(t)[0] == pytest.approx(expected[t].sqrt().item(), rel=1e-9)


def test_a_half_precision_variant_is_found_and_used(tmp_path: Path) -> None:
    folder = tiny.save_stable_diffusion(tmp_path / "model", variant="fp16")
    denoiser = load(describe(Location(folder)), CPU)
    for part, file in ((denoiser.network, "unet/diffusion_pytorch_model"), (denoiser.text, "text_encoder/model")):
        assert not (folder / f"{file}.safetensors").exists()
        saved = load_file(folder / f"{file}.fp16.safetensors")
        assert {name for name, _ in part.named_parameters()} <= {*saved}
        assert all(torch.equal(weight, saved[name].float()) for name, weight in part.named_parameters())


@pytest.mark.parametrize("name", ["vae", "text_encoder", "tokenizer", "unet"])
def test_a_part_with_damaged_files_is_refused_in_one_sentence(
    tmp_path: Path, models: dict[str, Location], name: str
) -> None:
    folder = shutil.copytree(models["stable_diffusion"], tmp_path / "model")
    for path in (folder / name).iterdir():
        if path.name == "config.json":
            continue
        if path.suffix == ".safetensors":
            weights = load_file(path)
            save_file(dict([*weights.items()][1:]), path, {"format": "pt"})
        else:
            path.write_bytes(b"{")
    with pytest.raises(InputError) as refusal:
        load(describe(Location(folder)), CPU)
    assert ("tokenizer" if name == "tokenizer" else "do not fit its config.json: missing") in str(refusal.value)
    assert "\n" not in str(refusal.value)


# Transformers


@pytest.mark.parametrize("legacy", [False, True])
@torch.inference_mode()
def test_a_dit_is_that_of_diffusers_without_its_variance(tmp_path: Path, legacy: bool) -> None:
    folder = tiny.save_dit(tmp_path / "model")
    network = DiTTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False).eval()
    if legacy:  # as the published folders name it
        setting("transformer/config.json", _class_name="Transformer2DModel")(folder)
        setting("model_index.json", transformer=["diffusers", "Transformer2DModel"])(folder)
    denoiser = load(describe(Location(folder)), CPU)
    x_t, condition = drawn(0, 3, 4, 4, 4), denoiser.condition(["3", "cat", ""])
    output = network(x_t, torch.full((3,), 300), torch.tensor([3, 7, 10])).sample
    assert output.shape[1] == 8
    torch.testing.assert_close(denoiser.eps(x_t, 300, condition), output[:, :4])


def test_a_class_is_named_by_number_or_word_and_anything_else_is_the_null_class(models: dict[str, Location]) -> None:
    denoiser = load(describe(models["dit"]), CPU)
    captions = ["3", "tench", "Tinca tinca", "cat", "7", "dog", "", "10", "99", "-1", "3.0"]
    assert denoiser.condition(captions).tolist() == [3, 3, 3, 7, 7, 10, 10, 10, 10, 10, 10]
    pipeline = DiTPipeline.from_pretrained(models["dit"], low_cpu_mem_usage=False)
    assert pipeline.get_label_ids(captions[1:4]) == [3, 3, 7]


def test_the_names_of_the_classes_are_part_of_the_model(tmp_path: Path, models: dict[str, Location]) -> None:
    folder = shutil.copytree(models["dit"], tmp_path / "model")
    setting("model_index.json", id2label={"3": "cat", "7": "tench, Tinca tinca"})(folder)
    assert describe(Location(folder)).fingerprint != describe(models["dit"]).fingerprint
    for wrong in (["cat"], {"three": "cat"}, {"3": 5}):
        setting("model_index.json", id2label=wrong)(folder)
        with pytest.raises(InputError, match="id2label"):
            describe(Location(folder))


LARGE = {"use_additional_conditions": True, "attention_head_dim": 12, "cross_attention_dim": 24}


@pytest.mark.parametrize("config", [{}, LARGE, {"legacy": True}], ids=["small", "large", "legacy"])
@torch.inference_mode()
def test_a_pixart_is_that_of_diffusers_without_its_variance(tmp_path: Path, config: dict[str, Any]) -> None:
    config = dict(config)
    legacy = config.pop("legacy", False)
    folder = tiny.save_pixart(tmp_path / "model", **config)
    pipeline = PixArtAlphaPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    network = PixArtTransformer2DModel.from_pretrained(folder / "transformer", low_cpu_mem_usage=False).eval()
    if legacy:
        setting("transformer/config.json", _class_name="Transformer2DModel")(folder)
        setting("model_index.json", transformer=["diffusers", "Transformer2DModel"])(folder)
    denoiser = load(describe(Location(folder)), CPU)
    embeds, mask, *_ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, device="cpu")
    condition = denoiser.condition(CAPTIONS)
    torch.testing.assert_close(condition, (embeds, mask))
    told = {"resolution": None, "aspect_ratio": None}
    if config:
        told = {"resolution": torch.tensor([[8.0, 8.0]] * 3), "aspect_ratio": torch.ones(3, 1)}
    x_t = drawn(0, 3, 4, 4, 4)
    output = network(x_t, embeds, torch.full((3,), 300), told, encoder_attention_mask=mask).sample
    torch.testing.assert_close(denoiser.eps(x_t, 300, condition), output[:, :4])


def test_a_pixart_for_1024_pixels_wants_to_know_the_size_even_if_its_config_does_not_say(
    models: dict[str, Location],
) -> None:
    denoiser = load(describe(models["pixart"]), CPU)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8, "num_layers": 1}
    denoiser.network = PixArtTransformer2DModel(
        sample_size=128, cross_attention_dim=24, caption_channels=8, norm_num_groups=4, **sizes
    )
    told = denoiser.size_of_picture(2)
    assert told["resolution"].tolist() == [[8, 8], [8, 8]]
    assert told["aspect_ratio"].tolist() == [[1], [1]]


@pytest.mark.parametrize("third", [False, True])
@torch.inference_mode()
def test_a_caption_means_to_sd3_what_its_pipeline_makes_of_it(tmp_path: Path, third: bool) -> None:
    folder = tiny.save_sd3(tmp_path / "model", third=third)
    absent = {} if third else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, low_cpu_mem_usage=False, **absent)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompt=CAPTIONS, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, device="cpu"
    )
    denoiser = load(describe(Location(folder)), CPU)
    torch.testing.assert_close(denoiser.condition(CAPTIONS), (embeds, pooled))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_levels_of_a_flow_are_those_of_its_scheduler(tmp_path: Path, shift: float) -> None:
    folder = tiny.save_sd3(tmp_path / "model", shift=shift)
    denoiser = load(describe(Location(folder)), CPU)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    u = np.arange(1, 1001) / 1000
    s = shift * u / (1 + (shift - 1) * u)  # Esser et al. (2024), Eq. 23
    np.testing.assert_allclose(scheduler.sigmas.numpy()[::-1], s, rtol=1e-5)
    found = np.array([denoiser.coefficients(t) for t in range(1000)])
    np.testing.assert_allclose(found, np.stack([1 - s, s], axis=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0, 300, 998])
def test_the_exact_velocity_gives_the_true_noise(tmp_path: Path, models: dict[str, Location], t: int) -> None:
    folder = tiny.save_sd3(tmp_path / "model", shift=3.0)
    denoiser = load(describe(Location(folder)), CPU)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    x_0, noise, asked = drawn(0, 2, 4, 4, 4), drawn(1, 2, 4, 4, 4), []

    def network(x_t: Tensor, embeds: Tensor, pooled: Tensor, time: Tensor) -> SimpleNamespace:
        asked.append(time)
        return SimpleNamespace(sample=noise - x_0)

    denoiser.network = network
    time = scheduler.timesteps[999 - t]
    x_t = scheduler.scale_noise(x_0, time[None], noise)
    torch.testing.assert_close(denoiser.eps(x_t, t, (None, None)), noise, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(asked[0], time.expand(2))


@torch.inference_mode()
def test_sd3_is_that_of_diffusers(models: dict[str, Location]) -> None:
    denoiser = load(describe(models["sd3"]), CPU)
    pipeline = StableDiffusion3Pipeline.from_pretrained(models["sd3"], low_cpu_mem_usage=False)
    x_t, (embeds, pooled) = drawn(0, 3, 4, 4, 4), denoiser.condition(CAPTIONS)
    velocity = pipeline.transformer(x_t, embeds, pooled, torch.full((3,), 301.0)).sample
    torch.testing.assert_close(denoiser.eps(x_t, 300, (embeds, pooled)), x_t + (1 - 0.301) * velocity)


# U-ViT


def uvit_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the public CIFAR-10 checkpoint."""

    def linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}

    def block(name: str) -> dict[str, tuple[int, ...]]:
        found = {f"{name}.{norm}.{part}": (512,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        found |= {f"{name}.attn.qkv.weight": (1536, 512)} | linear(f"{name}.attn.proj", 512, 512)
        return found | linear(f"{name}.mlp.fc1", 2048, 512) | linear(f"{name}.mlp.fc2", 512, 2048)

    shapes = {"pos_embed": (1, 257, 512), "patch_embed.proj.weight": (512, 3, 2, 2), "patch_embed.proj.bias": (512,)}
    for number in range(6):
        shapes |= block(f"in_blocks.{number}") | block(f"out_blocks.{number}")
        shapes |= linear(f"out_blocks.{number}.skip_linear", 512, 1024)
    shapes |= block("mid_block") | {"norm.weight": (512,), "norm.bias": (512,)} | linear("decoder_pred", 12, 512)
    return shapes | {"final_layer.weight": (3, 3, 3, 3), "final_layer.bias": (3,)}


def test_the_public_uvit_checkpoint_would_load_strictly(tmp_path: Path) -> None:
    shapes = uvit_shapes()
    assert len(shapes) == 164
    assert sum(np.prod(shape) for shape in shapes.values()) == 44_255_328
    with torch.device("meta"):
        assert {name: tuple(weight.shape) for name, weight in UVit().state_dict().items()} == shapes
    state = {name: torch.full(shape, number / 1000) for number, (name, shape) in enumerate(shapes.items())}
    torch.save(state, tmp_path / "cifar10.pth")
    assert convert(tmp_path / "cifar10.pth", tmp_path / "model") == "a U-ViT, 44,255,328 parameters, 32 pixels"
    model = describe(Location(tmp_path / "model"))
    assert (model.parameters, model.profile, model.family) == (44_255_328, Profile((32, 32), 3), "uvit")
    saved = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], weight) for name, weight in state.items())
    config = json.loads((tmp_path / "model" / "config.json").read_bytes())
    assert (config["depth"], config["heads"], config["patch_size"], config["width"]) == (12, 8, 2, 512)
    shutil.rmtree(tmp_path)  # 350 MB


def uvit_reference(state: dict[str, Tensor], x: Tensor, time: float, heads: int, patch: int) -> Tensor:
    """U-ViT's forward pass, written from the paper and its published configuration."""
    width = state["pos_embed"].shape[-1]

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return normal * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = (part.split(width // heads, dim=-1) for part in linear(f"{name}.qkv", x).split(width, dim=-1))
        mixed = []
        for head in range(heads):
            weights = (q[head] @ k[head].transpose(1, 2) * (width // heads) ** -0.5).softmax(-1)
            mixed.append(weights @ v[head])
        return linear(f"{name}.proj", torch.cat(mixed, dim=-1))

    def block(name: str, x: Tensor) -> Tensor:
        x = x + attention(f"{name}.attn", norm(f"{name}.norm1", x))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))
        return x + linear(f"{name}.mlp.fc2", hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)

    angles = time * 10_000 ** (-torch.arange(width // 2) / (width // 2))
    clock = torch.cat([angles.cos(), angles.sin()]).expand(len(x), 1, width)
    side = x.shape[-1] // patch
    cut = x.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, C, h, w, p, q)
    tokens = torch.einsum("bchwpq,dcpq->bhwd", cut, state["patch_embed.proj.weight"]).flatten(1, 2)
    h = torch.cat([clock, tokens + state["patch_embed.proj.bias"]], dim=1) + state["pos_embed"]
    depth = len({name.split(".")[1] for name in state if name.startswith("in_blocks.")})
    kept = []
    for number in range(depth):
        h = block(f"in_blocks.{number}", h)
        kept.append(h)
    h = block("mid_block", h)
    for number in range(depth):
        h = block(f"out_blocks.{number}", linear(f"out_blocks.{number}.skip_linear", torch.cat([h, kept.pop()], -1)))
    patches = linear("decoder_pred", norm("norm", h))[:, 1:]
    picture = torch.zeros_like(x)
    for place in range(side**2):
        top, left = place // side * patch, place % side * patch
        cell = patches[:, place].reshape(len(x), patch, patch, -1)
        picture[:, :, top : top + patch, left : left + patch] = cell.permute(0, 3, 1, 2)
    return F.conv2d(picture, state["final_layer.weight"], state["final_layer.bias"], padding=1)


@pytest.mark.parametrize("config", [{}, {"in_channels": 3, "depth": 4, "width": 24, "heads": 3, "patch_size": 4}])
@torch.inference_mode()
def test_a_uvit_computes_what_its_paper_says(tmp_path: Path, config: dict[str, int]) -> None:
    folder = tiny.save_uvit(tmp_path / "model", **config)
    denoiser = load(describe(Location(folder)), CPU)
    state = denoiser.network.state_dict()
    x_t = drawn(0, 2, config.get("in_channels", 1), 8, 8)
    for t in (0, 1, 500, 999):
        expected = uvit_reference(state, x_t, 999 * t / 1000, config.get("heads", 2), config.get("patch_size", 2))
        torch.testing.assert_close(denoiser.eps(x_t, t), expected, rtol=1e-5, atol=1e-5)


def test_a_uvit_lives_in_continuous_time(models: dict[str, Location]) -> None:
    denoiser, asked = load(describe(models["uvit"]), CPU), []
    assert denoiser.timesteps == 1000
    for t in range(1000):
        alpha, sigma = denoiser.coefficients(t)
        abar = np.exp(-(0.1 * (t / 1000) + 9.95 * (t / 1000) ** 2))
        assert (alpha, sigma) == pytest.approx((abar**0.5, (1 - abar) ** 0.5), rel=1e-12)
    denoiser.network = lambda x_t, time: asked.append(time.tolist()) or x_t
    for t in (0, 1, 500, 999):
        denoiser.eps(drawn(0, 2, 1, 8, 8), t)
    np.testing.assert_allclose(asked, [[0, 0], [0.999] * 2, [499.5] * 2, [998.001] * 2], rtol=1e-6)


# Models and pictures of different kinds


def test_a_colour_model_takes_grey_pictures_and_a_grey_model_colour(
    tmp_path: Path, save_pipeline: Save, pipeline: Path, pictures: Path, colour_pictures: Path
) -> None:
    colour = save_pipeline(tmp_path / "colour", channels=3)
    for model, images in ((colour, pictures), (pipeline, colour_pictures)):
        run = Run(model=Location(model), images=Location(images), batch=6)
        table = scores(plan(run), compute.score(run))
        assert len(table) == 12 * 5 * 3
        assert np.isfinite(table.score).all()


def test_a_grey_latent_model_takes_colour_pictures_and_the_reverse(
    tmp_path: Path, models: dict[str, Location], pictures: Path, colour_pictures: Path
) -> None:
    grey = Location(tiny.save_stable_diffusion(tmp_path / "grey", channels=1))
    assert describe(grey).profile == Profile((8, 8), 1)
    for model, images in ((grey, colour_pictures), (models["stable_diffusion"], pictures)):
        run = Run(model=model, images=Location(images), attacks=("PIA",), captions="none", batch=6)
        table = scores(plan(run), compute.score(run))
        assert len(table) == 12 * 3
        assert np.isfinite(table.score).all()


def test_a_grey_picture_is_to_a_colour_model_what_its_repetition_in_colour_is(
    tmp_path: Path, save_pipeline: Save, pictures: Path
) -> None:
    from PIL import Image

    for path in sorted(pictures.rglob("*.png")):
        copy = tmp_path / "repeated" / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(copy)
    model = Location(save_pipeline(tmp_path / "colour", channels=3))
    grey, repeated = (
        compute.score(Run(model=model, images=Location(images), attacks=("PIA",), batch=6))["PIA"].drop(columns="image")
        for images in (pictures, tmp_path / "repeated")
    )
    pd.testing.assert_frame_equal(grey, repeated, check_exact=True)


# Weights and settings that must be refused


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def setting(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_bytes())
        (folder / file).write_text(json.dumps(config | values))

    return change


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {key: weight for key, weight in weights.items() if key != name}


INPUT = "conv_in.weight"
REFUSED = {
    "a wrong shape": (tensors(lambda weights: weights | {INPUT: torch.zeros(8, 2, 3, 3)}), INPUT),
    "a missing tensor": (tensors(without(INPUT)), f"missing {INPUT}"),
    "a tensor too many": (tensors(lambda weights: weights | {"extra": torch.zeros(3)}), "unexpected extra"),
    "not a number": (tensors(lambda weights: weights | {INPUT: weights[INPUT] * np.nan}), f"not finite ({INPUT})"),
    "infinity": (tensors(lambda weights: weights | {INPUT: weights[INPUT] / 0}), f"not finite ({INPUT})"),
    "weights that overflow": (
        tensors(lambda weights: {key: weight + 1e30 for key, weight in weights.items()}),
        "no finite noise",
    ),
    "an unknown prediction": (setting(SCHEDULER, prediction_type="banana"), "predicts 'banana'"),
    "a flow on a schedule without one": (setting(SCHEDULER, prediction_type="flow_prediction"), "'flow_prediction'"),
    "an unknown schedule": (setting(SCHEDULER, beta_schedule="banana"), "scheduler's config cannot be used: banana"),
    "a schedule in words": (setting(SCHEDULER, beta_start="0.1"), "has beta_start '0.1'; a number of -1e+06 to 1e+06"),
    "noise beyond all": (setting(SCHEDULER, beta_end=5), "no noise levels between 0 and 1"),
    "no noise at all": (setting(SCHEDULER, beta_start=0.0), "no noise levels between 0 and 1"),
    "a schedule of another length": (setting(SCHEDULER, trained_betas=[0.1, 0.2]), "no noise levels"),
    "10^6 channels within": (setting(NETWORK, block_out_channels=[10**6, 10**6]), "each a side of one of its tensors"),
    "10^18 channels within": (setting(NETWORK, block_out_channels=[10**18, 10**18]), "is beyond all bounds"),
    "a size that cannot be halved": (setting(NETWORK, sample_size=9), "cannot take pictures of its own sample_size"),
    "an unknown block": (setting(NETWORK, down_block_types=["MyBlock", "MyBlock"]), "MyBlock"),
    "an unknown activation": (setting(NETWORK, act_fn="banana"), "banana"),
    "no groups": (setting(NETWORK, norm_num_groups=0), "has norm_num_groups 0"),
    "blocks wider than the weights": (setting(NETWORK, block_out_channels=[16, 8]), "do not fit its config.json"),
    "a quantisation that runs code": (setting(NETWORK, quantization_config={"quant_method": "x"}), "quantization"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_what_it_says_is_refused_in_one_sentence(tmp_path: Path, pipeline: Path, name: str) -> None:
    folder = shutil.copytree(pipeline, tmp_path / "model")
    change, expected = REFUSED[name]
    change(folder)
    with pytest.raises(InputError) as refusal:
        load(describe(Location(folder)), CPU)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_no_pickle_is_ever_opened(tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", forbidden)
    folder = shutil.copytree(pipeline, tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch sentinel'\ntR.")
    monkeypatch.chdir(tmp_path)
    load(describe(Location(folder)), CPU)  # the safetensors beside it are used
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="pickles are never loaded"):
        load(describe(Location(folder)), CPU)
    assert not (tmp_path / "sentinel").exists()


# Keeping models, and adding a family


def test_at_most_two_models_stay_in_memory(tmp_path: Path, save_pipeline: Save, pictures: Path) -> None:
    compute.loaded.cache_clear()
    kept = []
    for number in range(3):
        folder = save_pipeline(tmp_path / str(number), beta_end=0.02 + number / 1000)
        compute.score(Run(model=Location(folder), images=Location(pictures), attacks=("PIA",), batch=6))
        kept.append(weakref.ref(compute.loaded(describe(Location(folder)), CPU).network))
    gc.collect()
    assert [model() is not None for model in kept] == [False, True, True]
    compute.loaded.cache_clear()


TOY = '''
import torch
from oms_core.families.base import Diffused

class Toy(Diffused):
    """Shrinks every picture towards grey."""
    def eps(self, x_t, t, condition=None):
        alpha_t, sigma_t = self.coefficients(t)
        return (x_t - alpha_t * 0.9 * torch.tanh(x_t)) / sigma_t

load = Toy
'''


def test_a_family_is_added_by_one_short_file(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(TOY.splitlines()) < 25
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.setattr(oms_core.families, "__path__", [*oms_core.families.__path__, str(tmp_path)])
    model = Model("toy", "toy", "0" * 64, Profile((8, 8), 1), 1000, schedule=catalog.DEFAULT_SCHEDULE)
    monkeypatch.setattr(catalog, "describe", lambda name: model)
    run = Run(model="toy", images=Location(pictures), attacks=tuple(SEARCHES), batch=6)
    table = scores(plan(run), compute.score(run))
    assert len(table) == 12 * len(SEARCHES) * 3
    assert np.isfinite(table.score).all()
