"""What are the weights of each expert, and in what order do they leave?

An expert is the dense feed-forward, that plus a low-rank difference, or a trained feed-forward of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from training_ready.moe.peft_lora import LowRank
from training_ready.moe.upcycle_shards import OutgoingTensor, ShardedTensors
from training_ready.moe.upcycle_target import Target, carried, dense_projection

_ROWS_AT_ONCE_BYTES = 2**20


class ExpertWeights(Protocol):
    """Gives the weight of one projection of one expert."""

    @property
    def experts(self) -> int: ...

    def put(self, out: Tensor, layer: int, projection: str, expert: int, base: Tensor) -> None:
        """Write the weight into ``out`` (out, in); ``base``: the dense weight of that projection."""


@dataclass(kw_only=True, slots=True)
class LowRankExperts:
    """Every expert is the shared dense weight plus ``scaling * B_e A_e``."""

    experts: int
    scaling: float
    factors: Callable[[int, str], tuple[Tensor, Tensor]]
    """(layer, projection) -> A (E, r, in), B (E, out, r)."""

    def put(self, out: Tensor, layer: int, projection: str, expert: int, base: Tensor) -> None:
        a, b = self.factors(layer, projection)
        put_low_rank(out, base, a[expert], b[expert], self.scaling)


@dataclass(kw_only=True, slots=True)
class BranchExperts:
    """Experts from branches of either kind; those with a checkpoint of their own do not use the shared one."""

    low_rank: LowRankExperts
    checkpoints: Mapping[int, ShardedTensors]
    """Expert to the checkpoint whose feed-forward it is."""

    @property
    def experts(self) -> int:
        return self.low_rank.experts

    def put(self, out: Tensor, layer: int, projection: str, expert: int, base: Tensor) -> None:
        checkpoint = self.checkpoints.get(expert)
        if checkpoint is None:
            self.low_rank.put(out, layer, projection, expert, base)
            return
        out.copy_(checkpoint.get(f"model.layers.{layer}.mlp.{projection}.weight"))


@torch.no_grad()
def put_low_rank(out: Tensor, base: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    """``out = base + scaling * b @ a`` summed in fp32 and rounded once: (out, in), (r, in), (out, r).

    A few rows at a time, so that no second weight in fp32 stands beside the first.
    """
    rows = max(1, _ROWS_AT_ONCE_BYTES // (4 * base.shape[1]))
    a = a.to(base.device, torch.float32)
    for start in range(0, base.shape[0], rows):
        part = slice(start, start + rows)
        summed = base[part].to(torch.float32, copy=True)
        out[part] = summed.addmm_(b[part].to(base.device, torch.float32), a, alpha=scaling)


def moe_tensors(
    names: Sequence[str],
    get: Callable[[str], Tensor],
    *,
    config: object,
    target: Target,
    experts: ExpertWeights,
    routers: Iterable[Tensor],
    lora: Mapping[str, LowRank] | None = None,
) -> Iterator[OutgoingTensor]:
    """The target's checkpoint, tensor by tensor.

    ``names`` and ``get``: the dense model, in the order in which it is read best. ``routers``: (E, H) of each
    layer; they leave first and take the dtype of the embeddings. ``lora``: what is added to a weight that all experts
    share, by its layer.
    """
    adapted = {f"{layer}.weight": pair for layer, pair in (lora or {}).items()}
    dtype = get("model.embed_tokens.weight").dtype
    for layer, rows in enumerate(routers):
        yield OutgoingTensor(target.router(layer), rows.shape, dtype, partial(torch.Tensor.copy_, other=rows))
    for name in names:
        projection = dense_projection(name)
        if projection is not None:
            base = get(name)
            for expert in range(experts.experts):
                outgoing = target.expert(projection[0], expert, projection[1])
                put = partial(
                    experts.put, layer=projection[0], projection=projection[1], expert=expert, base=base
                )
                yield OutgoingTensor(outgoing, base.shape, base.dtype, put)
            del base, put  # let go before the next is read
        elif carried(name, config):
            tensor = get(name)
            yield OutgoingTensor(name, tensor.shape, tensor.dtype, _shared(tensor, adapted.get(name)))
            del tensor


def _shared(weight: Tensor, pair: LowRank | None) -> Callable[[Tensor], object]:
    """Writes a weight that all experts share."""
    if pair is None:
        return partial(torch.Tensor.copy_, other=weight)
    return partial(put_low_rank, base=weight, a=pair.a, b=pair.b, scaling=pair.scaling)
