"""`--trial`: a few steps trained for real beside the run, and what the check makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training_ready.check.run import Report

Check = Callable[..., Report]
FRONT_DOOR = [sys.executable, "-c", "from training_ready.cli import main; main()"]


def scratch() -> dict[str, str | None]:
    lines = (Path(__file__).parent / "recipes" / "scratch.yaml").read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ", 1) for line in lines)


def front_door(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [*FRONT_DOOR, "check", "recipe.yaml", "--skip", "memory", "--json", *words]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_trial_times_the_steps_and_gives_hours_and_cost(check: Check, tmp_path: Path) -> None:
    check(scratch() | {"budget": "{price_per_hour: 3.0}"})  # writes the recipe
    done = front_door(tmp_path, "--trial", "4")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    [timed] = next(probe for probe in said["probes"] if probe["probe"] == "time_cost")["findings"]
    folder = tmp_path / "runs" / "scratch-trial-4"
    assert timed["measured"]["measured_in"] == str(folder)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    took = max(line["time"] for line in steps) - min(line["time"] for line in steps)
    assert 0 < timed["measured"]["hours"] <= 40 * took / 3600
    assert timed["measured"]["cost"] == pytest.approx(3 * timed["measured"]["hours"])
    assert not (tmp_path / "runs" / "scratch").exists()  # the run itself starts fresh

    assert not list(folder.glob("checkpoint-*"))

    again = front_door(tmp_path, "--trial", "4")
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
    assert json.loads(again.stdout)["passed"]


@pytest.mark.slow
def test_a_trial_runs_on_as_many_processes_as_the_run(check: Check, tmp_path: Path) -> None:
    check(scratch() | {"launch": "{num_processes: 2}"})
    done = front_door(tmp_path, "--trial", "3")
    assert done.returncode == 0, done.stderr
    [timed] = next(p for p in json.loads(done.stdout)["probes"] if p["probe"] == "time_cost")["findings"]
    folder = tmp_path / "runs" / "scratch-trial-3"
    assert timed["measured"]["measured_in"] == str(folder)
    assert json.loads((folder / "summary.json").read_text())["hardware"]["processes"] == 2
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.slow
def test_a_trial_that_fails_says_so(check: Check, tmp_path: Path) -> None:
    check(scratch() | {"data": "{corpus: final_dataset/nothing/manifest.json, eval_split: val}"})
    done = front_door(tmp_path, "--trial", "2")
    assert done.returncode == 1
    assert "the trial of 2 steps failed" in done.stderr
    assert "Traceback" not in done.stderr
