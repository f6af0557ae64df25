"""What are the weights of each expert, and in what order do they leave?

An expert is the dense feed-forward, that plus a low-rank difference, or a trained feed-forward of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training_ready.moe.upcycle_shards import ShardedTensors
from training_ready.moe.upcycle_target import Target, carried, dense_projection

_ROWS_AT_ONCE_BYTES = 64 * 2**20


class ExpertWeights(Protocol):
    """Gives the weight of one projection of one expert."""

    experts: int

    def weight(self, layer: int, projection: str, expert: int, base: Tensor) -> Tensor:
        """(out, in), new memory, in the dtype of ``base``: the dense weight that it starts from."""


@dataclass(kw_only=True, slots=True)
class LowRankExperts:
    """Every expert is the shared dense weight plus ``scaling * B_e A_e``."""

    experts: int
    scaling: float
    factors: Callable[[int, str], tuple[Tensor, Tensor]]
    """(layer, projection) -> A (E, r, in), B (E, out, r)."""

    def weight(self, layer: int, projection: str, expert: int, base: Tensor) -> Tensor:
        a, b = self.factors(layer, projection)
        return add_low_rank(base, a[expert], b[expert], self.scaling)


@dataclass(kw_only=True, slots=True)
class BranchExperts:
    """Experts from branches of either kind; those with a checkpoint of their own do not use the shared one."""

    low_rank: LowRankExperts
    checkpoints: Mapping[int, ShardedTensors]
    """Expert to the checkpoint whose feed-forward it is."""

    @property
    def experts(self) -> int:
        return self.low_rank.experts

    def weight(self, layer: int, projection: str, expert: int, base: Tensor) -> Tensor:
        checkpoint = self.checkpoints.get(expert)
        if checkpoint is None:
            return self.low_rank.weight(layer, projection, expert, base)
        with checkpoint:  # closed again: every open shard that was read counts as memory
            name = f"model.layers.{layer}.mlp.{projection}.weight"
            return checkpoint.get(name).to(base.dtype, copy=True)


@torch.no_grad()
def add_low_rank(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``base + scaling * b @ a`` summed in fp32 and rounded once: (out, in), (r, in), (out, r) -> (out, in).

    A few rows at a time, so that no second weight in fp32 stands beside the first.
    """
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    rows = max(1, _ROWS_AT_ONCE_BYTES // (4 * base.shape[1]))
    a = a.to(base.device, torch.float32)
    for start in range(0, base.shape[0], rows):
        part = slice(start, start + rows)
        delta = b[part].to(base.device, torch.float32) @ a
        out[part] = (base[part].float() + scaling * delta).to(base.dtype)
    return out


def moe_tensors(
    names: Sequence[str],
    get: Callable[[str], Tensor],
    *,
    config: object,
    target: Target,
    experts: ExpertWeights,
    routers: Iterable[Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """The target's checkpoint as a stream of (name, tensor) on the CPU.

    ``names`` and ``get``: the dense model, in the order in which it is read best. ``routers``: (E, H) of each
    layer; they leave first and take the dtype of the embeddings.
    """
    dtype = get("model.embed_tokens.weight").dtype
    for layer, rows in enumerate(routers):
        yield target.router(layer), rows.detach().to("cpu", dtype, copy=True)
    for name in names:
        projection = dense_projection(name)
        if projection is not None:
            base = get(name)
            for expert in range(experts.experts):
                weight = experts.weight(*projection, expert, base)
                yield target.expert(projection[0], expert, projection[1]), weight.cpu()
        elif carried(name, config):
            yield name, get(name).detach().to("cpu", copy=True)
