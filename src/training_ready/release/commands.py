"""The front door's commands of this room: `hub serve`, `hub check`, `release build`, `release publish`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from training_ready.release.publish import Progress

HUB_TOKEN = "TRAINING_READY_HUB_TOKEN"  # noqa: S105  (the variable's name)


def hub_serve(
    root: Annotated[Path, typer.Option(help="Folder that holds the models; created when missing.")],
    host: Annotated[
        str, typer.Option(help=f"Address to listen on; beyond loopback needs {HUB_TOKEN}.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 9800,
) -> None:
    """Serve a folder as a Hugging Face Hub, for laptops and machines without the internet.

    With TRAINING_READY_HUB_TOKEN set, every request must carry it as a token. Prints the variables that make
    huggingface_hub, transformers and the other commands use it, then runs until Ctrl-C.

    Example: training-ready hub serve --root ./hub
    """
    import signal
    import threading

    from rich.console import Console

    from training_ready.release.hub_blobs import HubError
    from training_ready.release.hub_server import EmbeddedHub, is_loopback

    token = os.environ.get(HUB_TOKEN) or None
    if token is None and not is_loopback(host):
        raise HubError(
            f"{host} can be reached by others: set {HUB_TOKEN} to a secret, or listen on 127.0.0.1"
        )
    with EmbeddedHub(root, port, host=host, token=token) as hub:
        print(f"export HF_ENDPOINT={hub.endpoint_url}\nexport HF_HUB_DISABLE_XET=1", flush=True)
        told = Console(stderr=True)
        told.print(f"Serving {root} at {hub.endpoint_url}; Ctrl-C stops it.", markup=False, highlight=False)
        if token:
            told.print(f"Clients need HF_TOKEN set to the value of {HUB_TOKEN}.", markup=False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            told.print("Stopped.")


def hub_check(
    root: Annotated[
        Path, typer.Option(help="Folder of a hub that is not running.", exists=True, file_okay=False)
    ],
    delete_unreferenced: Annotated[
        bool, typer.Option(help="Also delete contents that no commit of any model mentions.")
    ] = False,
) -> None:
    """Re-read every stored content and compare it with its sha256. Damaged ones are set aside in damaged/.

    A damaged content is missing afterwards, so publishing its model again uploads it again.

    Example: training-ready hub check --root ./hub
    """
    from training_ready.release.hub_blobs import HubError
    from training_ready.release.hub_store import HubStore

    with HubStore(root) as store:
        damaged = [path.name for path in store.blobs.damaged()]
        users = store.users_of(damaged)
        aside = [store.blobs.set_aside(sha256) for sha256 in damaged]
        models = len(store.repo_ids())
        freed = store.delete_unreferenced() if delete_unreferenced else None
    if freed is not None:
        typer.echo(f"deleted {freed} bytes that no commit mentions")
    if damaged:
        lines = [f"{path}: {', '.join(users[path.name]) or 'no commit uses it'}" for path in aside]
        listing = "\n  ".join(lines)
        raise HubError(f"{len(damaged)} damaged contents were set aside; publish these again:\n  {listing}")
    typer.echo(f"every content of {models} models in {root} has the sha256 it was stored with")


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
    folder: Annotated[Path, typer.Argument(help="A release folder.", exists=True, file_okay=False)],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub; created when missing.")],
    endpoint: Annotated[
        str | None, typer.Option(envvar="HF_ENDPOINT", help="Base URL of the hub; default: the public Hub.")
    ] = None,
    private: Annotated[bool, typer.Option(help="Visibility of a repository that is created.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the publication as JSON.")] = False,
) -> None:
    """Push a release in one commit, then read every file back and compare its sha256.

    The token comes from HF_TOKEN (or TRAINING_READY_HUB_TOKEN); on the public Hub the stored login works too.

    Example: training-ready release publish releases/quickstart me/quickstart --endpoint http://127.0.0.1:9800
    """
    from rich.console import Console

    from training_ready.release.publish import publish_release

    token = os.environ.get("HF_TOKEN") or os.environ.get(HUB_TOKEN) or None
    with _progress() as report:
        publication = publish_release(
            folder, repo_id, endpoint=endpoint, token=token, private=private, progress=report
        )
    if json:
        typer.echo(publication.as_json())
        return
    done = "pushed and read back" if publication.uploaded else "already there, read back"
    Console().print(
        f"{publication.url}: {done}, {len(publication.files)} files, "
        f"{sum(file.size for file in publication.files):,} bytes, revision {publication.revision}",
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
