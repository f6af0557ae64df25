"""How does a dense model become domain experts? In stages that can be killed at any moment and continued.

===========  ====================================================================================================
anchor       the dense base, by hash: frozen, every branch is held against it
branches     what each domain's branch adds to the feed-forward, and proof that it moved nothing else
router       one row per expert and layer: the domain's mean feed-forward input, centred, at unit length
mix          adapters and routers together: what joint training starts from (``load_shared_base``)
export       a plain Mixtral or Qwen3-MoE checkpoint, written shard by shard
===========  ====================================================================================================

At step 0 the mixture of unchanged experts computes what the dense model does, whatever its routers say. Memory:
at most one shard of the base is mapped and one output shard held, whatever the size of the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from training_ready.moe.families import MoEError
from training_ready.moe.shared_base_files import SharedBaseSettings, write_shared_base
from training_ready.moe.upcycle_branches import Branch, check_branch_checkpoint, stack_branches
from training_ready.moe.upcycle_export import dense_config, export_upcycled, projection_shape
from training_ready.moe.upcycle_means import read_labelled_texts, streamed_means
from training_ready.moe.upcycle_shards import GIGABYTE, ShardedTensors
from training_ready.moe.upcycle_stages import FinishedStage, fingerprint, run_stage
from training_ready.moe.upcycle_target import check_names, target_config, target_of

Stage = Literal["anchor", "branches", "router", "mix", "export"]
STAGES: tuple[Stage, ...] = ("anchor", "branches", "router", "mix", "export")
ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpcyclePlan:
    """Everything that decides the outcome."""

    base: Path
    branches: Sequence[Branch]
    """Expert e is the e-th branch."""
    texts: Path | None
    """JSONL of labelled texts for the routers; None: random rows."""
    top_k: int = 2
    rank: int = 16
    """Of the adapters of mix; a branch of a larger rank raises it."""
    max_tokens: int = 512
    max_per_domain: int = 64
    seed: int = 0
    shard_bytes: int = 4 * GIGABYTE


def upcycle(
    plan: UpcyclePlan,
    work: Path,
    *,
    until: Stage = "export",
    device: str = "cpu",
    told: Callable[[FinishedStage], None] = lambda stage: None,
) -> list[FinishedStage]:
    """Run the stages in ``work`` up to ``until``; finished ones are skipped. ``told`` hears of each.

    Raises :class:`MoEError` for a base, branch or router that cannot give a right mixture, before the stage
    leaves anything behind.
    """
    config = dense_config(plan.base)
    target_config(config, experts=len(plan.branches), top_k=plan.top_k)  # refuses early
    domains = [branch.domain for branch in plan.branches]
    if len(set(domains)) != len(domains):
        raise MoEError(f"each expert needs a domain of its own, not {', '.join(domains)}.")
    done: list[FinishedStage] = []
    for stage in STAGES[: STAGES.index(until) + 1]:
        made_from: dict[str, Any] = {"after": {before.name: before.sha256 for before in done}}
        name, settings, make = _stage(stage, plan, config, work, device)
        done.append(run_stage(work, name, made_from | settings, make))
        told(done[-1])
    return done


def _stage(
    stage: Stage, plan: UpcyclePlan, config: Any, work: Path, device: str
) -> tuple[str, dict[str, Any], Callable[[Path], dict[str, Any]]]:
    """Folder, inputs and maker of one stage."""
    if stage == "anchor":
        inputs: dict[str, Any] = {"base": str(plan.base.resolve()), "files": _sizes(plan.base)}
        return "1-anchor", inputs, lambda folder: _anchor(plan.base, config, folder)
    if stage == "branches":
        inputs = {
            "rank": plan.rank,
            "seed": plan.seed,
            "branches": [[branch.domain, branch.kind, _fingerprints(branch)] for branch in plan.branches],
        }
        return "2-branches", inputs, lambda folder: _branches(plan, config, folder)
    if stage == "router":
        inputs = {
            "texts": None if plan.texts is None else fingerprint(plan.texts),
            "max_tokens": plan.max_tokens,
            "max_per_domain": plan.max_per_domain,
            "seed": plan.seed,
        }
        return "3-router", inputs, lambda folder: _router(plan, config, folder, device)
    if stage == "mix":
        return "4-mix", {"top_k": plan.top_k}, lambda folder: _mix(plan, work, folder)
    inputs = {"shard_bytes": plan.shard_bytes}
    return "5-export", inputs, lambda folder: _export_branches(plan, work / "4-mix", folder)


def _anchor(base: Path, config: Any, folder: Path) -> dict[str, Any]:
    tensors = ShardedTensors(base)
    check_names(config, tensors.names, str(base))
    _check_tied_head(tensors, config)
    hashes = {path.name: fingerprint(path) for path in tensors.files}
    shutil.copyfile(base / "config.json", folder / "config.json")
    return {"model_type": config.model_type, "target": target_of(config).model_type, "sha256": hashes}


def _check_tied_head(tensors: ShardedTensors, config: Any) -> None:
    """A stored head that differs from the embeddings is used by transformers, tied or not: it must not be lost."""
    if config.tie_word_embeddings and "lm_head.weight" in tensors.file_of:
        head = tensors.get("lm_head.weight").clone()
        if not torch.equal(head, tensors.get("model.embed_tokens.weight")):
            raise MoEError(
                f"{tensors.folder}: tie_word_embeddings is set, but lm_head.weight differs from the embeddings. "
                "Correct one of the two."
            )


def _branches(plan: UpcyclePlan, config: Any, folder: Path) -> dict[str, Any]:
    moved = {}
    anchor = ShardedTensors(plan.base)
    for branch in plan.branches:
        if branch.source is not None and branch.kind == "checkpoint":
            moved[branch.domain] = check_branch_checkpoint(branch.source, anchor, config)
    stacked, rank = stack_branches(
        plan.branches,
        shapes=lambda _, projection: projection_shape(config, projection),
        layers=config.num_hidden_layers,
        rank=plan.rank,
        seed=plan.seed,
    )
    save_file(stacked, folder / "adapters.safetensors", metadata={"format": "pt"})
    return {"rank": rank, "kinds": {b.domain: b.kind for b in plan.branches}, "weights_moved": moved}


def _router(plan: UpcyclePlan, config: Any, folder: Path, device: str) -> dict[str, Any]:
    domains = [branch.domain for branch in plan.branches]
    shape = (config.num_hidden_layers, len(domains), config.hidden_size)
    if plan.texts is None:
        generator = torch.Generator().manual_seed(plan.seed)
        rows = torch.empty(shape).normal_(std=config.initializer_range, generator=generator)
        facts: dict[str, Any] = {"rows": "random", "std": config.initializer_range}
    else:
        texts = read_labelled_texts(
            plan.texts,
            plan.base,
            domains,
            max_tokens=plan.max_tokens,
            max_per_domain=plan.max_per_domain,
        )
        means = streamed_means(plan.base, texts, domains, scratch=folder, device=device)
        rows = means.router_rows()
        counted = dict(zip(domains, means.tokens[0].tolist(), strict=True))
        facts = {"rows": "domain means", "texts": len(texts), "tokens": counted}
    save_file({"rows": rows}, folder / ROUTER_FILE, metadata={"format": "pt"})
    return facts


def _mix(plan: UpcyclePlan, work: Path, folder: Path) -> dict[str, Any]:
    tensors = load_file(work / "2-branches" / "adapters.safetensors")
    rank = next(iter(tensors.values())).shape[1]
    rows = load_file(work / "3-router" / ROUTER_FILE)["rows"]
    tensors |= {f"layers.{layer}.router": each.clone() for layer, each in enumerate(rows)}
    domains = [branch.domain for branch in plan.branches]
    own = [branch.domain for branch in plan.branches if branch.kind == "checkpoint"]
    settings = SharedBaseSettings(
        base=str(plan.base),
        experts=domains,
        top_k=plan.top_k,
        rank=rank,
        alpha=float(rank),
        materialised=own,
    )
    write_shared_base(settings, tensors, folder)
    return {"rank": rank, "materialised": own}


def _export_branches(plan: UpcyclePlan, mix: Path, folder: Path) -> dict[str, Any]:
    checkpoints = {
        expert: ShardedTensors(branch.source)
        for expert, branch in enumerate(plan.branches)
        if branch.source is not None and branch.kind == "checkpoint"
    }
    written = export_upcycled(plan.base, mix, folder, checkpoints=checkpoints, shard_bytes=plan.shard_bytes)
    return {"weight_bytes": written}


def _sizes(base: Path) -> dict[str, int]:
    tensors = ShardedTensors(base)
    return {path.name: path.stat().st_size for path in tensors.files}


def _fingerprints(branch: Branch) -> dict[str, str]:
    return {path.name: fingerprint(path) for path in branch.files()}
