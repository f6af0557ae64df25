"""What is asked for against what wraps the model, on real wrappers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from training_ready.recipe.sections import LaunchSection
from training_ready.training.placement import (
    Placement,
    PlacementError,
    asked_for,
    describe_parameters,
    found,
    refuse_other_placement,
)

NOTHING = LaunchSection()


def test_the_launchers_environment_says_what_is_asked_for() -> None:
    two = {"WORLD_SIZE": "2"}
    fsdp = {**two, "ACCELERATE_USE_FSDP": "true"}
    zero = {**two, "ACCELERATE_USE_DEEPSPEED": "true"}
    assert asked_for({}, native=False) == Placement(backend="one process", processes=1)
    assert asked_for(two, native=False) == Placement(backend="DDP", processes=2)
    assert asked_for(two, native=True).backend == "FSDP2 of transformers"
    assert asked_for({**fsdp, "FSDP_VERSION": "2"}, native=False).backend == "FSDP2"
    assert asked_for(fsdp, native=False).backend == "FSDP1"
    assert asked_for({**zero, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, native=False).zero == 3
    assert asked_for(zero, native=False).zero is None


def test_a_plain_model_is_found_as_one_process() -> None:
    assert found(nn.Linear(2, 2), 1, native=False) == Placement(backend="one process", processes=1)


@pytest.mark.parametrize(
    "asked",
    [
        Placement(backend="FSDP2", processes=2),
        Placement(backend="DeepSpeed", processes=2, zero=3),
        Placement(backend="DDP", processes=4),
    ],
)
def test_another_placement_is_refused(asked: Placement) -> None:
    got = Placement(backend="DDP", processes=2)
    with pytest.raises(PlacementError, match="wrapped as DDP, 2 processes"):
        refuse_other_placement(asked, got, NOTHING)
    refuse_other_placement(got, got, NOTHING)


def test_another_stage_of_zero_is_refused() -> None:
    second = Placement(backend="DeepSpeed", processes=2, zero=2)
    with pytest.raises(PlacementError, match="ZeRO-3"):
        refuse_other_placement(Placement(backend="DeepSpeed", processes=2, zero=3), second, NOTHING)
    refuse_other_placement(Placement(backend="DeepSpeed", processes=2), second, NOTHING)


def test_fewer_processes_than_the_recipe_asks_for_are_refused() -> None:
    one = Placement(backend="one process", processes=1)
    with pytest.raises(PlacementError, match=r"launch\.num_processes=1"):
        refuse_other_placement(one, one, LaunchSection(num_processes=2))
    refuse_other_placement(one, one, LaunchSection(num_processes=1))


def test_a_recipe_that_shards_is_not_run_unsharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "accelerate_configs").mkdir()
    (tmp_path / "accelerate_configs" / "fsdp2.yaml").write_text("distributed_type: FSDP\n", encoding="utf-8")
    (tmp_path / "ddp.yaml").write_text("distributed_type: MULTI_GPU\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    one = Placement(backend="one process", processes=1)
    with pytest.raises(
        PlacementError, match=r"accelerate launch --config_file accelerate_configs/fsdp2\.yaml"
    ):
        refuse_other_placement(one, one, LaunchSection(accelerate_config="fsdp2"))
    refuse_other_placement(one, one, LaunchSection(accelerate_config="ddp.yaml"))
    refuse_other_placement(
        Placement(backend="FSDP2", processes=1),
        Placement(backend="FSDP2", processes=1),
        LaunchSection(accelerate_config="fsdp2"),
    )


def test_parameters_are_described_in_bytes() -> None:
    assert describe_parameters(nn.Linear(1000, 1000, bias=False, dtype=torch.bfloat16)) == (
        "0.002 of 0.002 GB of parameters on cpu of rank 0"
    )


def refusal(recipe: Path, environment: dict[str, str], *overrides: str, processes: int, **more: str) -> str:
    """Why a run without the checks that come before it is refused."""
    output_dir = recipe.parent / "run"
    jobs = recipe.with_suffix(".json")
    jobs.write_text(json.dumps([[str(recipe), list(overrides)]]), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [
            sys.executable,
            *(launcher if processes > 1 else []),
            str(Path(__file__).with_name("moe_runs.py")),
            str(jobs),
        ],
        env={**os.environ, **environment, "ACCELERATE_USE_CPU": "1", **more},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return (output_dir / "refused.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_fsdp_that_gives_way_to_ddp_on_a_cpu_stops_the_run(
    recipe: Path, corpus_environment: dict[str, str]
) -> None:
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    reason = refusal(recipe, corpus_environment, processes=2, **fsdp)
    assert "asked for FSDP2, 2 processes, but the model is wrapped as DDP, 2 processes" in reason


def test_one_process_where_the_recipe_wants_two_stops_the_run(
    recipe: Path, corpus_environment: dict[str, str]
) -> None:
    reason = refusal(recipe, corpus_environment, "launch.num_processes=2", processes=1)
    assert "launch.num_processes 2, and 1 run" in reason
