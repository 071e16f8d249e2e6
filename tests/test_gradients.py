"""Gradients of single pictures: what autograd says of one at a time, for every layer and family; and the attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oms_core import gradients
from oms_core.attacks.base import Learned, Probe, Study, learned_column
from oms_core.attacks.gsa import GSA, GSA_LAST, SHARE
from oms_core.catalog import describe
from oms_core.denoiser import Denoiser
from oms_core.device import Placement
from oms_core.errors import InputError
from oms_core.families import load
from oms_core.gradients import gradient_norms, product
from oms_core.location import Location
from oms_core.metrics import auc


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def alone(network: nn.Module, loss: Tensor) -> Tensor:
    """The norm of the gradient of one loss by each parameter, from autograd, (K,)."""
    found = torch.autograd.grad(loss, [*network.parameters()], allow_unused=True, retain_graph=True)
    return torch.stack([torch.zeros(()) if g is None else g.float().norm() for g in found])


def assert_exact(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Both (B, K); equal up to a part of each picture's largest norm."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= tolerance * expected.amax(dim=1, keepdim=True)).all()


def loss_of(network: nn.Module, x: Tensor) -> Tensor:
    """A number for each picture, (B,)."""
    y = network(x)
    return (y - drawn(1, *y.shape[1:])).square().flatten(1).mean(dim=1)


def assert_exact_on(network: nn.Module, x: Tensor) -> None:
    tiny.seeded(network)
    expected = torch.stack([alone(network, loss_of(network, one[None]).sum()) for one in x])
    (found,) = gradient_norms(network, len(x), lambda: [loss_of(network, x)])
    assert_exact(found, expected, 1e-5)


# Layer by layer

LAYERS = {
    "a linear layer": (nn.Linear(5, 3), (5,)),
    "few positions": (nn.Linear(30, 20), (2, 30)),
    "many positions": (nn.Linear(3, 2, bias=False), (4, 10, 3)),
    "a wide convolution": (nn.Conv2d(20, 16, 3, padding=1), (20, 3, 3)),
    "a narrow convolution": (nn.Conv2d(2, 3, 3, padding=1), (2, 9, 8)),
    "a narrow convolution of one pixel": (nn.Conv2d(2, 3, 1, bias=False), (2, 9, 8)),
    "a wide convolution of one pixel": (nn.Conv2d(20, 30, 1), (20, 3, 2)),
    "a narrow convolution that strides": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 9, 8)),
    "a wide convolution that strides": (nn.Conv2d(20, 30, 3, stride=2), (20, 6, 7)),
    "patches": (nn.Conv2d(3, 4, 2, stride=2), (3, 7, 6)),
    "different each way": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 9, 8)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "a border that goes round": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "a border in words": (nn.Conv2d(2, 3, 3, padding="same"), (2, 5, 5)),
    "a group norm": (nn.GroupNorm(2, 8), (8, 5, 4)),
    "a group norm of rows": (nn.GroupNorm(4, 8), (8, 5)),
    "a group norm of numbers": (nn.GroupNorm(2, 8), (8,)),
    "a layer norm": (nn.LayerNorm(6), (5, 6)),
    "a layer norm of one row": (nn.LayerNorm(6), (6,)),
    "a layer norm over two axes": (nn.LayerNorm((5, 6), bias=False), (3, 5, 6)),
    "another norm": (nn.RMSNorm(6), (5, 6)),
    "layers without weights": (nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)), (5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_the_gradients_of_autograd(name: str) -> None:
    layer, shape = LAYERS[name]
    assert_exact_on(layer, drawn(0, 4, *shape))


@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding_has_the_gradients_of_autograd(padding: int | None) -> None:
    words = torch.tensor([[0, 1, 2, 2], [3, 3, 3, 3], [0, 4, 2, 1]])
    assert_exact_on(nn.Embedding(5, 3, padding_idx=padding), words)


@pytest.mark.parametrize(("positions", "inputs", "outputs"), [(3, 20, 30), (50, 2, 3)])
@pytest.mark.parametrize("shifts", [(0,), (0, 1, 4, 5)])
def test_both_forms_of_the_product_are_its_definition(
    positions: int, inputs: int, outputs: int, shifts: Sequence[int]
) -> None:
    a, g = drawn(0, 2, positions + shifts[-1], inputs), drawn(1, 2, positions + shifts[-1], outputs)
    g[:, positions:] = 0
    weight = torch.zeros(2, len(shifts), outputs, inputs)
    for place, s in enumerate(shifts):
        for p in range(positions):
            weight[:, place] += g[:, p, :, None] * a[:, p + s, None]
    torch.testing.assert_close(product(a, g, shifts), weight.flatten(1).norm(dim=1), rtol=1e-5, atol=1e-5)


class Loose(nn.Module):
    """Parameters outside of layers, used in the ways of transformers and in some others."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, 4, 6))
        self.shifts = nn.Parameter(torch.zeros(2, 6))
        self.matrix = nn.Parameter(torch.zeros(6, 6))
        self.unused = nn.Parameter(torch.zeros(3))
        self.first, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        assert (self.shifts.shape, self.shifts.dtype, self.shifts.stride()) == ((2, 6), x.dtype, (6, 1))
        x = self.first(x) + self.positions
        shift, scale = (self.shifts[None] + x[:, :2]).chunk(2, dim=1)
        x = x * (1 + scale) + shift
        other, again = self.shifts.exp().unbind()
        x = torch.cat([x, x * other + again.float()], dim=1) @ self.matrix
        return F.layer_norm(x, (6,), weight=self.shifts[1])


def test_a_parameter_outside_of_layers_has_the_gradients_of_autograd() -> None:
    assert_exact_on(Loose(), drawn(0, 3, 4, 6))


class Rows(nn.Module):
    """Two rows of each picture side by side along the first axis, as a layer that knows nothing of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5))
        self.scale = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x.flatten(0, 1)) * self.scale).unflatten(0, (-1, 2))


def test_a_picture_may_have_several_rows() -> None:
    assert_exact_on(Rows(), drawn(0, 3, 2, 6))


def test_pictures_along_another_axis_are_refused() -> None:
    network = nn.Linear(5, 2)
    with pytest.raises(RuntimeError, match="unflatten"):
        gradient_norms(network, 3, lambda: [network(drawn(0, 4, 3, 5)).square().sum(dim=(0, 2))])


def test_several_calls_of_a_layer_add_up_and_a_loss_sees_only_its_own() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 3, padding=1))
    tiny.seeded(network)
    x = drawn(0, 4, 3, 5, 5)

    def losses(x: Tensor) -> list[Tensor]:
        once = network(x)
        return [once.square().flatten(1).sum(1), network(once).square().flatten(1).sum(1)]

    found = gradient_norms(network, 4, lambda: losses(x))
    expected = [torch.stack([alone(network, loss) for loss in losses(one[None])]) for one in x]
    assert_exact(torch.stack(found, dim=1).flatten(0, 1), torch.cat(expected), 1e-5)


def test_memory_is_bounded_by_taking_fewer_pictures_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = tiny.seeded(nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3))), drawn(0, 5, 2, 6, 6)
    sizes = []
    monkeypatch.setitem(
        gradients.RULES, nn.Conv2d, lambda layer, a, g: sizes.append(len(a)) or gradients.convolution(layer, a, g)
    )
    whole = gradient_norms(network, 5, lambda: [loss_of(network, x)])
    monkeypatch.setattr(gradients, "CHUNK", 500)
    assert_exact(*gradient_norms(network, 5, lambda: [loss_of(network, x)]), *whole, 1e-6)
    assert sizes[0] == sum(sizes[1:]) == 5
    assert max(sizes[1:]) < 5


def test_half_precision_loses_no_small_gradient() -> None:
    network, x = tiny.seeded(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))), drawn(0, 3, 6)
    (exact,) = gradient_norms(network, 3, lambda: [1e-6 * loss_of(network, x)])
    network.half()
    (found,) = gradient_norms(network, 3, lambda: [1e-6 * loss_of(network, x.half())])
    assert_exact(found, exact, 0.01)


def test_the_network_is_left_as_it_was() -> None:
    network = tiny.seeded(Loose())
    network.matrix.requires_grad_(False)
    before = {name: (id(one), one.requires_grad, one._version) for name, one in network.named_parameters()}

    def fail() -> list[Tensor]:
        network(drawn(0, 3, 4, 6))
        raise ArithmeticError

    gradient_norms(network, 3, lambda: [loss_of(network, drawn(0, 3, 4, 6))])
    with pytest.raises(ArithmeticError):
        gradient_norms(network, 3, fail)
    assert {name: (id(one), one.requires_grad, one._version) for name, one in network.named_parameters()} == before
    assert all(one.grad is None for one in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


# Every family

KINDS = ("ddpm", "uvit", "stable_diffusion", "dit", "pixart", "sd3")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, pipeline: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    saved = {kind: getattr(tiny, f"save_{kind}")(folder / kind) for kind in KINDS[1:]}
    return {"ddpm": pipeline, **saved}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def loaded(folder: Path, dtype: str = "float32") -> Denoiser:
    return load(describe(Location(folder)), Placement("cpu", dtype))


@pytest.fixture(scope="module")
def denoiser(kind: str, models: dict[str, Path]) -> Denoiser:
    return loaded(models[kind])


@torch.no_grad()
def probe(denoiser: Denoiser, chosen: Sequence[int] = (0, 1, 2)) -> Probe:
    """Some of three pictures before a model, each with its own caption and noise."""
    profile = denoiser.profile
    pixels = np.random.default_rng(0).integers(0, 256, (3, *profile.size, profile.channels), np.uint8)
    x_0 = denoiser.encode(pixels)
    noise, captions = drawn(0, *x_0.shape).to(x_0), ["a cat", "", "3"]
    condition = denoiser.condition([captions[k] for k in chosen])
    return Probe(denoiser, x_0[[*chosen]], condition, lambda k: noise[[*chosen]])


def features(attack: Learned, on: Probe, t: int) -> list[Tensor]:
    """What the attack measures at one timestep, for n = 1 and 2, each (B, tensors)."""
    return gradient_norms(on.denoiser.network, len(on.x_0), lambda: attack.base.losses(on, t, 2))


def expected_features(attack: Learned, denoiser: Denoiser, t: int) -> list[Tensor]:
    """The same by the definition, one picture at a time."""
    network = denoiser.network.requires_grad_(True)
    alpha, sigma = denoiser.coefficients(t)
    rows = []
    for one in (probe(denoiser, [k]) for k in range(3)):
        first = denoiser.eps(alpha * one.x_0 + sigma * one.noise, t, one.condition)
        before = first if attack is GSA else first.detach()
        second = denoiser.eps(alpha * one.x_0 + sigma * before, t, one.condition)
        rows.append([alone(network, F.mse_loss(eps.float(), one.noise.float())) for eps in (first, second)])
    network.requires_grad_(False)
    return [torch.stack(norms) for norms in zip(*rows, strict=True)]


@pytest.mark.parametrize("t", [0, 300, 900])
@pytest.mark.parametrize("attack", [GSA, GSA_LAST], ids=["through both", "through the last"])
def test_the_features_of_every_family_are_those_of_one_picture_at_a_time(
    denoiser: Denoiser, attack: Learned, t: int
) -> None:
    found, expected = features(attack, probe(denoiser), t), expected_features(attack, denoiser, t)
    for n in (0, 1):
        assert_exact(found[n], expected[n])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.1)])
def test_half_precision_is_as_exact_as_it_can_be(
    models: dict[str, Path], kind: str, dtype: str, tolerance: float
) -> None:
    denoiser = loaded(models[kind], dtype)
    assert_exact(features(GSA, probe(denoiser), 300)[0], expected_features(GSA, denoiser, 300)[0], tolerance)


def test_the_features_of_a_picture_do_not_depend_on_its_company(denoiser: Denoiser) -> None:
    found, turned = (features(GSA, probe(denoiser, order), 300)[1] for order in ([0, 1, 2], [0, 2, 1]))
    assert torch.equal(found[0], turned[0])
    assert_exact(found[[0, 2, 1]], turned, 1e-5)


# The attack


@torch.no_grad()
def test_ten_timesteps_make_the_features_and_ten_calls_each_step(models: dict[str, Path]) -> None:
    denoiser = loaded(models["uvit"])
    for n in (1, 2, 3):
        on = probe(denoiser)
        found = GSA.base.measure(on, 0, n)
        assert on.calls == GSA.calls_at(0, min(n, 2)) == GSA.base.calls_at(0, min(n, 2))
        assert [*found] == GSA.base.columns(n)
    by_timestep = zip(*(features(GSA, on, t) for t in range(0, 1000, 100)), strict=True)
    for norms, together in zip(by_timestep, found.values(), strict=True):
        assert torch.equal(torch.cat(norms, dim=1), together)


def test_a_model_without_weights_is_refused_in_one_sentence(pictures: Path) -> None:
    ideal = load(describe(Location(f"ideal:{pictures}")), Placement("cpu", "float32"))
    with pytest.raises(InputError, match=r"^A gradient-based attack needs .* have no weights\.$"):
        GSA.base.measure(probe(ideal), 0, 2)


def test_norms_are_no_score() -> None:
    with pytest.raises(TypeError, match="GSA-gradients"):
        GSA.base.score(pd.DataFrame(), 1)


def study(each: int, shift: float, steps: int = 2) -> Study:
    """As many members as non-members; of thirty norms a few are smaller by e^shift for members, all with n."""
    rng, member = np.random.default_rng(0), np.arange(2 * each) % 2 == 0
    rows = pd.DataFrame({"image": [f"{k}" for k in range(2 * each)]})
    for n in range(1, steps + 1):
        logs = rng.normal(size=(2 * each, 30))
        logs[:, :3] -= n * shift * member[:, None]
        rows[f"gradients n={n}"] = [numbers.tobytes() for numbers in np.exp(logs).astype(np.float32)]
    return Study(rows, member, pd.DataFrame(), unused, steps, 0, unused, 0)


def unused(_: object) -> None:
    """What the attack does not look at."""
    raise AssertionError


def test_members_with_smaller_gradients_are_found() -> None:
    whole = study(200, 1.0)
    found = GSA.fit(whole)
    judged = whole.member[found.index]
    areas = [auc(GSA.score(found, n), judged) for n in (1, 2)]
    assert 0.75 < areas[0] < areas[1]
    by_chance = study(200, 0.0)
    assert auc(GSA.score(GSA.fit(by_chance), 1), judged) == pytest.approx(0.5, abs=0.12)


def test_the_score_is_in_log_odds() -> None:
    whole = study(2000, 0.3, 1)
    found = GSA.fit(whole)
    score, judged = GSA.score(found, 1), whole.member[found.index]
    assert (score > 0)[judged].mean() > 0.5 > (score > 0)[~judged].mean()


def test_a_labelled_picture_is_never_judged() -> None:
    whole = study(40, 1.0)
    found = GSA.fit(whole)
    assert {*found.image} == {*whole.rows.image[~whole.labelled(SHARE)]}
    assert [*found] == ["image", *(learned_column("score", n) for n in (1, 2))] == ["image", *GSA.columns(3)]


def test_there_is_one_more_step_and_no_further() -> None:
    whole = study(20, 1.0)
    pd.testing.assert_frame_equal(GSA.fit(replace(whole, steps=3)), GSA.fit(whole), check_exact=True)


def test_who_is_judged_is_not_learned_from() -> None:
    whole = study(40, 1.0)
    found = GSA.fit(whole)
    others = ~whole.labelled(SHARE)
    changed = whole.rows.copy()
    first = changed.index[others][0]
    changed["gradients n=1"] = changed["gradients n=1"].where(~others, changed["gradients n=1"][first])
    again = GSA.fit(replace(whole, rows=changed))
    assert (again.set_index("image")[learned_column("score", 1)] == GSA.score(found, 1)[0]).all()


def test_a_seed_decides_a_fit() -> None:
    whole = study(60, 0.5)
    found = GSA.fit(whole)
    pd.testing.assert_frame_equal(GSA.fit(whole), found, check_exact=True)
    assert {*GSA.fit(replace(whole, seed=1)).image} != {*found.image}


def test_a_gradient_of_zero_or_infinity_spoils_nothing() -> None:
    whole = study(40, 1.0, 1)
    numbers = np.stack([np.frombuffer(row, np.float32) for row in whole.rows["gradients n=1"]])
    numbers[:, 5], numbers[::7, 6], numbers[1::7, 7] = 0, np.inf, np.nan
    rows = whole.rows.assign(**{"gradients n=1": [row.tobytes() for row in numbers]})
    assert np.isfinite(GSA.score(GSA.fit(replace(whole, rows=rows)), 1)).all()


def test_a_group_too_small_for_labels_is_refused() -> None:
    whole = study(5, 1.0)
    with pytest.raises(InputError, match=r"^A gradient-based attack needs at least 3 members and 3 non-members\.$"):
        GSA.fit(replace(whole, member=np.arange(10) < 2))
