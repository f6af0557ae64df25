"""The store's commands: ``store serve``, ``data verify``, ``data upload``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training_ready import TrainingReadyError


def store_serve(
    root: Annotated[Path, typer.Argument(help="Folder to serve: its sub-folders are the buckets.")],
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 9900,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    bucket: Annotated[str | None, typer.Option(help="Bucket to create; default: the settings' one.")] = None,
) -> None:
    """Serve a folder as a real S3 store, for work without an account. What is stored there stays.

    Prints the variables that make every other command use it, then runs until Ctrl-C.

    Example: training-ready store serve ./buckets
    """
    import shlex
    import sys

    from rich.console import Console

    from training_ready.storage.embedded import EmbeddedStore
    from training_ready.storage.errors import StorageError
    from training_ready.storage.objects import ObjectStore
    from training_ready.storage.settings import StorageSettings

    told = Console(stderr=True)
    with EmbeddedStore(root, port, host=host) as server:
        name = bucket or StorageSettings.from_environment().bucket
        ObjectStore(server.settings(name)).create_bucket_if_missing()
        for variable, value in {**server.environment(), "OVH_S3_BUCKET": name}.items():
            print(f"export {variable}={shlex.quote(value)}")
        sys.stdout.flush()
        told.print(f"Serving {server.root} at {server.endpoint_url}; Ctrl-C stops it.", highlight=False)
        if host not in ("127.0.0.1", "::1", "localhost"):
            told.print(f"[yellow]{host} is not loopback: others can reach it, without encryption.[/]")
        try:
            code = server.wait()
        except KeyboardInterrupt:
            told.print("Stopped.")
            return
        raise StorageError(f"The server ended by itself with code {code}: see {server.state / 'rclone.log'}.")


def data_verify(
    bucket: Annotated[str | None, typer.Option(help="Bucket; default: OVH_S3_BUCKET.")] = None,
    prefix: Annotated[str, typer.Option(help="Where to write the probe, below the root prefix.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Prove that the bucket can be listed, written, read and cleaned with the credentials at hand.

    Writes one small random object, reads it back, compares, deletes it, and sees that it is gone.

    Example: training-ready data verify --prefix scratch
    """
    import json

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from training_ready.storage.settings import StorageSettings
    from training_ready.storage.verify import verify_store

    result = verify_store(StorageSettings.from_environment(bucket=bucket), prefix=prefix)
    if as_json:
        print(json.dumps(result.as_json(), indent=2))
    else:
        colours = {"proven": "green", "failed": "red", "not tried": "yellow"}
        place = f"s3://{result.bucket}/{result.prefix} at {result.endpoint}"
        table = Table("step", "outcome", "detail", title=place)
        for step in result.steps:
            table.add_row(step.name, Text(step.outcome, style=colours[step.outcome]), Text(step.detail))
        Console().print(table)
    if not result.passed:
        failed = [step.name for step in result.steps if step.outcome != "proven"]
        raise TrainingReadyError(
            f"s3://{result.bucket} is not proven: {', '.join(failed)}. The reasons stand above."
        )


def data_upload(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders.")],
    to: Annotated[str, typer.Option("--to", help="Key prefix below the root prefix, or an s3:// address.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Upload files and folders; objects that are identical already are not sent again.

    Example: training-ready data upload ./sessions.jsonl --to gdrive/raw
    """
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from training_ready.storage.objects import ObjectStore
    from training_ready.storage.settings import StorageSettings
    from training_ready.storage.upload import plan_uploads, upload_all
    from training_ready.storage.uri import S3Uri, parse_s3_uri

    settings = StorageSettings.from_environment()
    target = parse_s3_uri(to) or S3Uri(settings.bucket, settings.root_prefix + to.strip("/"))
    store = ObjectStore(settings, target.bucket)
    uploads, hidden = plan_uploads(paths, target.key)
    console = Console(stderr=True)
    columns = (TextColumn("Uploading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("upload", total=sum(upload.size for upload in uploads))
        report = upload_all(store, uploads, lambda done: bar.advance(task, done))
    report.hidden = hidden
    if as_json:
        print(json.dumps({"to": str(target), "files": len(uploads), **asdict(report)}, indent=2))
    else:
        print(
            f"{len(uploads)} files to {target}: {report.uploaded} uploaded ({report.bytes_sent} bytes), "
            f"{report.identical} identical already, {hidden} hidden files left out."
        )
