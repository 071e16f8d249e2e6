"""What bench measures is what it says, on a few pictures; how fast it was is not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oms_core import bench
from oms_core.__main__ import main
from oms_core.bench import app, base, cluster, engine, gradients, memory, network
from oms_core.bench.base import Subject, in_turns, middle_ratio, row
from oms_core.device import MODES
from oms_core.distributed import Cluster, started
from oms_core.images import open_images
from oms_core.location import Location

SUBJECT = Subject("ddpm-digits", 16, 8)


@pytest.mark.parametrize(
    ("limits", "holds", "share"),
    [
        ({"most": 2.0}, True, 0.75),
        ({"most": 1.0}, False, 1.5),
        ({"least": 1.0}, True, 2 / 3),
        ({"least": 3.0}, False, 2.0),
    ],
)
def test_a_value_holds_where_its_share_of_the_target_is_at_most_one(limits: dict, holds: bool, share: float) -> None:
    found = row("x", 1.5, **limits)
    assert (found["holds"], found["of target"]) == (holds, pytest.approx(share))
    assert holds == (found["of target"] <= 1)


def test_work_takes_turns_and_the_middle_ratio_is_of_the_same_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(base.time, "perf_counter", lambda: clock[0])

    def piece(name: str, seconds: float) -> object:
        def work() -> None:
            order.append(name)
            clock[0] += seconds * len(order)  # the machine slows down all the time

        return work

    slow, quick = in_turns([piece("a", 2.0), piece("b", 1.0)], 5)
    assert order == ["a", "b"] * 6  # the first turn warms up
    assert len(slow) == len(quick) == 5
    assert middle_ratio([2, 30, 8], [1, 10, 2]) == 3
    assert 1.5 < middle_ratio(slow, quick) < 2


def test_the_published_attacks_are_computed_at_their_published_calls() -> None:
    one = engine.probe_on(SUBJECT)
    asked = []
    ask = one.denoiser.eps
    try:
        one.denoiser.eps = lambda x_t, t, condition: asked.append(t) or ask(x_t, t, condition)
        engine.compute_published(one)
    finally:
        del one.denoiser.eps
    assert len(asked) == sum(engine.PUBLISHED.values()) == 104
    assert max(asked) < one.denoiser.timesteps


def test_attacks_together_cost_the_union_of_their_questions() -> None:
    found = {line["name"]: line for line in engine.engine_rows(SUBJECT)}
    calls = found["model calls per picture, NA + PIA + PIAN + SecMI both ways"]
    assert (calls["value"], calls["holds"]) == (25, True)
    assert found["the same with their repetitions"]["value"] == 25 + 4 * 2  # two more questions each
    judged = [line for line in found.values() if "target" in line]
    assert len(judged) == 4


def test_the_repeated_set_has_new_identities_and_the_same_pictures() -> None:
    planned = memory.repeated(SUBJECT, 4000)
    assert len(planned.images) == planned.images.table.image.nunique() == 4000
    shipped = SUBJECT.plan(limit=10**9).images
    assert planned.images.read(0) == planned.images.read(len(shipped)) == shipped.read(shipped.table.index[0])
    assert memory.peak() > 50


def test_the_pictures_for_a_cluster_are_all_different_files(tmp_path: Path) -> None:
    cluster.many_pictures("digits", 2000, tmp_path / "many.parquet")
    found = open_images(Location(tmp_path / "many.parquet"))
    assert len(found) == 2000
    assert not len(found.rejected)
    assert set(found.table.role) == {"member", "nonmember"}


def test_bench_prints_rows_and_draws_its_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.html"
    small = ["--model", "ddpm-digits", "--pictures", "8", "--mode", "channels_last"]
    assert main(["bench", "engine", *small, "--json", "--out", str(out)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {line["part"] for line in rows} == {"engine"}
    assert all({"name", "value", "unit"} <= set(line) for line in rows)
    assert "of 4 targets hold" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"), [(["speed"], "no part 'speed'"), (["engine", "--pictures", "0"], "must be at least 1")]
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_network_is_tried_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "TURNS", 1)
    monkeypatch.setattr(network, "MODES", MODES[:2])
    found = network.network_rows(SUBJECT)
    ratios = [line for line in found if line["name"].endswith("/ eager float32")]
    assert {line["name"].partition(" /")[0] for line in ratios} == {
        "channels_last float32", "eager float16", "eager bfloat16"
    }  # fmt: skip
    assert all(line["value"] > 0 and "sd" in line["drift of a score"] for line in ratios)


def test_a_small_and_a_large_set_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SMALL": 16, "LARGE": 64, "TURNS": 4}.items():
        monkeypatch.setattr(memory, name, value)
    found = memory.grown(SUBJECT)
    assert found["time"] > 0
    assert found["memory"] >= 0
    assert found["parts"] == 1


def test_memory_gradients_and_the_app_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "TURNS", 1)
    for name, value in {"TURNS": 1, "BATCH": 8, "ALONE": 2}.items():
        monkeypatch.setattr(gradients, name, value)
    found = memory.memory_rows(SUBJECT) + gradients.gradient_rows(SUBJECT) + app.app_rows(SUBJECT)
    assert [line["holds"] for line in found if "target" in line]
    assert all(line["value"] > 0 for line in found)


def test_a_cluster_and_its_scheduler_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PICTURES": 1024, "TURNS": 1, "BARE": 0.1, "NO_WORK": 60, "WRITTEN": 3}.items():
        monkeypatch.setattr(cluster, name, value)
    monkeypatch.setattr(cluster, "COMPARED", ("NA",))
    subject = Subject("ddpm-digits", 512, 64)
    with started(Cluster(2)):
        found = cluster.cluster_rows(subject) + cluster.scheduler_rows(subject)
    values = {line["name"].partition(", 1,024")[0]: line["value"] for line in found}
    assert values["60 shards without work, handed out and receipted"] == 60
    compared = "one worker / local engine"
    assert values[f"{compared}, start and end included"] > values[f"{compared}, seconds while it works"]
    assert all(value > 0 for name, value in values.items() if "waits" not in name)


def test_each_part_is_measured_on_what_its_targets_say(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Subject] = []
    for name, part in bench.PARTS.items():
        monkeypatch.setitem(bench.PARTS, name, part._replace(measure=lambda subject: told.append(subject) or []))
    monkeypatch.setattr(bench, "batch_for", lambda *_: 32)
    bench.bench(("engine", "kills"))
    assert told == [Subject("ddpm-fashion", 1500, 32), Subject("ddpm-digits", 512, 32)]
    told.clear()
    bench.bench((bench.ALL,), model="uvit-digits", pictures=20, mode="compiled")
    assert told == [Subject("uvit-digits", 20, 32, mode="compiled")] * len(bench.PARTS)


def test_every_part_is_named_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    said = capsys.readouterr().out
    assert all(part in said for part in bench.PARTS)
