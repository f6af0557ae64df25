"""The corpus's command: ``data build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from training_ready.corpus.build import Build
    from training_ready.corpus.spec import CorpusSpec
    from training_ready.storage.objects import ObjectStore


def data_build(
    spec: Annotated[Path, typer.Argument(help="Specification of the corpus, a YAML file.")],
    bucket: Annotated[str | None, typer.Option(help="Bucket; default: OVH_S3_BUCKET.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Build although a different corpus of this name stands.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Build a corpus: sources in the bucket become gated, split Parquet shards and one manifest.

    A corpus that was built from the same specification and objects is found and left as it is.

    Example: training-ready data build corpus.yaml --bucket pixelated-training-data
    """
    import json

    from rich.console import Console

    from training_ready.corpus.spec import load_spec
    from training_ready.storage.objects import ObjectStore
    from training_ready.storage.settings import StorageSettings

    wanted = load_spec(spec)
    store = ObjectStore(StorageSettings.from_environment(bucket=bucket))
    build = _build_with_progress(wanted, store, replace, Console(stderr=True))
    if as_json:
        manifest = build.manifest
        outcome = {"manifest_uri": manifest.uri, "manifest_sha256": manifest.sha256, "reused": build.reused}
        kept = manifest.model_dump(
            mode="json", include={"records", "splits", "sources", "shards", "rejected_rows"}
        )
        print(json.dumps(outcome | {"superseded": build.superseded} | kept, indent=2))
    else:
        _print_build(build, Console())


def _build_with_progress(spec: CorpusSpec, store: ObjectStore, replace: bool, console: Console) -> Build:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from training_ready.corpus.build import build_corpus

    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:

        class Passes:
            """One bar per pass over the inputs."""

            def begin(self, what: str, total: int) -> None:
                self.task = bars.add_task(what, total=total)

            def advance(self, done: int) -> None:
                bars.advance(self.task, done)

        return build_corpus(spec, store, replace=replace, progress=Passes())


def _print_build(build: Build, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    manifest = build.manifest
    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, collapse_padding=True)
    for name in ("source", "in", "kept", "rejected", "train", "val", "test"):
        table.add_column(name, no_wrap=True, justify="left" if name == "source" else "right")
    table.add_column("licence", overflow="fold")
    table.columns[0].footer = "all"
    totals = [0] * 6
    for source in manifest.sources:
        splits = [source.splits.get(split, 0) for split in ("train", "val", "test")]
        numbers = [source.records_in, source.kept, source.records_in - source.kept, *splits]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        table.add_row(source.name, *(f"{number:,}" for number in numbers), escape(source.license))
    for column, total in zip(table.columns[1:], totals, strict=False):
        column.footer = f"{total:,}"
    console.print(table)
    for line in _remarks(build):
        console.print(escape(line), highlight=False, soft_wrap=True)
    shards = len(manifest.shards)
    state = "already built, nothing written" if build.reused else "built"
    console.print(
        f"{manifest.records:,} records in {shards} shard{'s' * (shards != 1)}, {state}: {escape(manifest.uri)}",
        highlight=False,
        soft_wrap=True,
    )


def _remarks(build: Build) -> list[str]:
    """What a person should know beyond the counts."""
    manifest, remarks = build.manifest, []
    for source in manifest.sources:
        if source.rejected:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in source.rejected.items())
            remarks.append(f"{source.name}: rejected {reasons}")
        if source.moved:
            remarks.append(
                f"{source.name}: {source.moved} records left their publisher's split, because others of their "
                "group are held out further"
            )
        if source.crisis_rejected:
            remarks.append(
                f"{source.name}: {source.crisis_rejected} rejected rows concern a crisis; let somebody look"
            )
        if source.unused_fields:
            remarks.append(f"{source.name}: fields that reach no record: {', '.join(source.unused_fields)}")
    remarks += [f"no record is in {split}" for split, count in manifest.splits.items() if not count]
    if manifest.rejected_rows:
        remarks.append(
            f"every rejected row, with its reason: {manifest.uri.rpartition('/')[0]}/"
            f"{manifest.rejected_rows.key.rpartition('/')[2]}"
        )
    if build.superseded:
        remarks.append(
            f"{len(build.superseded)} shards of the earlier corpus stay for its readers; delete them when nobody reads "
            f"them: {', '.join(build.superseded)}"
        )
    return remarks
