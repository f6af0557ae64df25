"""How long is a step? A few of them, trained for real beside the run; the check finds them as any finished run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training_ready import TrainingReadyError
from training_ready.check.processes import topology_of
from training_ready.recipe.load import load_recipe


class TrialError(TrainingReadyError):
    """The trial did not end well."""


def run_trial(path: Path, overrides: Sequence[str], steps: int) -> Path:
    """Train ``steps`` steps into ``<output_dir>-trial-<steps>``, on the topology of the recipe; returns that folder.

    A trial that is there already is not repeated. What it says goes to stderr.

    Raises:
        TrialError: it failed.
    """
    recipe = load_recipe(path, overrides)
    topology = topology_of(recipe)
    folder = recipe.output_dir.with_name(f"{recipe.output_dir.name}-trial-{steps}")
    launcher = [sys.executable, "-m"]
    if topology.path is not None and topology.processes > 1:
        launcher += ["accelerate.commands.launch", "--config_file", str(topology.path)]
        launcher += ["--num_processes", str(topology.processes), "--module"]
    trial = {
        "output_dir": folder,
        "max_steps": steps,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "steps",  # a run is finished when it has a checkpoint
        "save_steps": steps,
        "save_total_limit": 1,
        "load_best_model_at_end": False,
        "checkpoint.mirror": False,
        "resume_from_checkpoint": "auto",
    }
    command = [*launcher, __spec__.name, str(path), *overrides]
    command += [f"{key}={value}" for key, value in trial.items()]
    if subprocess.run(command, stdout=sys.stderr).returncode:  # stdout is the report's
        raise TrialError(f"the trial of {steps} steps failed; what it said stands above")
    for checkpoint in folder.glob("checkpoint-*"):  # times are all that it was for
        shutil.rmtree(checkpoint)
    return folder


if __name__ == "__main__":  # the process that trains: nothing is checked in it, the report comes afterwards
    from training_ready.training.main import main

    sys.exit(main(sys.argv[1:]))
