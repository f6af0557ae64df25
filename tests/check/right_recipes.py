"""Recipes that are right, one key per line: what is wrong with a recipe is one change of them."""

from __future__ import annotations

from pathlib import Path

Keys = dict[str, str | None]


def _recipe(name: str) -> Keys:
    text = (Path(__file__).parent / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return dict(line.split(": ", 1) for line in text.splitlines())


SCRATCH, LORA, MOE, FULL = (_recipe(name) for name in ("scratch", "lora", "moe", "full"))
