"""``training-ready launch …``: a recipe as a job of a platform."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def launch_ovh(
    recipe: Annotated[Path, typer.Argument(help="Recipe with a launch.ovh section.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as for training; repeated in the job's command.")
    ] = None,
    print_: Annotated[bool, typer.Option("--print", help="Print the job and start nothing.")] = False,
    json_: Annotated[
        bool, typer.Option("--json", help="With --print: spec, endpoint and line as JSON.")
    ] = False,
) -> None:
    """Render a recipe as an OVHcloud AI Training job: its JobSpec, checked, and the same job as an `ovhai` line.

    Example: training-ready launch ovh recipes/moe.yaml --print
    """
    import json

    from training_ready.platforms.ovh import PlatformError, command_line, endpoint, job_spec, render
    from training_ready.recipe.load import load_recipe

    if not print_:
        raise PlatformError(
            "launching is not built yet. Use --print, and start the job yourself: run the `ovhai job run` line that "
            "it ends with, or POST the spec to the platform (docs/launch.md)."
        )
    words = overrides or []
    loaded = load_recipe(recipe, words)
    if not json_:
        typer.echo(render(loaded, words), nl=False)
        return
    spec = job_spec(loaded, words)
    region = loaded.launch.ovh.region if loaded.launch.ovh else ""
    found = {"spec": spec, "endpoint": endpoint(region), "command_line": command_line(spec)}
    typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
