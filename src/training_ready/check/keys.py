"""Can the recipe be read, and is every key in it one that this trainer reads?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, failed, passed
from training_ready.recipe.faults import RecipeError
from training_ready.recipe.load import load_recipe
from training_ready.recipe.recipe import Recipe


def read_recipe(path: str | Path, overrides: Sequence[str]) -> tuple[Recipe | None, list[Finding]]:
    """The recipe, or every fault of it as a finding."""
    try:
        return load_recipe(path, overrides), []
    except RecipeError as error:
        return None, [
            failed(fault.message, key=fault.key or None, where=str(fault.origin)) for fault in error.faults
        ]


def probe_keys(context: CheckContext) -> list[Finding]:
    """Keys that are valid for TRL, yet that nothing here would read."""
    from training_ready.training.elsewhere import unread

    recipe = context.recipe
    ignored = [
        failed(f"`{key}` would be ignored", key=key, fix=f"remove it: {instead}")
        for key, instead in unread(recipe)
    ]
    written = [key for key in recipe.origins if context.is_set(key)]
    return ignored or [passed(f"{len(written)} values, each known and typed", sha256=recipe.sha256)]
