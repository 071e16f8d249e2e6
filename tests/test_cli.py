"""The command line as a user meets it: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from oms_core.__main__ import main
from oms_core.metrics import COLUMNS

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = {
    "model", "attack", "t", "n", "calls", "auc", "auc_lo", "auc_hi", "asr", "tpr1", "tpr01",
    "gain", "gain_lo", "gain_hi", "paper",
}  # fmt: skip


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> list | dict:
    """What a command prints as JSON."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A whole process."""
    command = [sys.executable, "-m", "oms_core", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, timeout=300)


@pytest.mark.parametrize("what", ["models", "images", "attacks", "figures"])
def test_list_names_what_there_is(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "list", what)
    assert rows
    assert all(row["name"] for row in rows)


def test_score_writes_a_row_per_picture_and_step(
    pipeline: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.parquet"
    arguments = ["--model", str(pipeline), "--images", str(pictures), "--attack", "NA,SecMI", "--steps", "3"]
    assert main(["score", *arguments, "--out", str(out), "--distances"]) == 0
    table = pd.read_parquet(out)
    assert list(table.columns[: len(COLUMNS)]) == COLUMNS
    assert len(table) == 12 * 2 * 3
    assert table.groupby(["attack", "n"]).image.nunique().eq(12).all()
    na = table[table.attack == "NA"]
    for n in (1, 2, 3):
        rows = na[na.n == n]
        assert (rows.score == -rows[f"d(0,{n}) p=2"]).all()


def test_evaluate_reports_every_step_with_its_calls(
    pipeline: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = answer(capsys, "evaluate", "--model", str(pipeline), "--images", str(pictures), "--attack", "PIA")
    assert [(row["n"], row["calls"]) for row in rows] == [(1, 2), (2, 3), (3, 4)]
    assert all(row["auc_lo"] <= row["auc"] <= row["auc_hi"] for row in rows)
    assert all(row["tpr1"] is None for row in rows)  # six non-members cannot show 1 %
    assert all("too few" in row["note"] for row in rows)


def test_table_1_sets_the_paper_beside_the_measured(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "table", "1", "--model", "ddpm-digits")
    assert set(rows[0]) >= REQUIRED
    found = {(row["attack"], row["n"]): row for row in rows}
    assert found["NA", 1]["paper"]["Cifar10"] == {"asr": 0.7186, "auc": 0.7828, "tpr1": 0.0642, "tpr01": 0.0088}
    assert found["SecMI", 2]["paper"]["LFW"]["auc"] == 0.8567
    assert found["PIAN", 1]["paper"] is None


def test_table_1_covers_both_worlds_unless_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert {row["model"] for row in answer(capsys, "table", "1")} == {"ddpm-digits", "ddpm-fashion"}
    assert {row["model"] for row in answer(capsys, "table", "1", "--model", "ddpm-fashion")} == {"ddpm-fashion"}


def test_on_the_digits_one_more_step_gains_for_the_papers_three_attacks(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "table", "1", "--model", "ddpm-digits")
    gains = {row["attack"]: row for row in rows if row["n"] == 2}
    assert all(gains[attack]["gain_lo"] > 0 for attack in ("NA", "PIA", "SecMI"))


def test_on_fashion_one_more_step_gains_for_the_naive_attack(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "table", "1", "--model", "ddpm-fashion", "--attack", "NA")
    assert next(row["gain_lo"] for row in rows if row["n"] == 2) > 0


def test_the_default_weights_have_memorised_and_leave_room(capsys: pytest.CaptureFixture[str]) -> None:
    rows = answer(capsys, "table", "1")
    for model in ("ddpm-digits", "ddpm-fashion"):
        assert 0.75 <= max(row["auc"] for row in rows if row["model"] == model and row["n"] == 1) <= 0.95


@pytest.mark.parametrize("name", ["1", "3", "D1", "D2", "F1a", "F1b"])
def test_a_figure_is_one_file_that_says_its_numbers(
    name: str, pipeline: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figure.html"
    told = answer(capsys, "figure", name, "--model", str(pipeline), "--images", str(pictures), "--out", str(out))
    assert told["rows"]
    assert told["says"].endswith(".")
    assert f"Figure {name}" in out.read_text()


BAD = {
    "no such model": (["evaluate", "--model", "nothing"], "no model or folder 'nothing'"),
    "no such picture set": (["evaluate", "--images", "nowhere"], "no image set or folder 'nowhere'"),
    "no such attack": (["evaluate", "--attack", "XX"], "no attack 'XX'"),
    "no attack": (["evaluate", "--attack", ""], "No attack is named"),
    "no such snapshot": (["evaluate", "--model", "ddpm-digits@7"], "kept are"),
    "t beyond the schedule": (["evaluate", "--t", "1000"], "beyond its last timestep"),
    "SecMI needs room above t": (["evaluate", "--attack", "SecMI", "--t", "990"], "use at most 989"),
    "a negative t": (["evaluate", "--t", "-1"], "t is -1"),
    "no steps": (["evaluate", "--steps", "0"], "steps is 0"),
    "too many steps": (["evaluate", "--steps", "1000"], "between 1 and 20"),
    "no pictures": (["evaluate", "--limit", "0"], "limit is 0"),
    "a huge batch": (["evaluate", "--batch", "100000000"], "batch is"),
    "no such device": (["score", "--device", "tpu", "--limit", "4"], "no device 'tpu'"),
    "no such precision": (["score", "--dtype", "int8", "--limit", "4"], "no precision 'int8'"),
    "no such mode": (["score", "--mode", "fast", "--limit", "4"], "no mode 'fast'"),
    "gradients of a compiled network": (["evaluate", "--attack", "GSA", "--mode", "compiled"], "cannot be compiled"),
    "no workers": (["score", "--engine", "ray", "--workers", "-1"], "cannot be negative"),
    "no threads": (["score", "--engine", "ray", "--threads", "0"], "at least 1"),
    "no such figure": (["figure", "99"], "no figure '99'"),
    "no such table": (["table", "99"], "no table '99'"),
    "figure of a strange kind": (["figure", "1", "--out", "a.gif"], "neither .html, .png nor .svg"),
    "scores of a strange kind": (["score", "--out", "a.xlsx"], "neither .parquet nor .csv"),
    "nowhere to write": (["figure", "F1a", "--out", "/nonexistent/a.html"], "cannot be written"),
    "no such recipe": (["train", "ddpm-cats"], "no recipe 'ddpm-cats'"),
    "nothing to train": (["train"], "Name what to train"),
    "no originals": (["assemble", "--source", "/nonexistent"], "dataset-fashion-mnist"),
    "control characters": (["evaluate", "--model", "a\nb\x00"], "no model or folder"),
    "a very long name": (["evaluate", "--model", "x" * 5000], "no model or folder"),
    "a file as pictures": (["evaluate", "--images", __file__], "is a file"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert not shown.out


def test_a_wrong_flag_exits_with_2_and_no_traceback() -> None:
    done = run("evaluate", "--limit", "many")
    assert done.returncode == 2
    assert "invalid int value" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert "n = 2 adds One More Step" in done.stdout
    assert "default: 3" in run("score", "--help").stdout


def test_json_goes_to_standard_output_and_nothing_else_does(pipeline: Path, pictures: Path, tmp_path: Path) -> None:
    done = run(
        "score", "--model", str(pipeline), "--images", str(pictures), "--attack", "NA", "--json",
        OMS_CACHE=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) == 12 * 3


def test_a_warm_evaluation_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from oms_core.__main__ import main; assert main(['evaluate', '--json']) == 0;"
        "assert not {'torch', 'diffusers', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]


def test_a_killed_run_goes_on_from_its_finished_shards_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--attack", "NA", "--t", "300", "--steps", "4", "--limit", "1100", "--batch", "64", "--seed", "3"]
    cache, whole, again = tmp_path / "cache", tmp_path / "whole.parquet", tmp_path / "again.parquet"
    command = [sys.executable, "-m", "oms_core", "score", *settings]
    victim = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMS_CACHE": str(cache)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(cache.rglob("part-*.parquet")) and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    finished = {path: path.stat().st_mtime_ns for path in cache.rglob("part-*.parquet")}
    assert finished
    assert not list(cache.rglob("manifest.json")), "the run ended before it was killed"
    for out, folder in ((again, cache), (whole, tmp_path / "other")):
        monkeypatch.setenv("OMS_CACHE", str(folder))
        assert main(["score", *settings, "--out", str(out)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # nothing was computed twice
    pd.testing.assert_frame_equal(pd.read_parquet(whole), pd.read_parquet(again), check_exact=True)
    assert len(list(cache.rglob("manifest.json"))) == 1
