"""Low-rank adapters on fused experts that never build an adapted weight: ``y = W x + s * B (A x)`` per expert.

PEFT adapts a fused expert stack by forming ``W + s * B A`` for all experts in every forward, which costs a
copy of every expert weight and a dense gradient of the same size in backward. Here the two thin products run
beside the frozen one, as grouped matrix products over the tokens of each expert. Registered with transformers
as an experts implementation, so that every model with fused experts can use it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Private, and the only door to grouped products that work on every device that transformers supports.
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear, grouped_mm_experts_forward

from training_ready.moe.families import MoEError, routed_layers
from training_ready.moe.quant import Nf4Experts

IMPLEMENTATION = "split_lora"
PROJECTIONS = ("gate_up_proj", "down_proj")
_ATTRIBUTE = "split_lora"


class SplitLora(nn.Module):
    """The adapters of one projection of all experts: A (E, r, in), B (E, out, r), experts first so that both shard
    along with the experts. Starts as PEFT does: A as a linear layer, B zero."""

    def __init__(
        self,
        *,
        experts: int,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        first: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """``first``: under expert parallelism the first expert whose weights lie on this rank."""
        super().__init__()
        self.rank, self.alpha, self.dropout, self.first = rank, alpha, dropout, first
        self.A = nn.Parameter(torch.empty(experts, rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(experts, out_features, rank, dtype=dtype, device=device))
        nn.init.uniform_(self.A, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def forward(self, rows: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """(S, in) rows sorted by expert, ``ends`` (E here,): row after each expert's last -> (S, out), ``dtype``."""
        here = slice(self.first, self.first + ends.numel())
        a, b = self.A[here].to(dtype), self.B[here].to(dtype)
        missing = -self.rank % 8 if rows.is_cuda else 0
        if missing:  # grouped products on CUDA need rows of a multiple of 16 bytes
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        rows = F.dropout(rows, self.dropout, self.training)
        out: Tensor = _grouped_linear(_grouped_linear(rows, a, ends), b, ends)
        return self.scaling * out


def split_lora_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts forward with adapters: (T, H), (T, k), (T, k) -> (T, H). Blocks without adapters run as usual."""
    if not hasattr(self, _ATTRIBUTE) and not isinstance(self.down_proj, Nf4Experts):
        plain: Tensor = grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        return plain
    tokens, k = top_k_index.shape
    expert_of_row, order = top_k_index.reshape(-1).sort()
    experts = torch.arange(self.num_experts, device=order.device)
    ends = torch.searchsorted(expert_of_row, experts.to(expert_of_row.dtype), right=True).int()
    # Under expert parallelism rows of other ranks carry an index past the last expert; no product touches
    # them and their outputs are uninitialised, so they are cleared on the way in (for the gradient) and
    # after each product.
    elsewhere = (expert_of_row >= self.num_experts)[:, None] if self._is_expert_parallel else None
    expert_of_row = expert_of_row.clamp(max=self.num_experts - 1)
    rows = _clear(hidden_states[order // k], elsewhere)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    inner = _clear(_project(self, first, rows, ends, expert_of_row), elsewhere)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    out = _clear(_project(self, "down_proj", inner, ends, expert_of_row), elsewhere)
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order][:, None]
    # Back to token order by gathering: index_add would sum in another order each time on CUDA.
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return out[position].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


def _project(experts: Any, name: str, rows: Tensor, ends: Tensor, expert_of_row: Tensor) -> Tensor:
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias")[expert_of_row] if experts.has_bias else None
    if isinstance(weight, Nf4Experts):
        out: Tensor = weight(rows, ends, is_transposed=experts.is_transposed)
        out = out if bias is None else out + bias
    else:
        out = _grouped_linear(rows, weight, ends, bias=bias, is_transposed=experts.is_transposed)
    adapters = getattr(experts, _ATTRIBUTE, {})
    return out + adapters[name](rows, ends, weight.dtype) if name in adapters else out


def _clear(rows: Tensor, elsewhere: Tensor | None) -> Tensor:
    return rows if elsewhere is None else rows.masked_fill(elsewhere, 0.0)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, split_lora_experts_forward)


def add_expert_adapters(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    projections: Sequence[str] = PROJECTIONS,
    dtype: torch.dtype = torch.float32,
) -> list[SplitLora]:
    """Put a trainable adapter on each projection of all experts and freeze the experts themselves.

    Everything else keeps its ``requires_grad``; with PEFT adapters on other layers, add those first (PEFT
    freezes what it does not know). Call before the model is wrapped for parallel training.

    Raises :class:`MoEError` for a dense model, experts that are already adapted, or a projection that is not
    there.
    """
    if rank < 1:
        raise MoEError(f"the rank of expert adapters is {rank}, at least 1 is needed.")
    layers = routed_layers(model)
    if not layers:
        raise MoEError(f"{type(model).__name__} has no experts to adapt.")
    added = []
    for routed in layers:
        experts: Any = routed.block.experts
        if hasattr(experts, _ATTRIBUTE) or hasattr(experts, "base_layer"):
            raise MoEError(f"{routed.name}.experts is already adapted.")
        experts.requires_grad_(False)
        adapters = nn.ModuleDict()
        for name in projections:
            weight = getattr(experts, name, None)
            if not isinstance(weight, nn.Parameter | Nf4Experts) or len(weight.shape) != 3:
                raise MoEError(
                    f"{routed.name}.experts has no fused projection {name!r} of shape (E, out, in)."
                )
            count, out_features, in_features = weight.shape
            if experts.is_transposed:
                out_features, in_features = in_features, out_features
            adapters[name] = SplitLora(
                experts=count,
                in_features=in_features,
                out_features=out_features,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                first=_first_here(experts, weight),
                dtype=dtype,
                device=weight.device,
            ).train(experts.training)
        setattr(experts, _ATTRIBUTE, adapters)
        added += [adapter for adapter in adapters.values() if isinstance(adapter, SplitLora)]
    model.set_experts_implementation(IMPLEMENTATION)
    return added


def _first_here(experts: Any, weight: nn.Parameter | Nf4Experts) -> int:
    """The first expert of this rank, 0 where every rank has all of them.

    Adapters are small and stay whole on every rank, which uses its part: their gradients are then averaged like those
    of any other replicated parameter, and files need no gathering.
    """
    if not experts._is_expert_parallel:
        return 0
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None or "ep" not in (mesh.mesh_dim_names or ()):
        raise MoEError(
            f"{type(experts).__name__} is expert parallel, but its weights are on no mesh named 'ep'."
        )
    return int(mesh["ep"].get_local_rank() * experts.num_experts)


def expert_adapters(model: Any) -> Iterator[tuple[str, nn.ModuleDict]]:
    """(Name of the experts module, its adapters by projection) of every adapted layer, in order."""
    for routed in routed_layers(model):
        adapters = getattr(routed.block.experts, _ATTRIBUTE, None)
        if isinstance(adapters, nn.ModuleDict):
            yield f"{routed.name}.experts", adapters


@torch.no_grad()
def merge_expert_adapters(model: Any) -> None:
    """Fold the adapters into the expert weights and remove them: one fp32 sum per expert, rounded once.

    Raises :class:`MoEError` when there is nothing to merge.
    """
    names = [name for name, _ in expert_adapters(model)]
    if not names:
        raise MoEError(f"{type(model).__name__} carries no expert adapters to merge.")
    for name in names:
        experts = model.get_submodule(name)
        for projection, adapter in getattr(experts, _ATTRIBUTE).items():
            weight = getattr(experts, projection)
            if isinstance(weight, Nf4Experts):
                raise MoEError(
                    f"{name}.{projection} is NF4: merged and rounded to 16 levels again, most of the adapter would be "
                    "lost. Save the adapter and merge it into the unquantised model."
                )
            for expert in range(weight.shape[0]):  # one at a time: a whole stack in fp32 may not fit
                delta = adapter.scaling * (adapter.B[expert].float() @ adapter.A[expert].float())
                delta = delta.mT if experts.is_transposed else delta
                weight[expert] = (weight[expert].float() + delta).to(weight.dtype)
        delattr(experts, _ATTRIBUTE)
    model.set_experts_implementation("grouped_mm")
