"""How long is a step? A few of them, trained for real beside the run; the check finds them as any finished run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training_ready import TrainingReadyError
from training_ready.check.processes import topology_of
from training_ready.check.run import PROBES
from training_ready.recipe.load import load_recipe
from training_ready.recipe.shipped import shipped_root


class TrialError(TrainingReadyError):
    """The trial did not end well."""


def run_trial(path: Path, overrides: Sequence[str], steps: int) -> Path:
    """Train ``steps`` steps into ``<output_dir>-trial-<steps>``, on the topology of the recipe; returns that folder.

    Raises:
        TrialError: there is no script to start (an installed wheel), or it failed.
    """
    recipe = load_recipe(path, overrides)
    topology = topology_of(recipe)
    script = shipped_root() / "scripts" / "run_sft.py"
    if not script.is_file():
        raise TrialError(f"--trial needs a checkout: there is no {script}")
    folder = recipe.output_dir.with_name(f"{recipe.output_dir.name}-trial-{steps}")
    launcher = [sys.executable]
    if topology.path is not None and topology.processes > 1:
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(topology.path)]
        launcher += ["--num_processes", str(topology.processes)]
    trial = {
        "output_dir": folder,
        "max_steps": steps,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": steps,
        "save_total_limit": 1,
        "resume_from_checkpoint": "auto",
    }
    skipped = [word for name in PROBES[1:] for word in ("--skip", name)]
    command = [*launcher, str(script), *skipped, str(path), *overrides]
    command += [f"{key}={value}" for key, value in trial.items()]
    if subprocess.run(command).returncode:
        raise TrialError(f"the trial of {steps} steps failed; what it said stands above")
    return folder
