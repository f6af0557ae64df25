"""What the check says about itself: what it skipped, what it could not look at, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from training_ready.check.run import PROBES, CheckError, Report, check_recipe
from training_ready.check.show import show

REPOSITORY = Path(__file__).parents[2]
RECIPES = Path(__file__).parent / "recipes"
SHIPPED = sorted(path for path in (REPOSITORY / "recipes").rglob("*.yaml"))
Check = Callable[..., Report]


def scratch() -> dict[str, str | None]:
    lines = (RECIPES / "scratch.yaml").read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ", 1) for line in lines)


def statuses(report: Report) -> dict[str, str]:
    return {outcome.probe: outcome.status for outcome in report.outcomes}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_passes_offline(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    report = check_recipe(path, [f"output_dir={tmp_path / 'run'}"], offline=True)
    assert report.failures == []
    assert statuses(report)["bucket"] == "not run"


def test_the_quickstart_passes_with_bucket_and_hub(
    environment: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    report = check_recipe("recipes/quickstart.yaml", [f"output_dir={tmp_path / 'run'}"])
    assert report.failures == []
    assert [outcome.probe for outcome in report.outcomes] == list(PROBES)
    assert "not run" not in statuses(report).values()


def test_offline_leaves_the_network_alone_and_says_so(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVH_S3_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    report = check(scratch(), offline=True)
    assert report.failures == []
    unseen = {outcome.probe: outcome.findings for outcome in report.outcomes if outcome.status == "not run"}
    del unseen["memory"]
    assert {"bucket", "data", "loss_mask", "schedule", "time_cost", "hub", "seeds"} <= set(unseen)
    assert all(
        "--offline" in findings[-1].message
        for findings in unseen.values()
        if findings[-1].status == "not run"
    )
    assert statuses(report)["parameters"] == "pass"
    [counts] = report.outcomes[PROBES.index("parameters")].findings
    missing = (600 - 259) * 2 * 32  # rows of both ends, as long as the model is wide
    assert (
        f"with 259 tokens, and the corpus may teach the tokenizer 600: up to {missing:,} " in counts.message
    )


def test_a_skipped_probe_is_named_and_the_others_run(check: Check) -> None:
    keys = scratch() | {"data": "{corpus: final_dataset/leak/manifest.json, eval_split: val}"}
    assert [name for name, _ in check(keys).failures] == ["seeds"]
    report = check(keys, skip=["seeds"])
    assert report.passed
    assert statuses(report)["seeds"] == "not run"
    assert "--skip" in report.outcomes[PROBES.index("seeds")].findings[0].message


def test_a_skipped_probe_has_no_row_and_the_last_line_names_it(check: Check) -> None:
    console = Console(record=True, width=200)
    show(check(scratch(), skip=["seeds", "hub"], offline=True), console)
    lines = console.export_text().splitlines()
    assert not [line for line in lines if line.startswith(("seeds", "hub", "memory"))]
    assert lines[-1].startswith("recipe.yaml: 0 failed")
    assert "hub, seeds" in lines[-1]


def test_an_unknown_probe_cannot_be_skipped(check: Check) -> None:
    with pytest.raises(CheckError, match="did you mean `bucket`"):
        check(scratch(), skip=["buket"])


def test_what_follows_from_a_failure_is_not_run_and_blames_it(check: Check) -> None:
    report = check(
        scratch() | {"data": "{corpus: final_dataset/nothing/manifest.json}", "eval_strategy": None}
    )
    assert {name for name, _ in report.failures} == {"bucket"}
    for probe in ("data", "loss_mask", "schedule", "time_cost"):
        outcome = report.outcomes[PROBES.index(probe)]
        assert outcome.status == "not run"
        assert any("bucket failed" in finding.message for finding in outcome.findings)
    assert statuses(report)["parameters"] == "pass"


def test_the_sample_shows_which_text_is_learned(check: Check) -> None:
    report = check(scratch())
    finding = next(f for f in report.outcomes[PROBES.index("template")].findings if "sample" in f.measured)
    pieces = finding.measured["sample"]
    learned = "".join(text for text, learned in pieces if learned)
    assert learned.count("What is it about call") == 2
    assert "I keep thinking" not in learned
    assert learned.endswith("<|im_end|>")


def test_counts_are_exact_for_a_small_corpus(check: Check) -> None:
    measured = check(scratch()).outcomes[PROBES.index("schedule")].findings[-1].measured
    assert measured["exact"]
    assert measured["steps"] == 40


def test_a_finished_run_gives_time_and_cost(check: Check, tmp_path: Path) -> None:
    keys = scratch() | {"budget": "{price_per_hour: 3.0, max_hours: 0.001}"}
    unknown = check(keys).outcomes[PROBES.index("time_cost")].findings[0]
    assert "time and cost unknown" in unknown.message
    assert unknown.measured["cost"] is None

    earlier = tmp_path / "runs" / "earlier"
    earlier.mkdir(parents=True)
    resolved = "\n".join(f"{key}: {value}" for key, value in keys.items() if key != "output_dir")
    facts = {
        "finished_at": "2026-02-03T04:05:06+00:00",
        "recipe": {"resolved": resolved},
        "hardware": {"device": "cpu", "device_count": 0, "processes": 1, "processor": "abacus"},
    }
    (earlier / "summary.json").write_text(json.dumps(facts), encoding="utf-8")
    lines = [{"step": step, "time": 100.0 + 9.0 * step, "loss": 1.0} for step in range(1, 8)]
    (earlier / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    timed, warned = check(keys).outcomes[PROBES.index("time_cost")].findings
    assert timed.measured["hours"] == pytest.approx(40 * 9 / 3600)
    assert timed.measured["cost"] == pytest.approx(3 * 40 * 9 / 3600)
    assert "2026-02-03 on 1 x abacus" in timed.message
    assert warned.key == "budget.max_hours"

    wider = check(keys | {"per_device_train_batch_size": "4"}).outcomes[PROBES.index("time_cost")]
    assert wider.findings[0].measured["hours"] is None


def test_the_command_prints_json_and_exits_by_the_verdict(
    check: Check, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check(scratch())  # writes the recipe
    front_door = [sys.executable, "-c", "from training_ready.cli import main; main()"]
    command = [*front_door, "check", "recipe.yaml", "--json", "--skip", "memory"]
    good = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert good.returncode == 0, good.stderr
    said = json.loads(good.stdout)
    assert said["passed"]
    assert [probe["probe"] for probe in said["probes"]] == list(PROBES)
    bad = subprocess.run(
        [*command, "max_length=48"], cwd=tmp_path, env=os.environ, capture_output=True, text=True
    )
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr
    failing = {probe["probe"] for probe in json.loads(bad.stdout)["probes"] if probe["status"] == "fail"}
    assert "data" in failing
