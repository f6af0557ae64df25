"""What did one domain's branch learn, and did it leave the anchor alone?

Branches are trained apart from each other against one frozen dense model, so that their feed-forwards still
fit the same attention, embeddings and norms when they become experts (as in FlexOlmo, arXiv 2507.07024).
A branch that moved anything else would make the mixture compute what nobody trained: it is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from training_ready.moe.adapter_files import CONFIG, WEIGHTS
from training_ready.moe.families import MoEError
from training_ready.moe.peft_lora import LowRank, read_lora
from training_ready.moe.upcycle_shards import ShardedTensors
from training_ready.moe.upcycle_target import PROJECTIONS, carried, check_names, dense_projection

ANCHOR = "anchor"


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """One expert to be: the domain it is for, and where its feed-forward comes from."""

    domain: str
    source: Path | None
    """A PEFT adapter or a full checkpoint; None: the anchor itself, unchanged."""

    @property
    def kind(self) -> Literal["anchor", "adapter", "checkpoint"]:
        if self.source is None:
            return "anchor"
        return "adapter" if (self.source / CONFIG).is_file() else "checkpoint"

    def files(self) -> list[Path]:
        """What this branch is made of. Raises :class:`MoEError` when nothing is there."""
        if self.source is None:
            return []
        if self.kind == "adapter":
            return [self.source / CONFIG, self.source / WEIGHTS]
        tensors = ShardedTensors(self.source)
        return tensors.files


def parse_branch(text: str) -> Branch:
    """``DOMAIN=PATH`` or ``DOMAIN=anchor``."""
    domain, found, source = text.partition("=")
    if not found or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", domain) or not source:
        raise MoEError(f"{text!r}: an expert is DOMAIN=PATH or DOMAIN={ANCHOR}.")
    return Branch(domain=domain, source=None if source == ANCHOR else Path(source))


def read_adapter(folder: Path, layers: int) -> dict[str, LowRank]:
    """What an adapter adds to ``layers.N.PROJECTION``; projections that it does not adapt are left out.

    Raises :class:`MoEError` for an adapter of anything but the feed-forward, or of another kind than plain LoRA.
    """
    found: dict[str, LowRank] = {}
    for name, pair in read_lora(folder).items():
        projection = dense_projection(f"{name}.weight")
        if projection is None or projection[0] >= layers:
            raise MoEError(
                f"{folder}: {name} is not a feed-forward projection of the anchor's {layers} layers. All else stays "
                "frozen in a branch (target_modules: [gate_proj, up_proj, down_proj])."
            )
        found[f"layers.{projection[0]}.{projection[1]}"] = pair
    return found


def check_branch_checkpoint(source: Path, anchor: ShardedTensors, config: Any) -> int:
    """Compare a branch's checkpoint with the anchor, tensor by tensor; returns how many feed-forward weights moved.

    Raises :class:`MoEError` when anything but a feed-forward weight differs.
    """
    moved = 0
    branch = ShardedTensors(source)
    check_names(config, branch.names, str(source))
    for name in anchor.names:
        projection = dense_projection(name)
        if projection is None and not carried(name, config):
            continue
        theirs, ours = branch.get(name), anchor.get(name)
        if theirs.shape != ours.shape:
            raise MoEError(f"{source}: {name} is {tuple(theirs.shape)}, the anchor's {tuple(ours.shape)}.")
        if torch.equal(theirs, ours.to(theirs.dtype)):
            continue
        if projection is None:
            raise MoEError(
                f"{source}: {name} differs from the anchor's. Experts share everything but the feed-forward: "
                "freeze the rest when a branch is trained."
            )
        moved += 1
    return moved


def stack_branches(
    branches: Sequence[Branch],
    *,
    shapes: Callable[[int, str], tuple[int, int]],
    layers: int,
    rank: int,
    seed: int,
) -> tuple[dict[str, Tensor], int]:
    """All low-rank branches as A (E, r, in) and B (E, out, r) of each projection, and their common rank.

    Scalings are folded into B, so that the stack has scaling 1. A smaller rank is filled up: A with random rows as in
    a fresh adapter, B with zeros, which adds nothing and leaves room to learn. ``shapes``: (layer, projection) ->
    (out, in).
    """
    read = [
        read_adapter(branch.source, layers) if branch.source is not None and branch.kind == "adapter" else {}
        for branch in branches
    ]
    rank = max([rank, *(len(pair.a) for each in read for pair in each.values())])
    generator = torch.Generator().manual_seed(seed)
    stacked: dict[str, Tensor] = {}
    for layer in range(layers):
        for projection in PROJECTIONS:
            out_features, in_features = shapes(layer, projection)
            a = torch.empty(len(branches), rank, in_features)
            a.uniform_(-1 / math.sqrt(in_features), 1 / math.sqrt(in_features), generator=generator)
            b = torch.zeros(len(branches), out_features, rank)
            key = f"layers.{layer}.{projection}"
            for expert, adapted in enumerate(read):
                if key not in adapted:
                    continue
                pair = adapted[key]
                own = len(pair.a)
                if (len(pair.b), pair.a.shape[1]) != (out_features, in_features):
                    raise MoEError(
                        f"{branches[expert].source}: {key} is {(len(pair.b), pair.a.shape[1])}, the anchor's "
                        f"{(out_features, in_features)}."
                    )
                a[expert, :own] = pair.a.float()
                b[expert, :, :own] = pair.scaling * pair.b.float()
            stacked[f"{key}.A"], stacked[f"{key}.B"] = a, b
    return stacked, rank
