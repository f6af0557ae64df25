"""The front door's commands of the targets: `release export`, `release verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from training_ready.release.record import ReleaseRecord

TARGET = "hf, vllm, tgi, gguf, ollama or adapter."


def release_export(
    release: Annotated[
        Path, typer.Argument(help="A release folder; for adapter a checkpoint.", exists=True, file_okay=False)
    ],
    out: Annotated[Path, typer.Argument(help="Where the export goes; an earlier export there is replaced.")],
    target: Annotated[str, typer.Option(help=TARGET)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="For adapter: release.KEY=VALUE over what the run's recipe says."),
    ] = None,
    gguf_type: Annotated[str, typer.Option(help="f32, f16 or q8_0, for gguf and ollama.")] = "f16",
) -> None:
    """Rewrite a release for one kind of engine, or refuse and say which target can serve it.

    Files only: no GPU, and no more than 2 GB of weights in memory. An adapter of a finished run gets its card here,
    and is published like a release when it was verified.

    Example: training-ready release export releases/quickstart exports/quickstart-tgi --target tgi
    """
    from rich.console import Console
    from rich.progress import Progress

    from training_ready.release.targets.export import export_release

    record = None
    if target == "adapter":
        record = _record_of(release, overrides or ())
    elif overrides:
        raise typer.BadParameter("a release has its words already; only an adapter takes release.KEY=VALUE")
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("tensors", total=None)
        done = export_release(
            release,
            out,
            target,
            gguf_type=gguf_type,
            progress=lambda count, total: bars.update(task, completed=count, total=total),
            record=record,
        )
    typer.echo(f"{out}: {len(done.files)} files for {target}, {sum(done.files.values()):,} bytes")
    typer.echo(f"Next: training-ready release verify {out} --target {target} --release {release}")


def _record_of(checkpoint: Path, overrides: Sequence[str]) -> ReleaseRecord | None:
    """What the adapter's card is written from; None, and said why, where its run does not tell enough."""
    from training_ready.recipe.load import load_recipe
    from training_ready.release.build import adapter_record
    from training_ready.release.facts import CardError

    recipe = checkpoint.resolve().parent / "recipe.yaml"
    try:
        if not recipe.is_file():
            raise CardError(f"{recipe} is missing: it is not a checkpoint in the folder of a run")
        return adapter_record(checkpoint.resolve(), load_recipe(recipe, overrides).release)
    except CardError as error:
        typer.echo(f"No card, so this adapter cannot be published: {error}", err=True)
        return None


def release_verify(
    folder: Annotated[Path, typer.Argument(help="An export.", exists=True, file_okay=False)],
    target: Annotated[str, typer.Option(help=TARGET)],
    release: Annotated[Path, typer.Option(help="What it was exported from.", exists=True, file_okay=False)],
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where the environment of TGI's releases is kept.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: what logits are computed in.")] = "float32",
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Load an export as its engine would and compare it with the release: logits, token ids, prompts, files.

    For tgi an environment with transformers 4.51.0 is built once, from the package index, and kept.

    Example: training-ready release verify exports/quickstart-tgi --target tgi --release releases/quickstart
    """
    from dataclasses import asdict
    from json import dumps

    from rich.console import Console
    from transformers.utils.logging import disable_progress_bar

    from training_ready.release.export import ExportError
    from training_ready.release.served_by import keep_report
    from training_ready.release.targets.pinned import cache_folder
    from training_ready.release.targets.verify import verify_export

    if dtype not in ("float32", "bfloat16"):
        raise ExportError(f"dtype {dtype!r} is neither float32 nor bfloat16")
    disable_progress_bar()
    console = Console(stderr=True)
    with console.status(f"Loading {folder} as {target} would"):
        findings = verify_export(folder, release, target, cache=cache_dir or cache_folder(), dtype=dtype)
    checks = [asdict(finding) for finding in findings]
    keep_report(folder, release, target=target, dtype=dtype, checks=checks)
    if json:
        typer.echo(dumps(checks, indent=2))
    else:
        for finding in findings:
            typer.echo(f"{'ok  ' if finding.passed else 'FAIL'} {finding.check}: {finding.result}")
    if failed := [finding.check for finding in findings if not finding.passed]:
        raise ExportError(f"{folder} is not the trained model for {target}: {', '.join(failed)}")
