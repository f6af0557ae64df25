"""A checkout with one topology of each kind and a recipe that renders, in a temporary working directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from training_ready.recipe.load import load_recipe
from training_ready.recipe.recipe import Recipe

REPOSITORY = Path(__file__).parents[2]

RECIPE = """\
# A run on two L40S.
model_name_or_path: some/model
data:
  corpus: final_dataset/made/manifest.json
bf16: true
budget:
  max_hours: 5.5
launch:
  accelerate_config: ddp
  num_processes: 2
  ovh:
    image: registry.gra.example/people/training-ready:1.2
    flavor: l40s-1-gpu
    gpus: 2
    region: GRA
    timeout_hours: 6
    env:
      HF_HOME: /workspace/.hf
      GREETING: "it's quoted"
    volumes:
      - shared-models@S3GRA/mixtral/step-123:/models:ro:cache
      - runs@S3GRA:/workspace/training-ready/runs:RW
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: ``recipes/two.yaml`` and the shipped topologies."""
    shutil.copytree(REPOSITORY / "accelerate_configs", tmp_path / "accelerate_configs")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "two.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(checkout: Path) -> Callable[..., Recipe]:
    """``recipe("a.b=value", …)``: the recipe of the checkout with overrides."""
    return lambda *overrides: load_recipe("recipes/two.yaml", overrides, environment={})
