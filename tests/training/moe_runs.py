"""Several runs in one process (or one process per rank), because importing the trainer costs more than a tiny run.

``moe_runs.py JOBS.json`` with a list of [recipe, [override, ...]]; a run that is refused writes the reason to
``refused.txt`` in its output_dir instead.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rich.console import Console

from training_ready import TrainingReadyError
from training_ready.recipe.load import load_recipe


def main(jobs: Path) -> None:
    from training_ready.training.run import run_sft

    for recipe_path, overrides in json.loads(jobs.read_text(encoding="utf-8")):
        recipe = load_recipe(recipe_path, overrides)
        try:
            run_sft(recipe, Console(quiet=True))
        except TrainingReadyError as error:
            recipe.output_dir.mkdir(parents=True, exist_ok=True)
            if os.environ.get("RANK", "0") == "0":
                (recipe.output_dir / "refused.txt").write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
