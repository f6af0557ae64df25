"""The room's commands: ``moe upcycle`` and ``moe export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from training_ready.moe.upcycle_stages import FinishedStage


def moe_upcycle(
    base: Annotated[Path, typer.Argument(help="Folder of the dense checkpoint: Mistral, Llama or Qwen3.")],
    work: Annotated[Path, typer.Option(help="Folder of the stages; continued when it exists.")],
    expert: Annotated[
        list[str], typer.Option(help="DOMAIN=PATH of a branch (PEFT adapter or checkpoint) or DOMAIN=anchor.")
    ],
    texts: Annotated[
        Path | None,
        typer.Option(help="JSONL with domain and text or messages, for the router; none: random rows."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Experts per token, at least 2.")] = 2,
    rank: Annotated[int, typer.Option(help="Rank of the adapters for joint training.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens read of each text.")] = 512,
    max_per_domain: Annotated[int, typer.Option(help="Texts read of each domain.")] = 64,
    seed: Annotated[int, typer.Option(help="Of random router rows and fresh adapters.")] = 0,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Size of an exported shard in GB.")] = 4.0,
    until: Annotated[
        str, typer.Option(help="Last stage: anchor, branches, router, mix or export.")
    ] = "export",
    device: Annotated[str, typer.Option(help="Where the base runs, layer by layer, for the router.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the stages as JSON.")] = False,
) -> None:
    """Make a mixture of experts of a dense model, in stages; a killed one is redone, a finished one skipped.

    Joint training starts from WORK/4-mix over the same base; `moe export` then writes what it saved.

    Example: training-ready moe upcycle base/ --work up/ --expert psychology=runs/psy --expert general=anchor
    """
    import json

    from rich.console import Console

    from training_ready.moe.families import MoEError
    from training_ready.moe.upcycle import STAGES, UpcyclePlan, upcycle
    from training_ready.moe.upcycle_branches import parse_branch

    if until not in STAGES:
        raise MoEError(f"--until {until}: the stages are {', '.join(STAGES)}.")
    console = Console(stderr=True)
    plan = UpcyclePlan(
        base=base,
        branches=[parse_branch(text) for text in expert],
        texts=texts,
        top_k=top_k,
        rank=rank,
        max_tokens=max_tokens,
        max_per_domain=max_per_domain,
        seed=seed,
        shard_bytes=int(shard_gb * 1e9),
    )
    done = upcycle(
        plan,
        work,
        until=STAGES[STAGES.index(until)],
        device=device,
        told=lambda stage: console.print(_line(stage), highlight=False, markup=False),
    )
    if as_json:
        print(json.dumps([_facts(stage) for stage in done], indent=2))


def moe_export(
    state: Annotated[Path, typer.Argument(help="Folder that joint training saved, or a mix stage.")],
    base: Annotated[Path, typer.Option(help="Folder of the dense checkpoint that it was trained over.")],
    out: Annotated[Path, typer.Option(help="Empty or new folder for the checkpoint.")],
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Size of a shard in GB.")] = 4.0,
) -> None:
    """Write shared-base experts as a plain Mixtral or Qwen3-MoE checkpoint, without loading the base.

    Example: training-ready moe export runs/mix/experts --base base/ --out released/
    """
    from training_ready.moe.upcycle_export import export_upcycled

    written = export_upcycled(base, state, out, shard_bytes=int(shard_gb * 1e9))
    print(f"{out}: {written:,} bytes of weights")


def _line(stage: FinishedStage) -> str:
    state = "finished before" if stage.skipped else "done"
    return f"{stage.name:<12}{state:<17}{stage.folder}"


def _facts(stage: FinishedStage) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "folder": str(stage.folder),
        "skipped": stage.skipped,
        "sha256": stage.sha256,
        **stage.facts,
    }
