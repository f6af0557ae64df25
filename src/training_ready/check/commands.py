"""The front door's command of this room: ``training-ready check``."""

from __future__ import annotations

from typing import Annotated

import typer

from training_ready.recipe.commands import Overrides, RecipePath


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Leave bucket, hub and network alone, and say so.")
    ] = False,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", help="A probe to leave out, by name; repeat for several.")
    ] = None,
    trial: Annotated[
        int | None,
        typer.Option(help="First train so many steps beside the run, to measure time and cost.", min=2),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print for a machine.")] = False,
) -> None:
    """Examine a recipe before it costs a GPU-hour: every probe that can run, no weight loaded; exit 1 if one fails.

    Example: training-ready check recipes/quickstart.yaml --offline
    """
    import json
    import os
    import warnings

    from rich.console import Console

    from training_ready.check.run import check_recipe
    from training_ready.check.show import show

    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft 0.21 asks transformers 5.23 by a deprecated name; remove when it does not.
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    chosen, console = overrides or [], Console(stderr=as_json)
    if trial is not None:
        from training_ready.check.trial import run_trial

        run_trial(recipe, chosen, trial)
    with console.status("reading the recipe") as status:
        report = check_recipe(
            recipe,
            chosen,
            offline=offline,
            skip=skip or [],
            told=lambda probe: status.update(f"probe {probe}"),
        )
    if as_json:
        typer.echo(json.dumps(report.as_json(), indent=1, ensure_ascii=False))
    else:
        show(report, console)
    if not report.passed:
        raise typer.Exit(1)
