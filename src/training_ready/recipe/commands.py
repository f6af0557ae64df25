"""``training-ready recipe ...``: look at, copy, translate recipes. Nothing here needs a GPU, torch or the network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TAKES_OVERRIDES = {"ignore_unknown_options": True}
"""Click settings of a command whose arguments may be ``--key value`` of the recipe itself."""

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values on top: key=value or --key value."),
]


def recipe_show(
    recipe: RecipePath,
    overrides: Overrides = None,
    every: Annotated[bool, typer.Option("--all", help="Show TRL's own defaults too.")] = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="Print the resolved recipe as a file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print for a machine.")] = False,
) -> None:
    """Print the resolved recipe with the origin of every value.

    Example: training-ready recipe show recipes/sft.yaml max_steps=10
    """
    from training_ready.recipe.load import load_recipe
    from training_ready.recipe.show import as_json_text, as_table

    loaded = load_recipe(recipe, overrides or ())
    if as_yaml:
        typer.echo(loaded.to_yaml(), nl=False)
    elif as_json:
        typer.echo(as_json_text(loaded, every=every))
    else:
        as_table(loaded, every=every)


def recipe_ls(as_json: Annotated[bool, typer.Option("--json", help="Print for a machine.")] = False) -> None:
    """List the shipped recipes, one line each.

    Example: training-ready recipe ls
    """
    import json

    from training_ready.recipe.shipped import shipped

    found = shipped()
    if as_json:
        entries = [{"name": one.name, "path": str(one.path), "description": one.description} for one in found]
        typer.echo(json.dumps(entries, indent=2))
        return
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        typer.echo(f"{one.name:<{width}}  {one.description}")


def recipe_cp(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that `recipe ls` lists.")],
    destination: Annotated[Path | None, typer.Argument(metavar="[DEST]", help="A file or a folder.")] = None,
) -> None:
    """Copy a shipped recipe to edit, with what it extends and the schema for the editor.

    Example: training-ready recipe cp sft my-run.yaml
    """
    from training_ready.recipe.json_schema import schema_text
    from training_ready.recipe.shipped import SCHEMA_NAME, copy_recipe

    written = copy_recipe(name, destination)
    help_file = written[0].parent / SCHEMA_NAME
    help_file.write_text(schema_text(), encoding="utf-8")
    for path in [*written, help_file]:
        typer.echo(f"wrote {path}")


def recipe_schema() -> None:
    """Print the JSON Schema of the recipe language.

    Example: training-ready recipe schema > recipe.schema.json
    """
    from training_ready.recipe.json_schema import schema_text

    typer.echo(schema_text(), nl=False)


def recipe_migrate(
    old: Annotated[
        Path, typer.Argument(metavar="OLD", help="A recipe of alignment-handbook, open-r1 or older TRL.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: OLD's name in this folder.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="The built corpus that takes the place of the old recipe's datasets.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="A key to leave out although it means something.")
    ] = None,
) -> None:
    """Translate an older recipe into ours and list every change; what cannot be kept exactly is an error.

    Example: training-ready recipe migrate old.yaml --corpus final_dataset/therapeutic/manifest.json
    """
    from training_ready.recipe.migrate import migrate

    target = output or Path(f"{old.stem}-migrated.yaml")
    translated = migrate(old, corpus=corpus, output=target, drop=drop or ())
    for path in translated.write(target):
        typer.echo(f"wrote {path}")
    for change in translated.changes:
        typer.echo(f"{change.origin}  {change.old} -> {change.new or '(gone)'}\n    {change.meaning}")
