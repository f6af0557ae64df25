"""How long is a step? A few of them, trained for real beside the run; the check finds them as any finished run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from training_ready import TrainingReadyError
from training_ready.check.processes import Topology, topology_of
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
    command = [*_launcher(topology), __spec__.name, str(path), *overrides]
    command += [f"{key}={value}" for key, value in trial.items()]
    variables = {**os.environ, **({"ACCELERATE_USE_CPU": "1"} if topology.use_cpu else {})}
    if subprocess.run(command, stdout=sys.stderr, env=variables).returncode:  # stdout is the report's
        raise TrialError(f"the trial of {steps} steps failed; what it said stands above")
    for checkpoint in folder.glob("checkpoint-*"):  # times are all that it was for
        shutil.rmtree(checkpoint)
    return folder


def _launcher(topology: Topology) -> list[str]:
    """What starts a module in every process of the topology. On a CPU accelerate starts one, torchrun all."""
    count = str(topology.processes)
    if topology.processes == 1:
        words = []
    elif topology.path is None or topology.use_cpu:
        words = ["torch.distributed.run", "--standalone", "--nproc-per-node", count, "--module"]
    else:
        words = ["accelerate.commands.launch", "--config_file", str(topology.path)]
        words += ["--num_processes", count, "--module"]
    return [sys.executable, "-m", *words]


if __name__ == "__main__":  # the process that trains: nothing is checked in it, the report comes afterwards
    from training_ready.training.main import main

    sys.exit(main(sys.argv[1:]))
