"""Read a recipe: file, bases, command line, environment, types, ranges, pairs. All faults are reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping as Environment
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_ready.recipe.confidential import without_secrets
from training_ready.recipe.conflicts import impossible_pairs
from training_ready.recipe.faults import DEFAULT, Fault, Origin, RecipeError
from training_ready.recipe.inherit import read_with_bases
from training_ready.recipe.interpolate import interpolate
from training_ready.recipe.legacy import DATA_KEYS, family_of
from training_ready.recipe.overrides import apply_overrides
from training_ready.recipe.recipe import Recipe
from training_ready.recipe.sections import SECTIONS
from training_ready.recipe.tree import Mapping
from training_ready.recipe.trl_keys import trl_keys
from training_ready.recipe.typed import Typed, type_tree
from training_ready.recipe.yaml_file import UnreadableYaml


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, environment: Environment[str, str] | None = None
) -> Recipe:
    """The recipe at ``path`` with ``overrides`` (``a.b=value``, ``--a.b value``) on top.

    ``${NAME}`` reads ``environment`` (default: the process's). Nothing is exported and nothing is written.
    Raises ``RecipeError`` with every fault of the recipe, sorted by file and line.
    """
    path = Path(path)
    try:
        tree, faults = read_with_bases(path)
    except UnreadableYaml as error:
        raise RecipeError(str(path), [error.fault], advice=_advice_unread(path)) from None
    tree, found = apply_overrides(tree, overrides)
    if "extends" in tree.entries:
        base = tree.entries.pop("extends")
        found.append(
            Fault(base.origin, "extends", "is a key of files only; write a recipe that extends both")
        )
    family = family_of(tree.entries)
    tree, secrets = without_secrets(tree)
    tree, unresolved = interpolate(tree, os.environ if environment is None else environment)
    advice = (
        f"this looks like a recipe of {family}; run: training-ready recipe migrate {path}" if family else None
    )
    return recipe_from_tree(path, tree, [*faults, *found, *secrets, *unresolved], advice=advice)


def recipe_from_tree(
    path: Path, tree: Mapping, faults: Sequence[Fault], *, advice: str | None = None
) -> Recipe:
    """The recipe that a merged tree describes. Raises ``RecipeError`` with ``faults`` and all that are found here."""
    tree, secrets = without_secrets(tree)  # also what a reference to the environment brought in
    typed = type_tree(tree)
    found = [*faults, *secrets, *typed.faults, *_missing_data(path, tree, faults)]
    found += impossible_pairs(typed, Origin(str(path), 1))
    if found:
        raise RecipeError(str(path), found, advice=advice)
    return _assembled(path, typed)


def _advice_unread(path: Path) -> str | None:
    if path.exists():
        return None
    return "`training-ready recipe ls` lists the shipped recipes; `training-ready recipe cp NAME` copies one to edit"


def _missing_data(path: Path, tree: Mapping, faults: Sequence[Fault]) -> list[Fault]:
    if "data" in tree.entries or not DATA_KEYS.keys().isdisjoint(
        {*tree.entries, *(one.key for one in faults)}
    ):
        return []
    message = "is missing; name a built corpus: `data: {corpus: final_dataset/<name>/manifest.json}`"
    return [Fault(Origin(str(path), 1), "data", message)]


_FOLDER = re.compile(r"\w[\w.\-]*")


def _assembled(path: Path, typed: Typed) -> Recipe:
    trl = dict(typed.trl)
    name = trl.get("run_name") or Path(trl.get("output_dir") or "").name or path.stem
    if trl.get("output_dir") is None:
        if not _FOLDER.fullmatch(name):
            message = f"{name!r} names the folder runs/<run_name>: letters, digits and . _ - only, or set `output_dir`"
            origin = typed.origins.get("run_name", Origin(str(path), 1))
            raise RecipeError(str(path), [Fault(origin, "run_name", message)])
        trl["output_dir"] = f"runs/{name}"
        typed.origins["output_dir"] = Origin(DEFAULT)
    ordered = {key: trl[key] for key in trl_keys() if key in trl}
    sections: dict[str, Any] = {key: typed.sections.get(key) or model() for key, model in SECTIONS.items()}
    return Recipe(path=path, name=name, trl=ordered, env=typed.env, origins=typed.origins, **sections)
