"""The front door's commands of the hub: `hub serve`, `hub check`, `hub token`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training_ready.release.connection import HUB_TOKEN

if TYPE_CHECKING:
    from training_ready.release.places import Place

HUB_READ_TOKEN = "TRAINING_READY_HUB_READ_TOKEN"  # noqa: S105  (the variable's name)

Root = Annotated[str, typer.Option(help="Folder or s3://bucket/prefix that holds the models.")]
OnlyWriter = Annotated[
    bool,
    typer.Option(help="Nobody else writes there: for a bucket that ignores conditional writes."),
]


def _existing(root: str, only_writer: bool) -> Place:
    """The place of a hub that was begun before; nothing is made where there is none. Raises HubError."""
    from training_ready.release.hub_blobs import HubError
    from training_ready.release.hub_tokens import FILE
    from training_ready.release.places import open_place

    none = HubError(
        f"there is no hub in {root}: it holds neither a model nor a token. Correct --root; the first token of a new "
        f"hub is made by: training-ready hub token add NAME --root {root} --create"
    )
    if "://" not in root and not any((Path(root) / name).exists() for name in ("repos", "blobs", FILE)):
        raise none
    place = open_place(root, only_writer=only_writer)
    held = (name for folder in ("repos/", "blobs/") for name in place.names(folder))
    if place.size(FILE) is None and next(held, None) is None:
        raise none
    return place


def hub_serve(
    root: Root,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 9800,
    only_writer: OnlyWriter = False,
) -> None:
    """Serve a folder or a bucket as a Hugging Face Hub, for laptops and machines without the internet.

    With a token made by `hub token add`, or one in TRAINING_READY_HUB_TOKEN (reads and writes) or
    TRAINING_READY_HUB_READ_TOKEN (reads), every request must carry one. Prints the variables that make
    huggingface_hub, transformers and the other commands use it, then runs until Ctrl-C.

    Example: training-ready hub serve --root ./hub
    """
    import signal
    import threading

    from rich.console import Console

    from training_ready.release.hub_blobs import HubError
    from training_ready.release.hub_server import EmbeddedHub, is_loopback
    from training_ready.release.hub_tokens import list_tokens
    from training_ready.release.places import open_place

    place = open_place(str(root), only_writer=only_writer)
    token, read_token = (os.environ.get(name) or None for name in (HUB_TOKEN, HUB_READ_TOKEN))
    wanted = bool(token or read_token or list_tokens(place))
    if not wanted and not is_loopback(host):
        raise HubError(
            f"{host} can be reached by others: make a token (training-ready hub token add NAME --root {root} "
            f"--create), set {HUB_TOKEN} to a secret, or listen on 127.0.0.1"
        )
    with EmbeddedHub(place, port, host=host, token=token, read_token=read_token) as hub:
        print(f"export HF_ENDPOINT={hub.endpoint_url}\nexport HF_HUB_DISABLE_XET=1", flush=True)
        told = Console(stderr=True)
        told.print(f"Serving {root} at {hub.endpoint_url}; Ctrl-C stops it.", markup=False, highlight=False)
        if hub.app.state.tokens.callers() is not None:
            told.print("Clients need HF_TOKEN set to a token of this hub.", markup=False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            told.print("Stopped.")


def hub_check(
    root: Annotated[str, typer.Option(help="Folder or s3://bucket/prefix of a hub that is not running.")],
    delete_unreferenced: Annotated[
        bool, typer.Option(help="Also delete contents that no commit of any model mentions.")
    ] = False,
    only_writer: OnlyWriter = False,
) -> None:
    """Re-read every stored content and compare it with its sha256. Damaged ones are set aside in damaged/.

    A damaged content is missing afterwards, so publishing its model again uploads it again. Models whose commits or
    branches cannot be read are named. A bucket has no lock: to delete there, stop every hub and say --only-writer.

    Example: training-ready hub check --root ./hub
    """
    from training_ready.release.hub_blobs import HubError
    from training_ready.release.hub_store import HubStore

    with HubStore(_existing(str(root), only_writer)) as store:
        if delete_unreferenced:
            typer.echo(f"deleted {store.delete_unreferenced()} bytes that no commit mentions")
        damaged = list(store.blobs.damaged())
        users = store.users_of(damaged)
        aside = {sha256: store.blobs.set_aside(sha256) for sha256 in damaged}
        models, unreadable = len(store.repo_ids()), store.damaged_repos()
    faults = []
    if damaged:
        faults.append(f"{len(damaged)} damaged contents were set aside; publish these again:")
        faults += [
            f"  {path}: {', '.join(users[sha256]) or 'no commit uses it'}" for sha256, path in aside.items()
        ]
    if unreadable:
        faults.append(f"{len(unreadable)} of {models} models cannot be read; delete and publish them again:")
        faults += [f"  {repo_id}: {why}" for repo_id, why in unreadable.items()]
    if faults:
        raise HubError("\n".join(faults))
    typer.echo(
        f"every content of {models} model{'s' * (models != 1)} in {root} has the sha256 it was stored with"
    )


def hub_token_add(
    name: Annotated[str, typer.Argument(help="Whose token it is, for `hub token ls` and `revoke`.")],
    root: Root,
    scope: Annotated[str, typer.Option(help="read or write.")] = "read",
    create: Annotated[bool, typer.Option(help="Begin a hub there if there is none.")] = False,
    only_writer: OnlyWriter = False,
) -> None:
    """Make a token and print it, this once: only its sha256 is kept. A running hub knows it within a second.

    Example: training-ready hub token add laptop --root ./hub --scope write
    """
    from training_ready.release.hub_blobs import HubError
    from training_ready.release.hub_tokens import add_token
    from training_ready.release.places import open_place

    if scope not in ("read", "write"):
        raise HubError(f"the scope {scope!r} is neither read nor write")
    place = open_place(root, only_writer=only_writer) if create else _existing(root, only_writer)
    typer.echo(add_token(place, name, "write" if scope == "write" else "read"))


def hub_token_revoke(
    name: Annotated[str, typer.Argument(help="The name it was made with.")],
    root: Root,
    only_writer: OnlyWriter = False,
) -> None:
    """Take a token back; a running hub refuses it within a second.

    Example: training-ready hub token revoke laptop --root ./hub
    """
    from training_ready.release.hub_tokens import revoke_token

    revoke_token(_existing(root, only_writer), name)
    typer.echo(f"the token {name} is revoked")


def hub_token_ls(root: Root, only_writer: OnlyWriter = False) -> None:
    """Names, scopes and dates of the tokens; the tokens themselves are not kept.

    Example: training-ready hub token ls --root ./hub
    """
    from training_ready.release.hub_tokens import list_tokens

    for name, facts in list_tokens(_existing(root, only_writer)).items():
        typer.echo(f"{name}  {facts['scope']}  {facts['created_at']}")
