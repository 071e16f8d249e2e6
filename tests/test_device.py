"""Where a model computes and how many pictures at once, decided from what the machine has."""

from __future__ import annotations

import itertools

import pytest
import torch

from oms_core import device
from oms_core.device import FIRST_BATCH, LARGEST_BATCH, MODES, Placement, batch_size, out_of_memory, place
from oms_core.errors import InputError

GPU = Placement("cuda", "float32")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a CPU alone and nothing asked for."""
    monkeypatch.delenv("OMS_DEVICE", raising=False)
    has(monkeypatch, cuda=False, mps=False)
    return monkeypatch


def has(machine: pytest.MonkeyPatch, cuda: bool, mps: bool) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: cuda)
    machine.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(False, False, "cpu"), (True, False, "cuda"), (False, True, "mps"), (True, True, "cuda")],
)
def test_the_best_device_here_is_taken(machine: pytest.MonkeyPatch, cuda: bool, mps: bool, best: str) -> None:
    has(machine, cuda, mps)
    assert place() == Placement(best, "float32")
    assert place("cpu") == Placement("cpu", "float32")  # what is asked for goes first


def test_the_environment_names_the_device_unless_a_run_does(machine: pytest.MonkeyPatch) -> None:
    has(machine, cuda=True, mps=True)
    machine.setenv("OMS_DEVICE", "mps")
    assert place().device == "mps"
    assert place("cpu").device == "cpu"
    machine.setenv("OMS_DEVICE", "")
    assert place().device == "cuda"


@pytest.mark.parametrize("name", ["gpu", "CUDA", "cuda:0", "cpu ", "tpu", "../cpu"])
def test_an_unknown_device_is_refused_with_the_known_ones(machine: pytest.MonkeyPatch, name: str) -> None:
    has(machine, cuda=True, mps=True)
    machine.setenv("OMS_DEVICE", name)
    for asked in (name, ""):
        with pytest.raises(InputError) as refused:
            place(asked)
        assert str(refused.value) == f"There is no device {name!r}; choose one of cpu, cuda, mps."


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_here_is_refused_and_not_replaced(machine: pytest.MonkeyPatch, name: str) -> None:
    machine.setenv("OMS_DEVICE", name)
    for asked in (name, ""):
        with pytest.raises(InputError) as refused:
            place(asked)
        assert str(refused.value) == f"This machine has no usable {name}; leave the device out to use what it has."


def test_a_precision_is_one_of_three() -> None:
    for dtype in device.DTYPES:
        assert place(dtype=dtype) == Placement("cpu", dtype)
        assert getattr(torch, dtype).is_floating_point
    for name in ("float64", "half", "int8", "Tensor"):
        with pytest.raises(InputError, match=f"no precision '{name}'; choose one of float32, float16, bfloat16"):
            place(dtype=name)


class Memory:
    """A device that holds so many pictures, and the batch sizes that were tried on it."""

    def __init__(self, holds: int, error: BaseException) -> None:
        self.holds, self.error, self.tried = holds, error, []

    def forward(self, count: int) -> None:
        self.tried.append(count)
        if count > self.holds:
            raise self.error


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError("in other words"),
    RuntimeError("MPS backend out of memory (MPS allocated: 5.56 GB, max allowed: 6.80 GB)."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried"),
    MemoryError(),
]
OTHER = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("x")]


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_every_way_to_run_out_of_memory_is_known(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_other_errors_are_not_taken_for_a_want_of_memory(error: Exception) -> None:
    assert not out_of_memory(error)


def test_the_allocator_of_this_machine_says_what_is_expected() -> None:
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**50)
    assert out_of_memory(failed.value)


@pytest.mark.parametrize("holds", [1, 2, 3, 15, 16, 100, 512, 1023])
@pytest.mark.parametrize("error", FULL[:3], ids=["cuda", "class", "mps"])
def test_a_batch_grows_until_it_does_not_fit_and_half_of_what_does_is_taken(holds: int, error: Exception) -> None:
    memory = Memory(holds, error)
    size = batch_size(GPU, memory.forward)
    fits = max(tried for tried in memory.tried if tried <= holds)
    assert fits <= holds < 2 * fits
    assert size == max(1, fits // 2)


def test_a_device_with_room_for_all_gets_the_largest_batch() -> None:
    memory = Memory(10**6, FULL[0])
    assert batch_size(GPU, memory.forward) == max(memory.tried) == LARGEST_BATCH


@pytest.mark.parametrize("best", [16, 64, 256])
def test_a_batch_grows_as_long_as_a_picture_gets_cheaper(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])

    passes = itertools.count()

    def forward(count: int) -> None:
        disturbed = 1.5 if next(passes) % 3 else 1.0  # by other work
        clock[0] += 1e-4 * disturbed * (best if count <= best else 1.1 * count)  # up to the best one all take as long

    assert batch_size(Placement("cpu", "float32"), forward) == best


def test_a_batch_that_takes_long_is_large_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])

    def forward(count: int) -> None:
        clock[0] += 1 + count / 1000

    assert batch_size(Placement("cpu", "float32"), forward) == FIRST_BATCH


def test_a_device_without_room_for_one_picture_is_refused() -> None:
    memory = Memory(0, FULL[0])
    with pytest.raises(InputError) as refused:
        batch_size(GPU, memory.forward)
    assert str(refused.value) == "Not even one picture fits into the memory of cuda; use another device."
    assert memory.tried[-1] == 1


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_another_error_ends_the_search_for_a_batch_size(error: Exception) -> None:
    memory = Memory(10, error)
    with pytest.raises(type(error)):
        batch_size(GPU, memory.forward)
    assert memory.tried == [FIRST_BATCH]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_known_and_no_other(mode: str) -> None:
    assert place("cpu", mode=mode).mode == mode
    with pytest.raises(InputError, match="no mode 'fast'"):
        place("cpu", mode="fast")
