"""A recipe for the eye: every value beside the place where it was written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from training_ready.recipe.faults import DEFAULT, Origin
from training_ready.recipe.recipe import Recipe
from training_ready.recipe.sections import SECTIONS
from training_ready.recipe.trl_keys import CORPUS_INSTEAD, trl_keys

Row = tuple[str, Any, str]


def rows(recipe: Recipe, *, every: bool = False) -> list[Row]:
    """(key, value, origin) of every set key and of our sections' defaults; with ``every`` of TRL's too."""
    values: dict[str, Any] = {}
    for name, key in trl_keys().items():
        if name in recipe.trl:
            values[name] = recipe.trl[name]
        elif every and name not in CORPUS_INSTEAD:
            values[name] = key.default
    values |= {name: getattr(recipe, name).model_dump() for name in SECTIONS}
    values |= {"env": dict(recipe.env)}
    flat = [row for name, value in values.items() for row in _flat(name, value)]
    return [(key, value, str(recipe.origins.get(key, Origin(DEFAULT)))) for key, value in flat]


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, child in value.items():
            yield from _flat(f"{key}.{name}", child)
    else:
        yield key, value


def as_json_text(recipe: Recipe, *, every: bool = False) -> str:
    """The rows for a machine, with the identity of the recipe."""
    values = [
        {"key": key, "value": value, "origin": origin} for key, value, origin in rows(recipe, every=every)
    ]
    found = {"name": recipe.name, "path": str(recipe.path), "sha256": recipe.sha256, "values": values}
    return json.dumps(found, indent=2, ensure_ascii=False)


def as_table(recipe: Recipe, *, every: bool = False) -> None:
    """Print the rows as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{recipe.name}  sha256 {recipe.sha256[:12]}", title_justify="left", box=None)
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("from", no_wrap=True)
    for key, value, origin in rows(recipe, every=every):
        style = "dim" if origin == DEFAULT else ""
        shown = json.dumps(value, ensure_ascii=False)
        table.add_row(*(Text(cell, style=style) for cell in (key, shown, origin)))
    console = Console()
    if not console.is_terminal:
        console = Console(width=1000)  # a file has no edge to fold at
    console.print(table)
