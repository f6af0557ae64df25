"""Do experts specialise by domain? Tokens per domain and expert, and what one says about the other.

The mutual information of a token's domain D and the expert X chosen for it, in nats, is
``I(D; X) = sum p(d, x) ln(p(d, x) / (p(d) p(x)))``: 0 when every domain uses the experts alike, at most
``min(H(D), ln E)``. Counted tokens overestimate it by about (domains - 1)(E - 1) / 2N, the mean of the chi-squared
statistic: for 4 domains, 128 experts and 10,000 pairs by 0.019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from training_ready.moe.families import MoEError, RoutedLayer, model_config, moe_family, routed_layers
from training_ready.moe.monitor import in_backward, sum_over_ranks


def mutual_information(counts: Tensor) -> Tensor:
    """I(domain; expert) in nats, float64 (...), from pairs (..., D, E); 0 where nothing was counted."""
    joint = counts.double()
    joint = joint / joint.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    domain, expert = joint.sum(dim=-1), joint.sum(dim=-2)
    entropies = [torch.special.entr(part).sum(dim=-1) for part in (domain, expert, joint.flatten(-2))]
    information: Tensor = entropies[0] + entropies[1] - entropies[2]
    return information.clamp(min=0)


class DomainLoadMonitor:
    """Counts (domain, expert) pairs per layer while a model runs, in training and evaluation together.

    :meth:`tokens` names the domain of every token of the forwards inside it; others are not counted. Nothing is
    counted twice when activation checkpointing recomputes a forward.

    Raises :class:`MoEError` for a dense model, and in a forward with another number of tokens than were named.
    """

    def __init__(self, model: nn.Module, domains: Sequence[str]) -> None:
        family = moe_family(model_config(model))
        if family is None:
            raise MoEError(f"{type(model).__name__} has no experts: no domain can prefer one.")
        self.domains = tuple(domains)
        self._experts = family.num_experts
        self._layers = routed_layers(model, family)
        self._named: Tensor | None = None
        self._counts: dict[int, Tensor] = {}
        self._handles = [
            routed.router.register_forward_hook(self._hook(index, routed))
            for index, routed in enumerate(self._layers)
        ]

    @contextmanager
    def tokens(self, domain: Tensor) -> Iterator[None]:
        """``domain``: index into :attr:`domains` of each token, any shape; negative: not counted (padding, unknown)."""
        before, self._named = self._named, domain
        try:
            yield
        finally:
            self._named = before

    def counts(self) -> Tensor:
        """Pairs over all ranks: (L, D, E) int64 on the CPU; a collective call."""
        empty = torch.zeros(len(self.domains) * self._experts, dtype=torch.int64)
        rows = [self._counts.get(index, empty).cpu() for index in range(len(self._layers))]
        return sum_over_ranks(torch.stack(rows)).view(len(rows), len(self.domains), self._experts)

    def mutual_information(self) -> dict[int, float]:
        """I(domain; expert) in nats by decoder layer, over all ranks; a collective call."""
        found = mutual_information(self.counts()).tolist()
        return {routed.layer: value for routed, value in zip(self._layers, found, strict=True)}

    def restore(self, counts: Tensor) -> None:
        """Count on from earlier :meth:`counts`; to be called on one rank only, or they count once per rank.

        Raises :class:`MoEError` for those of another model or of other domains.
        """
        needed = (len(self._layers), len(self.domains), self._experts)
        if tuple(counts.shape) != needed:
            raise MoEError(
                f"domain counts of shape {tuple(counts.shape)} were saved, {needed} are counted here."
            )
        for index, (routed, row) in enumerate(zip(self._layers, counts, strict=True)):
            self._counts[index] = row.reshape(-1).to(next(routed.router.parameters()).device, copy=True)

    def mark(self) -> Callable[[], None]:
        """Remember what this rank has counted; the function that is returned goes back to it."""
        kept = {index: counts.clone() for index, counts in self._counts.items()}

        def back() -> None:
            self._counts = kept

        return back

    def close(self) -> None:
        """Take the hooks off; what was counted stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, index: int, routed: RoutedLayer) -> Any:
        def count(_router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            if self._named is not None and not in_backward():
                self._add(index, routed, output[2].detach(), self._named)

        return count

    def _add(self, index: int, routed: RoutedLayer, chosen: Tensor, named: Tensor) -> None:
        tokens, k = chosen.shape
        if named.numel() != tokens:
            raise MoEError(
                f"{routed.name}: domains of {named.numel()} tokens were named, the router saw {tokens}."
            )
        domain = named.reshape(-1).to(chosen.device)
        pairs = (domain.clamp(min=0)[:, None] * self._experts + chosen).reshape(-1).long()
        if index not in self._counts:
            size = len(self.domains) * self._experts
            self._counts[index] = torch.zeros(size, dtype=torch.int64, device=chosen.device)
        self._counts[index].scatter_add_(0, pairs, (domain >= 0).long().repeat_interleave(k))
