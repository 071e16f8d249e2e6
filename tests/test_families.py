"""One contract for every family of models and every attack, and the weights that must be refused."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import oms_core.families
from oms_core import catalog, compute
from oms_core.attacks import ATTACKS, Probe
from oms_core.catalog import Model, describe
from oms_core.decode import Profile
from oms_core.denoiser import Denoiser
from oms_core.device import DTYPES, Placement
from oms_core.errors import InputError
from oms_core.families import FAMILIES, load
from oms_core.run import Run, columns, plan, scores
from oms_core.search import fixed_point

Save = Callable[..., Path]
CPU = Placement("cpu", "float32")
NETWORK, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def members_of_each_family(pipeline: Path, pictures: Path) -> dict[str, str]:
    """A model of every family, by family; a new family needs a line here."""
    return {"ddpm": str(pipeline), "ideal": f"ideal:{pictures}"}


def test_every_family_is_tried(members_of_each_family: dict[str, str]) -> None:
    assert {name: describe(model).family for name, model in members_of_each_family.items()} == {f: f for f in FAMILIES}


# The contract


@pytest.fixture(params=FAMILIES)
def denoiser(request: pytest.FixtureRequest, members_of_each_family: dict[str, str]) -> Denoiser:
    return load(describe(members_of_each_family[request.param]), CPU)


def random_pixels(profile: Profile, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *profile.size, profile.channels), np.uint8)


def test_a_denoiser_says_what_its_description_says(members_of_each_family: dict[str, str]) -> None:
    for name in members_of_each_family.values():
        model = describe(name)
        loaded = load(model, CPU)
        assert loaded.fingerprint == model.fingerprint
        assert (loaded.profile, loaded.timesteps) == (model.profile, model.timesteps)


def test_pixels_are_encoded_from_minus_one_to_one(denoiser: Denoiser) -> None:
    pixels = random_pixels(denoiser.profile)
    x_0 = denoiser.encode(pixels)
    assert x_0.shape == (3, denoiser.profile.channels, *denoiser.profile.size)
    expected = pixels.transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(x_0.numpy(), expected, atol=1e-6)


def test_coefficients_preserve_variance_and_fall_and_rise(denoiser: Denoiser) -> None:
    alphas, sigmas = np.array([denoiser.coefficients(t) for t in range(denoiser.timesteps)]).T
    np.testing.assert_allclose(alphas**2 + sigmas**2, 1, rtol=1e-14)
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


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_works_on_every_family(denoiser: Denoiser, name: str) -> None:
    x_0 = denoiser.encode(random_pixels(denoiser.profile))
    probe = Probe(denoiser, x_0, denoiser.condition(["", "", ""]), drawn(0, *x_0.shape))
    given, f = ATTACKS[name].search(probe, ATTACKS[name].t)
    with torch.inference_mode():
        trajectory = fixed_point(f, given, 3)
    for n in (1, 2, 3):
        distance = trajectory.distance(0, n, ATTACKS[name].p)
        assert distance.shape == (3,)
        assert distance.isfinite().all()
        assert (distance > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_in_every_precision(
    members_of_each_family: dict[str, str], pictures: Path, family: str, dtype: str
) -> None:
    run = Run(model=members_of_each_family[family], images=str(pictures), attacks=tuple(ATTACKS), dtype=dtype, batch=6)
    signals = compute.score(run)
    exact = compute.score(Run(**(vars(run) | {"dtype": "float32"})))
    for name in ATTACKS:
        rows = signals[name][columns(3)[1:]]
        assert np.isfinite(rows).all(axis=None)
        assert (rows.dtypes == np.float32).all()
        np.testing.assert_allclose(rows["d(0,1) p=2"], exact[name]["d(0,1) p=2"], rtol=0.1)


def test_the_network_is_that_of_diffusers(pipeline: Path) -> None:
    unet = UNet2DModel.from_pretrained(pipeline / "unet", low_cpu_mem_usage=False).eval()
    x_t = drawn(0, 2, 1, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(load(describe(str(pipeline)), CPU).eps(x_t, 300), unet(x_t, 300).sample)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("t", [50, 300, 900])
def test_a_prediction_means_the_noise_that_the_scheduler_takes_it_for(
    tmp_path: Path, save_pipeline: Save, predicts: str, t: int
) -> None:
    folder = save_pipeline(tmp_path / "model", prediction_type=predicts, clip_sample=False)
    denoiser = load(describe(str(folder)), CPU)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    x_t = drawn(0, 2, 1, 8, 8)
    with torch.inference_mode():
        output, eps = denoiser.unet(x_t, t).sample, denoiser.eps(x_t, t)
    x_0 = scheduler.step(output, t, x_t).pred_original_sample
    back = scheduler.add_noise(x_0, eps, torch.tensor([t]))  # the picture and the noise make up x_t
    torch.testing.assert_close(back, x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_of_a_learned_variance_only_the_prediction_is_taken(tmp_path: Path, save_pipeline: Save, channels: int) -> None:
    folder = save_pipeline(tmp_path / "model", channels=channels, learned_variance=True)
    denoiser = load(describe(str(folder)), CPU)
    x_t = drawn(0, 2, channels, 8, 8)
    with torch.inference_mode():
        output = denoiser.unet(x_t, 300).sample
        assert output.shape[1] == 2 * channels
        assert torch.equal(denoiser.eps(x_t, 300), output[:, :channels])


def test_weights_saved_in_half_precision_are_used_in_single(
    tmp_path: Path, save_pipeline: Save, pipeline: Path
) -> None:
    half = load(describe(str(save_pipeline(tmp_path / "half", dtype=torch.half))), CPU)
    saved = load_file(tmp_path / "half" / WEIGHTS)
    assert {weight.dtype for weight in saved.values()} == {torch.half}
    for name, weight in half.unet.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, saved[name].float())
    x_t = drawn(0, 2, 1, 8, 8)
    torch.testing.assert_close(half.eps(x_t, 300), load(describe(str(pipeline)), CPU).eps(x_t, 300), rtol=0, atol=0.01)


def test_weights_in_parts_are_loaded_whole(tmp_path: Path, pipeline: Path) -> None:
    folder = shutil.copytree(pipeline, tmp_path / "model")
    unet = UNet2DModel.from_pretrained(pipeline / "unet", low_cpu_mem_usage=False)
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="50KB")
    loaded = load(describe(str(folder)), CPU)
    for name, weight in unet.named_parameters():
        assert torch.equal(loaded.unet.get_parameter(name), weight)
    sorted((folder / "unet").glob("*.safetensors"))[0].unlink()
    with pytest.raises(InputError, match="do not fit its config"):
        load(describe(str(folder)), CPU)


def test_a_model_is_ready_to_be_asked_and_not_to_be_trained(pipeline: Path) -> None:
    unet = load(describe(str(pipeline)), CPU).unet
    assert not unet.training
    assert not any(weight.requires_grad for weight in unet.parameters())


# Models and pictures of different kinds


def test_a_colour_model_takes_grey_pictures_and_a_grey_model_colour(
    tmp_path: Path, save_pipeline: Save, pipeline: Path, pictures: Path, colour_pictures: Path
) -> None:
    colour = save_pipeline(tmp_path / "colour", channels=3)
    for model, images in ((colour, pictures), (pipeline, colour_pictures)):
        run = Run(model=str(model), images=str(images), batch=6)
        table = scores(plan(run), compute.score(run))
        assert len(table) == 12 * 5 * 3
        assert np.isfinite(table.score).all()


def test_a_grey_picture_is_to_a_colour_model_what_its_repetition_in_colour_is(
    tmp_path: Path, save_pipeline: Save, pictures: Path
) -> None:
    from PIL import Image

    for path in sorted(pictures.rglob("*.png")):
        copy = tmp_path / "repeated" / path.relative_to(pictures)
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).convert("RGB").save(copy)
    model = str(save_pipeline(tmp_path / "colour", channels=3))
    grey, repeated = (
        compute.score(Run(model=model, images=str(images), attacks=("PIA",), batch=6))["PIA"][columns(3)[1:]]
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
    "a schedule in words": (setting(SCHEDULER, beta_start="0.1"), "scheduler's config cannot be used"),
    "noise beyond all": (setting(SCHEDULER, beta_end=5), "no noise levels between 0 and 1"),
    "no noise at all": (setting(SCHEDULER, beta_start=0.0), "no noise levels between 0 and 1"),
    "a schedule of another length": (setting(SCHEDULER, trained_betas=[0.1, 0.2]), "no noise levels"),
    "10^6 channels within": (setting(NETWORK, block_out_channels=[10**6, 10**6]), "it asks for 274,"),
    "10^18 channels within": (setting(NETWORK, block_out_channels=[10**18, 10**18]), "do not fit its config.json"),
    "a size that cannot be halved": (setting(NETWORK, sample_size=9), "cannot take pictures of its own sample_size"),
    "an unknown block": (setting(NETWORK, down_block_types=["MyBlock", "MyBlock"]), "MyBlock"),
    "an unknown activation": (setting(NETWORK, act_fn="banana"), "banana"),
    "no groups": (setting(NETWORK, norm_num_groups=0), "do not fit its config.json"),
    "a quantisation that runs code": (setting(NETWORK, quantization_config={"quant_method": "x"}), "quantization"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_what_it_says_is_refused_in_one_sentence(tmp_path: Path, pipeline: Path, name: str) -> None:
    folder = shutil.copytree(pipeline, tmp_path / "model")
    change, expected = REFUSED[name]
    change(folder)
    with pytest.raises(InputError) as refusal:
        load(describe(str(folder)), CPU)
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_no_pickle_is_ever_opened(tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", forbidden)
    folder = shutil.copytree(pipeline, tmp_path / "model")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch sentinel'\ntR.")
    monkeypatch.chdir(tmp_path)
    load(describe(str(folder)), CPU)  # the safetensors beside it are used
    (folder / WEIGHTS).unlink()
    with pytest.raises(InputError, match="never pickles"):
        load(describe(str(folder)), CPU)
    assert not (tmp_path / "sentinel").exists()


# Keeping models, and adding a family


def test_at_most_two_models_stay_in_memory(tmp_path: Path, save_pipeline: Save, pictures: Path) -> None:
    compute.loaded.cache_clear()
    kept = []
    for number in range(3):
        folder = save_pipeline(tmp_path / str(number), beta_end=0.02 + number / 1000)
        compute.score(Run(model=str(folder), images=str(pictures), attacks=("PIA",), batch=6))
        kept.append(weakref.ref(compute.loaded(describe(str(folder)), CPU).unet))
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
    run = Run(model="toy", images=str(pictures), attacks=tuple(ATTACKS), batch=6)
    table = scores(plan(run), compute.score(run))
    assert len(table) == 12 * len(ATTACKS) * 3
    assert np.isfinite(table.score).all()
