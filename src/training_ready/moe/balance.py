"""Is the work of a layer spread over its experts, and how does the router learn to spread it?

The load-balancing loss of layer l is ``L_l = E * sum_e f_e * P_e``: f_e the share of routed (token, choice)
pairs that expert e got, P_e its mean router probability. Both sum to one over the experts, so a perfectly
balanced layer scores 1.0 whatever the number of choices per token, and a layer that sends everything to one
expert scores E. Three ways it differs from the loss inside transformers' models, each on purpose:

* **per layer**: theirs pools all layers first, so four layers that each collapsed on another expert score as
  balanced;
* **1.0 is balanced** (as in Switch, arXiv 2101.03961); theirs counts choices, not shares, and balances at k:
  a coefficient c there equals c * k here;
* **global batch** (arXiv 2501.11873): f is counted over all micro-batches and ranks of an optimiser step.
  Within one micro-batch of one domain a specialised router looks collapsed, over the global batch it does
  not.

f carries no gradient and the loss is linear in P, so the token-weighted mean of the micro-batch losses, each
with the global f, *is* the loss of the global batch, gradients included. What remains is to know f before the
step is over: see :class:`GlobalBatchBalance`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training_ready.moe.families import MoEError
from training_ready.moe.monitor import sum_over_ranks


def expert_counts(router_logits: Sequence[Tensor], top_k: int, mask: Tensor | None = None) -> Tensor:
    """Pairs per expert, (L, E) int64, from L router logits (T, E); ``mask`` marks the real tokens.

    Right for routers that take the k largest logits (``FamilyLayout.chosen_by_logits``).
    """
    # The probabilities in fp32, not the raw logits: ties fall the same way as in the routers themselves.
    chosen = [logits.detach().float().softmax(dim=-1).topk(top_k, dim=-1).indices for logits in router_logits]
    return choice_counts(chosen, max((logits.shape[1] for logits in router_logits), default=0), mask)


def choice_counts(chosen: Sequence[Tensor], experts: int, mask: Tensor | None = None) -> Tensor:
    """Pairs per expert, (L, E) int64, from the experts (T, k) that each of L routers really chose."""
    rows = []
    for choice in chosen:
        real = _real(mask, choice.shape[0], choice).long().repeat_interleave(choice.shape[1])
        counts = torch.zeros(experts, dtype=torch.int64, device=choice.device)
        rows.append(counts.scatter_add_(0, choice.reshape(-1).long(), real))
    return _stack(rows)


def balance_loss(
    router_logits: Sequence[Tensor],
    counts: Tensor,
    mask: Tensor | None = None,
    *,
    tokens: Tensor | float | None = None,
) -> Tensor:
    """The load-balancing loss of each layer, (L,) fp32: 1.0 is balanced, E is collapsed.

    ``counts`` (L, E): pairs per expert over the global batch, see :func:`expert_counts`. ``tokens``: what to
    divide the summed probabilities by, by default the real tokens of these logits; see
    :class:`GlobalBatchBalance`.
    """
    if counts.shape[0] != len(router_logits):
        raise MoEError(f"counts of {counts.shape[0]} layers, router logits of {len(router_logits)}.")
    losses = []
    for logits, layer_counts in zip(router_logits, counts, strict=True):
        real = _real(mask, logits.shape[0], logits)
        share = layer_counts.to(logits.device).float()
        share = share / share.sum().clamp(min=1)
        probability = (logits.float().softmax(dim=-1) * real[:, None]).sum(dim=0) / _divisor(tokens, real)
        losses.append(logits.shape[1] * (share * probability).sum())
    return _stack(losses)


def z_loss(
    router_logits: Sequence[Tensor], mask: Tensor | None = None, *, tokens: Tensor | float | None = None
) -> Tensor:
    """Mean squared logsumexp of each layer's logits, (L,) fp32: keeps them small (arXiv 2202.08906)."""
    losses = []
    for logits in router_logits:
        real = _real(mask, logits.shape[0], logits)
        losses.append((logits.float().logsumexp(dim=-1).square() * real).sum() / _divisor(tokens, real))
    return _stack(losses)


class GlobalBatchBalance:
    """Load-balancing loss over the last ``micro_batches`` micro-batches of all ranks.

    The counts are summed over the ranks at each micro-batch and kept in a window as long as one optimiser
    step. At the last micro-batch of a step the window is exactly that step; earlier ones see the tail of the
    step before, which is as many tokens, routed by nearly the same router. A sum that starts empty at each
    step is simpler but wrong where it matters: with one domain per micro-batch and four of them a perfectly
    specialised router scores 4, 2, 1.33, 1 in each step instead of 1, 1, 1, 1. Who can afford a forward
    without gradients first passes the exact ``counts``.

    Every rank must call :meth:`loss` equally often: it is a collective call while training.
    """

    def __init__(self, *, top_k: int, micro_batches: int = 1) -> None:
        if top_k < 1 or micro_batches < 1:
            raise MoEError(f"top_k={top_k} and micro_batches={micro_batches} must be at least 1.")
        self.top_k = top_k
        self._window: deque[Tensor] = deque(maxlen=micro_batches)

    def loss(
        self,
        router_logits: Sequence[Tensor],
        mask: Tensor | None = None,
        *,
        local_counts: Tensor | None = None,
        counts: Tensor | None = None,
        mean_tokens: Tensor | float | None = None,
    ) -> Tensor:
        """Loss of each layer, (L,) fp32, to be averaged over micro-batches and ranks like any mean loss.

        ``mean_tokens``: real tokens of the global batch / (micro-batches * ranks). With it micro-batches
        weigh by their tokens and the average is exactly the loss of the global batch; without it each weighs
        the same, which is the same for packed rows.
        ``local_counts``: pairs per expert (L, E) of this micro-batch, for routers that do not simply choose the
        k largest logits (:func:`choice_counts`). ``counts``: the exact counts (L, E) of the global batch, if
        already known.

        Raises :class:`MoEError` when gradients are on and no layer's logits carry any: re-entrant
        checkpointing does that, and the loss would be logged without ever training a router.
        """
        if torch.is_grad_enabled() and not any(logits.requires_grad for logits in router_logits):
            raise MoEError(
                "the router logits carry no gradient, so the balance loss would train nothing. Either "
                "re-entrant gradient checkpointing is on (set gradient_checkpointing_kwargs: "
                "{use_reentrant: false}), or everything before the routers is frozen (set the balance "
                "coefficient to 0)."
            )
        if counts is None:
            counts = expert_counts(router_logits, self.top_k, mask) if local_counts is None else local_counts
            if torch.is_grad_enabled():
                self._window.append(sum_over_ranks(counts))
                counts = torch.stack(list(self._window)).sum(dim=0)
        return balance_loss(router_logits, counts, mask, tokens=mean_tokens)

    def state_dict(self) -> dict[str, Any]:
        """The window, so that a resumed run continues with the same f."""
        return {"window": list(self._window)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window.clear()
        self._window.extend(state["window"])


def balance_bias_step(bias: Tensor, counts: Tensor, *, rate: float = 1e-3) -> None:
    """Move a selection bias (E,) or (1, E) in place: up for experts below the mean load, down for those
    above.

    The loss-free balancing of arXiv 2408.15664: ``b += rate * sign(mean - count)``. ``counts`` (E,) over the
    global batch of the step. transformers loads and saves these biases and never updates them.
    """
    load = counts.to(bias.device).float()
    with torch.no_grad():
        bias += rate * torch.sign(load.mean() - load).to(bias.dtype).view_as(bias)


def _real(mask: Tensor | None, tokens: int, like: Tensor) -> Tensor:
    """(T,) float32, 1 for a real token."""
    if mask is None:
        return torch.ones(tokens, device=like.device)
    if mask.numel() != tokens:
        raise MoEError(
            f"the mask {tuple(mask.shape)} has {mask.numel()} tokens, the router logits have {tokens}."
        )
    return mask.reshape(-1).to(like.device).bool().float()


def _divisor(tokens: Tensor | float | None, real: Tensor) -> Tensor:
    given = real.sum() if tokens is None else torch.as_tensor(tokens, dtype=torch.float32, device=real.device)
    return given.clamp(min=1)


def _stack(rows: list[Tensor]) -> Tensor:
    """Layers may sit on several devices; the result sits with the first."""
    if not rows:
        raise MoEError("no router logits: ask the model for them with output_router_logits=True.")
    return torch.stack([row.to(rows[0].device) for row in rows])
