"""How many tokens does each expert of each layer really get?

Forward hooks on the routers add the chosen experts up on the device that computed them: no synchronisation
until somebody reads. Tokens are counted once, in the forward pass that the loss sees: what gradient
checkpointing recomputes during the backward pass is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training_ready.moe.families import MoEError, RoutedLayer, model_config, moe_family, routed_layers

Phase = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLoad:
    """Where the tokens of one sparse layer went."""

    layer: int
    load: list[float]
    """Share of the routed (token, choice) pairs per expert; sums to 1, all zero when nothing was counted."""
    entropy: float
    """Of ``load``, in nats: ln(E) when balanced, 0 when one expert gets everything."""
    dead: list[int]
    """Experts that got no token at all."""
    max_share: float
    min_share: float
    tie_share: float | None
    """Share of tokens whose k-th and (k+1)-th logit are equal, so that chance chose the expert; None where
    ties were not counted or the logits alone do not decide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSnapshot:
    """The load of every sparse layer over ``tokens`` tokens."""

    phase: Phase
    tokens: int
    layers: list[LayerLoad]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load(self) -> Tensor:
        """Shares as one tensor (L, E), float64."""
        return torch.tensor([layer.load for layer in self.layers], dtype=torch.float64)

    def metrics(self) -> dict[str, float]:
        """A few numbers for a tracker; the worst layer counts, because a mean hides a collapsed one."""
        balanced = math.log(max(len(self.layers[0].load), 2))
        entropies = [layer.entropy / balanced for layer in self.layers]
        return {
            "moe/entropy_mean": sum(entropies) / len(entropies),
            "moe/entropy_worst": min(entropies),
            "moe/max_share": max(layer.max_share for layer in self.layers),
            "moe/min_share": min(layer.min_share for layer in self.layers),
            "moe/dead_experts": float(sum(len(layer.dead) for layer in self.layers)),
        }


@dataclass(kw_only=True, slots=True)
class _Tally:
    """Running sums of one layer in one phase, on the layer's own device."""

    experts: Tensor
    """(E,) int64, pairs per expert."""
    tokens: Tensor
    """(2,) int64: tokens, tokens with a tie."""


class ExpertLoadMonitor:
    """Counts tokens per expert while a model runs, training and evaluation apart.

    ``mask`` (set it before each forward, or use :meth:`tokens`) marks the real tokens of that forward, any
    shape with one entry per token, e.g. the (B, T) attention mask; None counts every token. Use as a context
    manager or call :meth:`close`.

    Raises :class:`MoEError` for a dense model, and during a forward whose mask has another number of tokens.
    """

    def __init__(self, model: nn.Module, *, ties: bool = False) -> None:
        family = moe_family(model_config(model))
        if family is None:
            raise MoEError(f"{type(model).__name__} has no experts: there is no load to watch.")
        self.family = family
        self.mask: Tensor | None = None
        self._paused = False
        self._ties = ties and family.layout.chosen_by_logits and family.top_k < family.num_experts
        self._layers = routed_layers(model, family)
        self._tallies: dict[tuple[Phase, int], _Tally] = {}
        self._handles = [
            routed.router.register_forward_hook(self._hook(index, routed))
            for index, routed in enumerate(self._layers)
        ]

    @property
    def layers(self) -> list[int]:
        """Decoder layer index of each row of :meth:`counts`."""
        return [routed.layer for routed in self._layers]

    @contextmanager
    def tokens(self, mask: Tensor | None) -> Iterator[None]:
        """Count only where ``mask`` is true in the forwards inside the block."""
        before, self.mask = self.mask, mask
        try:
            yield
        finally:
            self.mask = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside the block: for a forward that is done again for the loss."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def counts(self, phase: Phase = "train") -> Tensor:
        """Pairs per expert on this rank: (L, E) int64 on the CPU."""
        return self._state(phase)[:, : self.family.num_experts]

    def reduce(self, phase: Phase = "train") -> Tensor:
        """Like :meth:`counts`, summed over all ranks; a collective call that changes nothing."""
        return self._summed(phase)[:, : self.family.num_experts]

    def snapshot(self, phase: Phase = "train") -> LoadSnapshot:
        """Shares, entropy and dead experts over all ranks since the last :meth:`reset`; a collective call."""
        state = self._summed(phase)
        counts, tokens, tied = state[:, : self.family.num_experts], state[:, -2], state[:, -1]
        return LoadSnapshot(
            phase=phase,
            tokens=int(tokens.max()),
            layers=[
                layer_load(
                    routed.layer, row, tie_share=(int(tie) / max(int(seen), 1) if self._ties else None)
                )
                for routed, row, seen, tie in zip(self._layers, counts, tokens, tied, strict=True)
            ],
        )

    def state(self, phase: Phase = "train") -> Tensor:
        """All that was counted over all ranks, (L, E + 2) int64 on the CPU; a collective call. See :meth:`restore`."""
        return self._summed(phase)

    def restore(self, state: Tensor, phase: Phase = "train") -> None:
        """Count on from a :meth:`state`; to be called on one rank only, or it counts once per rank.

        Raises :class:`MoEError` for the state of another model.
        """
        needed = (len(self._layers), self.family.num_experts + 2)
        if tuple(state.shape) != needed:
            raise MoEError(f"a load of shape {tuple(state.shape)} was saved, this model needs {needed}.")
        for index, (routed, row) in enumerate(zip(self._layers, state, strict=True)):
            device = next(routed.router.parameters()).device
            self._tallies[phase, index] = _Tally(experts=row[:-2].to(device), tokens=row[-2:].to(device))

    def mark(self) -> Callable[[], None]:
        """Remember what this rank has counted; the function that is returned goes back to it."""
        kept = {
            key: _Tally(experts=tally.experts.clone(), tokens=tally.tokens.clone())
            for key, tally in self._tallies.items()
        }

        def back() -> None:
            self._tallies = kept

        return back

    def reset(self, phase: Phase | None = None) -> None:
        """Start again from zero, in one phase or in both."""
        for key in [key for key in self._tallies if phase in (None, key[0])]:
            del self._tallies[key]

    def close(self) -> None:
        """Take the hooks off; what was counted stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> ExpertLoadMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hook(self, index: int, routed: RoutedLayer) -> Any:
        def count(router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if self._paused or in_backward():
                return
            logits, _weights, chosen = output
            self._add("train" if router.training else "eval", index, routed, logits.detach(), chosen.detach())

        return count

    def _add(self, phase: Phase, index: int, routed: RoutedLayer, logits: Tensor, chosen: Tensor) -> None:
        tokens = chosen.shape[0]
        mask = self.mask
        if mask is not None and mask.numel() != tokens:
            raise MoEError(
                f"{routed.name}: the mask {tuple(mask.shape)} has {mask.numel()} tokens, the router saw "
                f"{tokens}. Set the mask of this very forward, or None."
            )
        device = chosen.device
        real = (
            torch.ones(tokens, dtype=torch.int64, device=device)
            if mask is None
            else mask.reshape(-1).to(device=device, non_blocking=True).bool().long()
        )
        tally = self._tallies.get((phase, index))
        if tally is None:
            zeros = torch.zeros(self.family.num_experts + 2, dtype=torch.int64, device=device)
            tally = _Tally(experts=zeros[:-2], tokens=zeros[-2:])
            self._tallies[phase, index] = tally
        # Not bincount: on CUDA it waits for the largest index to come back to the host.
        tally.experts.scatter_add_(0, chosen.reshape(-1).long(), real.repeat_interleave(chosen.shape[1]))
        tally.tokens[0] += real.sum()
        if self._ties:
            edge = logits.topk(self.family.top_k + 1, dim=-1).values[:, -2:]
            tally.tokens[1] += (real * (edge[:, 0] == edge[:, 1])).sum()

    def _state(self, phase: Phase) -> Tensor:
        """(L, E + 2) int64 on the CPU: pairs per expert, tokens, tokens with a tie."""
        rows = []
        for index in range(len(self._layers)):
            tally = self._tallies.get((phase, index))
            rows.append(
                torch.zeros(self.family.num_experts + 2, dtype=torch.int64)
                if tally is None
                else torch.cat([tally.experts, tally.tokens]).cpu()
            )
        return torch.stack(rows)

    def _summed(self, phase: Phase) -> Tensor:
        return sum_over_ranks(self._state(phase))


def in_backward() -> bool:
    """Is this forward a recomputation inside the backward pass?

    Autograd numbers the backward pass it is running in this thread, -1 outside one. Both kinds of
    checkpointing recompute inside it. The same test as in torch.utils.module_tracker.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """A copy summed over all ranks, on the same device; without torch.distributed the tensor itself."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    summed = values.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(summed)
    return summed.to(values.device)


def layer_load(layer: int, counts: Tensor | Sequence[int], *, tie_share: float | None = None) -> LayerLoad:
    """Shares and their entropy from the pairs (E,) that one layer routed."""
    pairs = torch.as_tensor(counts, dtype=torch.float64)
    shares = pairs / pairs.sum().clamp(min=1)
    return LayerLoad(
        layer=layer,
        load=shares.tolist(),
        entropy=float(torch.special.entr(shares).sum()),
        dead=[expert for expert, count in enumerate(pairs.tolist()) if count == 0],
        max_share=float(shares.max()),
        min_share=float(shares.min()),
        tie_share=tie_share,
    )
