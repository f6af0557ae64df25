"""The check at the start of training: in one process, and once for two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = str(REPOSITORY / "scripts" / "run_sft.py")
RECIPE = Path(__file__).parent / "recipes" / "scratch.yaml"
Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def launch(environment: pytest.MonkeyPatch, tmp_path: Path) -> Launch:
    """Starts the training script with a recipe of this test's folder, memory not traced."""
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.read_text(encoding="utf-8").replace("HERE", str(tmp_path))
    recipe.write_text(text.replace("launch: {accelerate_config: cpu}\n", ""), encoding="utf-8")
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def run(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
        before = [word for word in arguments if "=" not in word]
        after = [word for word in arguments if "=" in word]
        command = [*(two if processes == 2 else []), SCRIPT, "--skip", "memory", *before, str(recipe), *after]
        variables = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *command], env=variables, capture_output=True, text=True, timeout=300
        )

    return run


def test_a_refused_run_is_refused_once_and_leaves_nothing(launch: Launch, tmp_path: Path) -> None:
    done = launch("max_length=48", processes=2)
    assert done.returncode == 1
    assert done.stderr.count("was not started") == 1
    assert "`max_length`" in done.stderr
    assert f'File "{SCRIPT}"' not in done.stderr  # the launcher's own traceback is all there is
    assert not (tmp_path / "runs").exists()


def test_a_recipe_at_fault_is_refused_before_the_check(launch: Launch) -> None:
    done = launch("learning_rte=1")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "did you mean `learning_rate`" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_skipped_probe_lets_the_run_start_and_the_check_is_made_once(
    launch: Launch, processes: int, tmp_path: Path
) -> None:
    done = launch(
        "--skip",
        "data",
        "max_length=48",
        "max_steps=2",
        "save_steps=2",
        "eval_steps=2",
        "logging_steps=1",
        "warmup_steps=0",
        processes=processes,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0 failed") == 1
    assert (tmp_path / "runs" / "scratch" / "summary.json").exists()
