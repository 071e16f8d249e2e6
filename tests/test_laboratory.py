"""Sweeps, schemes and evaluations: what they count, that they count it once, and that nothing is mixed up."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from oms_core import evaluation, exhibits, figures, laboratory, metrics
from oms_core.__main__ import main
from oms_core.attacks import ATTACKS, RIVALS
from oms_core.attacks.base import column, pairs
from oms_core.compute import Progress, score, score_each
from oms_core.evaluation import with_rivals
from oms_core.location import Location
from oms_core.people import MEASURES, readable
from oms_core.run import Plan, Run, calls, plan, scores


@pytest.fixture
def run(pipeline: Path, pictures: Path) -> Run:
    """A run on a tiny model with random weights."""
    return Run(model=Location(pipeline), images=Location(pictures), attacks=("NA", "PIA"), t=100, batch=6)


def linear_signal(planned: Plan, k: np.ndarray) -> pd.DataFrame:
    """The distances of searches whose residuals fall by a factor k, one per picture, along one direction."""
    position = np.cumsum(k[:, None] ** np.arange(planned.run.steps), axis=1)
    position = np.hstack([np.zeros((len(k), 1)), position])  # (N, steps + 1)
    distances = {column(i, j, 2): position[:, j] - position[:, i] for i, j in pairs(planned.run.steps)}
    return pd.DataFrame({"image": planned.images.table.image.to_numpy()} | distances)


def test_the_contraction_constant_of_a_linear_map_is_its_factor(run: Run) -> None:
    planned = plan(replace(run, steps=6))
    k = np.linspace(0.1, 1.5, len(planned.images))
    found = laboratory.contraction(planned, linear_signal(planned, k))
    np.testing.assert_allclose(found.k, k, rtol=1e-9)
    role = planned.images.table.set_index("image").role
    assert (found.member.to_numpy() == role.loc[found.image].eq("member").to_numpy()).all()


def test_the_ratio_of_residuals_of_a_linear_map_is_its_factor(run: Run) -> None:
    planned = plan(replace(run, steps=5))
    k = np.linspace(0.1, 1.5, len(planned.images))
    found = laboratory.ratios(planned, linear_signal(planned, k))
    assert sorted(found.n.unique()) == [1, 2, 3, 4]
    expected = pd.Series(k, index=planned.images.table.image.to_numpy())
    np.testing.assert_allclose(found.ratio, expected.loc[found.image])


def test_a_grid_holds_the_auc_of_every_distance(run: Run) -> None:
    planned, signals = plan(run), score(run)
    table = laboratory.grid(planned, signals, 4).set_index(["i", "j"])
    assert set(table.index) == set(pairs(3))
    member = laboratory.members(planned, signals["NA"])
    for i, j in pairs(3):
        assert table.auc[i, j] == metrics.auc(-signals["NA"][column(i, j, 4)].to_numpy(), member)


def test_every_scheme_spends_the_same_calls_and_plain_iteration_leads_itself_by_nothing(run: Run) -> None:
    rows = pd.DataFrame(laboratory.by_scheme(run))
    assert rows.groupby("attack").calls.nunique().eq(1).all()
    own = rows[rows.scheme == "picard"]
    assert (own[["lead", "lead_lo", "lead_hi"]] == 0).all(axis=None)
    for name in ("NA", "PIA"):
        signals = score(replace(run, steps=2))[name]
        expected = -signals[column(0, 2, ATTACKS[name].p)].to_numpy()
        assert own.set_index("attack").auc[name] == metrics.auc(expected, laboratory.members(plan(run), signals))


def test_a_rival_stands_beside_and_gets_no_rows(run: Run) -> None:
    rows = exhibits.evaluate(run)
    assert {row["attack"] for row in rows} == {"NA", "PIA"}
    rivals = {row["attack"]: row for row in exhibits.evaluate(replace(run, attacks=tuple(RIVALS.values())[:2]))}
    assert set(rivals) == {"NA-repeated", "PIA-repeated"}
    for row in rows:
        if row["n"] > 1:
            assert row["lead"] == pytest.approx(row["auc"] - row["rival_auc"])
            assert row["lead_lo"] <= row["lead"] <= row["lead_hi"]


def test_a_rival_asks_the_model_as_often_as_the_attack_with_one_more_step(run: Run) -> None:
    counted = calls(plan(with_rivals(replace(run, attacks=tuple(RIVALS)))))
    for name, rival in RIVALS.items():
        assert counted[name, 2] == counted[rival, 2]
        assert counted[name, 1] == counted[rival, 1]


def test_the_first_of_several_draws_is_the_attack_itself(run: Run) -> None:
    signals = score(with_rivals(replace(run, attacks=tuple(RIVALS))))
    for name, rival in RIVALS.items():
        first = -ATTACKS[rival].score(signals[rival], 1)
        np.testing.assert_allclose(first, signals[name][column(0, 1, ATTACKS[name].p)], rtol=1e-6)
        both = signals[rival][["d(0,1) #1", "d(0,1) #2"]].mean(axis=1)
        np.testing.assert_allclose(-ATTACKS[rival].score(signals[rival], 2), both, rtol=1e-6)


def test_figures_are_counted_once_and_found_by_their_scores(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, signals = plan(run), score(run)
    fresh = evaluation.evaluation(planned, signals, run.attacks)
    assert fresh == [evaluation.plain(row) for row in metrics.evaluate(scores(planned, signals), calls(planned))]
    monkeypatch.setattr(metrics, "evaluate", lambda *given: pytest.fail("counted again"))
    assert evaluation.evaluation(planned, signals, run.attacks) == fresh
    other = {name: rows.assign(**{column(0, 1, 2): 1.0}) for name, rows in signals.items()}
    with pytest.raises(pytest.fail.Exception):
        evaluation.evaluation(planned, other, run.attacks)


def test_several_runs_have_one_progress(run: Run) -> None:
    seen: list[Progress] = []
    runs = [replace(run, t=t) for t in (100, 200)]
    found = score_each(runs, seen.append)
    assert [list(signals) for signals in found] == [["NA", "PIA"]] * 2
    assert [progress.done for progress in seen] == [6, 12, 18, 24]
    assert {progress.total for progress in seen} == {24}


@pytest.mark.parametrize("name", ["1", "2b", "B1"])
def test_a_figure_over_timesteps_says_what_its_table_holds(
    name: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(laboratory, "SWEPT", (50, 100))
    monkeypatch.setattr(exhibits, "SHOWN_T", (50, 100))
    monkeypatch.setattr(laboratory.by_timestep, "__defaults__", ((50, 100), None))
    attacks = ("NA",) if name != "2b" else ("NA", "PIA")
    planned, chart = exhibits.figure(name, replace(run, t=None, attacks=attacks, steps=2))
    assert planned.model.name == run.model
    assert not chart.table.empty
    assert "50" in chart.alt
    assert "100" in chart.alt or name == "2b"


def swept() -> list[dict]:
    """Figures at two epochs: NA gains, PIA loses."""
    rows = []
    for epoch, auc in ((10, 0.6), (20, 0.8)):
        for attack, gain in (("NA", 0.05), ("PIA", -0.02)):
            for n in (1, 2):
                value = auc + (n - 1) * gain
                row = {"attack": attack, "t": epoch, "n": n, "epoch": epoch, "auc": value, "tpr1": value / 10}
                row |= {f"{name}{end}": row[name] for name in ("auc", "tpr1") for end in ("_lo", "_hi")}
                rows.append(row | dict.fromkeys(("gain", "gain_lo", "gain_hi"), gain if n > 1 else None))
    return rows


def test_a_sweep_draws_dotted_without_and_solid_with_one_more_step() -> None:
    chart = figures.sweep(swept(), "epoch", "training epoch")
    lines = {trace.name: trace for trace in chart.figure.data if trace.showlegend}
    assert set(lines) == {"NA", "NA +OMS", "PIA", "PIA +OMS"}
    assert (lines["NA"].line.dash, lines["NA +OMS"].line.dash) == ("dot", "solid")
    assert lines["NA"].line.color == lines["NA +OMS"].line.color != lines["PIA"].line.color
    np.testing.assert_allclose(lines["NA +OMS"].y, [65, 85])
    assert "NA +OMS 65.0 to 85.0 %" in chart.alt


def test_a_boost_is_the_difference_that_one_more_step_makes() -> None:
    chart = figures.boost(swept())
    table = chart.table.set_index(["attack", "t"])
    assert table.gain["NA", 10] == pytest.approx(0.05)
    assert table.tpr1_gain["PIA", 20] == pytest.approx(-0.002)
    assert "NA +5.0" in chart.alt


def test_cells_for_people_hold_every_figure_with_its_interval() -> None:
    row = {"model": "m", "attack": "NA", "t": 1, "n": 2, "calls": 2}
    row |= {f"{name}{end}": 0.5 for name in MEASURES for end in ("", "_lo", "_hi")} | {"asr": 0.5, "asr_sd": 0.1}
    (cells,) = readable([row])
    for title, form in MEASURES.values():
        assert cells[title] == f"{50:{form}} [{50:{form}}, {50:{form}}]"
    assert cells["ASR %"] == "50.0 ± 10.0"


def test_a_report_holds_everything_and_loads_nothing(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: exhibits.FIGURES[name] for name in ("3", "D1")}
    monkeypatch.setattr(exhibits, "FIGURES", chosen)
    monkeypatch.setattr(exhibits, "TABLES", {name: exhibits.TABLES[name] for name in ("1", "5", "schemes")})
    flags = ["--model", run.model, "--images", run.images, "--t", "100", "--batch", "6"]
    assert main(["report", "--out", str(tmp_path / "new"), *flags]) == 0
    text = (tmp_path / "new" / "report.html").read_text()
    assert all(f"Figure {name}. " in text for name in chosen)
    assert "Table 1. MIA methods on DDPM" in text
    assert "has none of the role auxiliary" in text  # why there is no Table 5 of these pictures
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=", text)
    made = json.loads(re.search(r"<pre>(\{.*?\})</pre>", text, re.DOTALL)[1].replace("&quot;", '"'))
    assert made["settings"]["model"] == run.model
    assert made["libraries"]["torch"]
