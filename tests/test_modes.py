"""The ways in which a network can run give the same scores up to rounding, and are kept apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from oms_core import compute
from oms_core.cache import Variant, begun, key_of
from oms_core.denoiser import Denoiser
from oms_core.device import FIRST_BATCH
from oms_core.errors import InputError
from oms_core.location import Location
from oms_core.run import Run, lookup, plan


@pytest.fixture
def run(pipeline: Path, pictures: Path) -> Run:
    return Run(Location(pipeline), Location(pictures), attacks=("NA",), t=100, steps=2, batch=8, device="cpu")


def test_channels_last_is_the_same_up_to_rounding_and_a_result_of_its_own(run: Run) -> None:
    plain, other = compute.score(run)["NA"], replace(run, mode="channels_last")
    assert not lookup(plan(other))
    found = compute.score(other)["NA"]
    torch.testing.assert_close(torch.tensor(found["d(0,2) p=2"]), torch.tensor(plain["d(0,2) p=2"]))
    assert lookup(plan(other))["NA"].equals(found)
    assert lookup(plan(run))["NA"].equals(plain)


@pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler, which compiling needs")
def test_a_compiled_network_is_the_same_up_to_rounding_and_keeps_its_shards(run: Run, cache_folder: Path) -> None:
    run = replace(run, batch=FIRST_BATCH)  # for which it is compiled first
    plain, other = compute.score(run)["NA"], replace(run, mode="compiled")
    found = compute.score(other)["NA"]
    torch.testing.assert_close(torch.tensor(found["d(0,2) p=2"]), torch.tensor(plain["d(0,2) p=2"]))
    for path in cache_folder.rglob("*-compiled/*"):
        path.unlink()
    pd.testing.assert_frame_equal(compute.score(other)["NA"], found, check_exact=True)


def test_a_network_that_cannot_be_compiled_is_refused_in_a_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: torch.nn.Module) -> None:
        self.forward = None  # as a compiler that is missing shows at the first call

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    compute.loaded.cache_clear()
    with pytest.raises(InputError, match="cannot be compiled on this machine; leave out --mode"):
        compute.score(replace(run, mode="compiled"))


@pytest.mark.parametrize("variant", [Variant("cpu", "float32", 8, 3), Variant("cuda", "float16", 64, 2, "compiled")])
def test_the_name_of_a_result_says_how_it_was_computed(variant: Variant) -> None:
    assert Variant.parse(str(variant)) == variant


def test_a_run_that_was_begun_goes_on_in_its_batches(run: Run, cache_folder: Path) -> None:
    open_run = replace(run, batch=0)
    task = plan(open_run).tasks[0]
    like = Variant("cpu", "float32", 0, 2)
    assert begun(task.key, like) == 0
    compute.score(replace(run, batch=5))
    next(cache_folder.rglob("manifest.json")).unlink()  # as if it had been killed just before the end
    assert begun(task.key, like) == 5
    assert begun(task.key, replace(like, steps=3)) == 0
    assert begun(key_of({"another": "question"}), like) == 0
    assert compute.settled(plan(open_run)).batch == 5


@pytest.mark.parametrize(("pictures_asked", "batch"), [(1, 1), (2, 2), (3, 4), (5, 8), (12, 8)])
def test_few_pictures_are_not_filled_up_to_a_batch_that_would_pay(
    run: Run, pictures_asked: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute, "automatic_batch", lambda *_: 8)
    assert compute.settled(plan(replace(run, batch=0, limit=pictures_asked))).batch == batch


@pytest.mark.parametrize(("attacks", "work"), [(("NA", "PIA"), "forward_pass"), (("NA", "Jacobian"), "derivative")])
def test_a_batch_is_tried_by_the_work_that_awaits_it(
    run: Run, attacks: tuple[str, ...], work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def noted(name: str, own: Callable[[Denoiser, int], None]) -> Callable[[Denoiser, int], None]:
        return lambda denoiser, count: tried.append(name) or own(denoiser, count)

    for name in ("forward_pass", "derivative"):
        monkeypatch.setattr(compute, name, noted(name, getattr(compute, name)))
    compute.automatic_batch.cache_clear()
    compute.settled(plan(replace(run, attacks=attacks, batch=0)))
    assert set(tried) == {work}
