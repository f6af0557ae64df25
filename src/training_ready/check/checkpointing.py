"""Is activation checkpointing on, and how? TRL has two names for it, and the older one is on unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training_ready.recipe.recipe import Recipe


def checkpointing_on(recipe: Recipe) -> bool:
    """Whether the run recomputes activations: ``activation_checkpointing`` if it is set, else TRL's default."""
    chosen = recipe.effective("activation_checkpointing")
    return bool(recipe.effective("gradient_checkpointing") if chosen is None else chosen)


def checkpointing_options(recipe: Recipe) -> Mapping[str, Any]:
    """Its keyword arguments, under whichever name they are set."""
    keys = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    return next((recipe.effective(key) for key in keys if recipe.effective(key)), {})
