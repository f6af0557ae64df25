"""Recipes written into a temporary folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SMALLEST = """\
# smallest
model_name_or_path: org/model
data:
  corpus: final_dataset/x/manifest.json
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(text, name="recipe.yaml")`` puts a file into the test's folder."""

    def put(text: str = SMALLEST, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return put


@pytest.fixture
def smallest() -> str:
    """The smallest recipe that is correct."""
    return SMALLEST
