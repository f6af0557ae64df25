"""The front door's commands of a release: `release build`, `release publish`. The hub's: :mod:`.hub_commands`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_ready.release.hub_commands import OnlyWriter

if TYPE_CHECKING:
    from training_ready.release.publish import Progress


def release_build(
    run_folder: Annotated[
        Path, typer.Argument(help="The folder of a finished run.", exists=True, file_okay=False)
    ],
    folder: Annotated[
        Path, typer.Argument(help="Where the release goes; an earlier release there is replaced.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="release.KEY=VALUE pairs over what the run's recipe says.")
    ] = None,
) -> None:
    """Turn a finished run into a release folder: safetensors, tokenizer, chat template, model card.

    Example: training-ready release build runs/quickstart releases/quickstart
    """
    from rich.console import Console

    from training_ready.recipe.load import load_recipe
    from training_ready.release.build import build_release

    recipe = load_recipe(run_folder / "recipe.yaml", overrides or ())
    console = Console()
    with console.status(f"Exporting {run_folder}"):
        files = build_release(run_folder, folder, recipe.release)
    size = sum(file.size for file in files)
    console.print(
        f"{folder}: {len(files)} files, {size:,} bytes", markup=False, highlight=False, soft_wrap=True
    )
    target = recipe.release.repo_id or "OWNER/NAME"
    console.print(f"Next: training-ready release publish {folder} {target}", markup=False, soft_wrap=True)


def release_publish(
    folder: Annotated[
        Path, typer.Argument(help="A release folder or a verified export.", exists=True, file_okay=False)
    ],
    target: Annotated[
        str, typer.Argument(help="owner/name on a hub, s3://bucket/models/name, or a folder (/… or ./…).")
    ],
    endpoint: Annotated[
        str | None, typer.Option(envvar="HF_ENDPOINT", help="Base URL of the hub; default: the public Hub.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Visibility of a repository that is created.")] = True,
    only_writer: OnlyWriter = False,
    replace: Annotated[
        bool, typer.Option(help="Also take the place of another model's release, or of what is no release.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the publication as JSON.")] = False,
) -> None:
    """Publish a release under its own revision, read every file back, and only then move `main` to it.

    Interrupted or refused at any moment, the same command continues. The token of a hub comes from HF_TOKEN (else
    TRAINING_READY_HUB_TOKEN, on the public Hub the stored login). A bucket is that of the OVH_S3_ variables.

    Example: training-ready release publish releases/quickstart me/quickstart --endpoint http://127.0.0.1:9800
    """
    from rich.console import Console

    from training_ready.release.connection import hub_endpoint, token_for
    from training_ready.release.publish import publish_release

    token = token_for(hub_endpoint(endpoint))
    with _progress() as report:
        publication = publish_release(
            folder,
            target,
            endpoint=endpoint,
            token=token,
            private=private,
            only_writer=only_writer,
            replace=replace,
            progress=report,
        )
    if json:
        typer.echo(publication.as_json())
        return
    done = "pushed and read back" if publication.uploaded else "already there, read back"
    Console().print(
        f"{publication.url}: {done}, {len(publication.files)} files, "
        f"{sum(file.size for file in publication.files):,} bytes, main is {publication.name} at {publication.revision}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    """One bar per phase of a publication, on stderr; nothing when it is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:9}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bars(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks = {}

        def report(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield report
