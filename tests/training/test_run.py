"""Whole runs in processes of their own: what they leave behind, killed and continued, alone and on two ranks."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Train = Callable[..., str]


def weights(checkpoint: Path) -> dict[str, Any]:
    return dict(load_file(checkpoint / "model.safetensors"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_leaves_everything_that_its_release_needs(recipe: Path, train: Train, tmp_path: Path) -> None:
    out = train(recipe, "data.eval_split=val", "eval_strategy=steps", "eval_steps=6")
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))

    assert summary["steps"] == 12
    assert summary["loss"]["last"] < summary["loss"]["first"]
    assert math.isfinite(summary["loss"]["eval"])
    # 12 steps of 2 packs of at most 256 tokens; the plan's count agrees with the trainer's own.
    assert summary["tokens"]["packs"] == 24
    assert summary["tokens"]["trained_tokens"] == max(line.get("num_tokens", 0) for line in metrics(run))
    assert 0 < summary["tokens"]["trained_learned_tokens"] < summary["tokens"]["trained_tokens"] <= 24 * 256
    assert len(summary["moe"]["layers"]) == 2
    for layer in summary["moe"]["layers"]:
        assert len(layer["load"]) == 4
        assert sum(layer["load"]) == pytest.approx(1)
    assert summary["data"]["sources"][-1]["rejected"] == {
        "duplicate": 1,
        "empty": 1,
        "license_missing": 1,
        "license_not_allowed": 1,
    }
    for picture in summary["pictures"]:
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert summary["pictures"] == ["loss.png", "expert_load.png"]
    assert "expert_load/layer_1/expert_3" in metrics(run)[0]
    assert "step 12/12" in out
    assert (run / "train.log").read_text(encoding="utf-8").count("step ") == 12

    # The saved recipe alone is the run, and a finished run is not trained again.
    again = train(run / "recipe.yaml")
    assert "nothing to do" in again


def test_a_killed_run_continues_to_bit_equal_weights(
    recipe: Path, train: Train, launch: Callable[..., Any], tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe, f"output_dir={whole}")

    process = launch(recipe, f"output_dir={broken}")
    while not (broken / "checkpoint-8" / "stream_state.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "summary.json").exists()
    # What an interrupted save leaves: weights, but not the file that is written last.
    (broken / "checkpoint-11").mkdir()

    out = train(recipe, f"output_dir={broken}", "resume_from_checkpoint=auto")
    assert "checkpoint-11: incomplete" in out
    assert "continuing from" in out
    expected, found = weights(whole / "checkpoint-12"), weights(broken / "checkpoint-12")
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    losses = [
        [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line] for run in (whole, broken)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 13))


def test_two_ranks_train_what_one_trains(recipe: Path, train: Train, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    common = ("max_steps=6", "router_aux_loss_coef=0.0")
    train(recipe, *common, f"output_dir={one}", "per_device_train_batch_size=2")
    train(recipe, *common, f"output_dir={two}", "per_device_train_batch_size=1", processes=2)
    expected, found = weights(one / "checkpoint-6"), weights(two / "checkpoint-6")
    for name in expected:
        assert (expected[name] - found[name]).abs().max() < 2e-5, name
    counts = [json.loads((run / "summary.json").read_text(encoding="utf-8"))["tokens"] for run in (one, two)]
    assert counts[0] == counts[1]
    assert [line["num_tokens"] for line in metrics(one) if "loss" in line] == [
        line["num_tokens"] for line in metrics(two) if "loss" in line
    ]


def test_an_epoch_trains_every_row_once(recipe: Path, train: Train, tmp_path: Path) -> None:
    train(recipe, "max_steps=-1", "num_train_epochs=1", "per_device_train_batch_size=16", "save_steps=100")
    tokens = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["tokens"]
    assert tokens["trained_rows"] == tokens["rows"]


def test_a_time_budget_stops_saves_and_says_how_to_go_on(recipe: Path, train: Train, tmp_path: Path) -> None:
    out = train(recipe, "budget.max_hours=1e-7", "save_steps=100")
    assert "stopped at step 1 of 12" in out
    assert "resume_from_checkpoint=auto" in out
    assert (tmp_path / "run" / "checkpoint-1" / "stream_state.json").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_what_cannot_be_trained_is_refused_in_one_message(
    recipe: Path, train: Train, refused: Callable[..., str], tmp_path: Path
) -> None:
    assert "did you mean" in refused(recipe, "learning_rte=1e-3")
    missing = refused(recipe, "data.corpus=final_dataset/nothing/manifest.json")
    assert "final_dataset/nothing/manifest.json" in missing
    assert "OVH_S3" in refused(
        recipe, OVH_S3_ENDPOINT="http://127.0.0.1:9", OVH_S3_ACCESS_KEY="", OVH_S3_SECRET_KEY=""
    )
    assert "127.0.0.1:9" in refused(recipe, OVH_S3_ENDPOINT="http://127.0.0.1:9")

    train(recipe, "max_steps=4")
    (tmp_path / "run" / "summary.json").unlink()
    assert "resume_from_checkpoint=auto" in refused(recipe)
    assert "another stream" in refused(recipe, "resume_from_checkpoint=auto", "seed=8")
