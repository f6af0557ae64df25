"""What do routers learn besides language? Balance over the global batch, small logits, or a moving bias.

The loss of a step is language + c * mean over layers of L_l + z * mean over layers of Z_l (``moe/balance.py``), the
same number and gradient for every split of the batch into micro-batches and ranks.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training_ready.moe.balance import GlobalBatchBalance, balance_bias_step, choice_counts, z_loss
from training_ready.moe.families import (
    MoEError,
    MoEFamily,
    RoutedLayer,
    model_config,
    moe_family,
    routed_layers,
)
from training_ready.moe.monitor import sum_over_ranks
from training_ready.moe.parameters import router_parameters
from training_ready.moe.routing import RouterRecorder, Routing
from training_ready.recipe.sections import MoeSection

BALANCE_STATE = "router_balance.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class BalancePlan:
    """What keeps the experts of this run alive, and why that."""

    balance: float = 0.0
    z: float = 0.0
    bias_rate: float = 0.0
    exact: bool = False
    reason: str

    @property
    def needs_gradient(self) -> bool:
        return bool(self.balance or self.z)


def plan_balance(
    model: nn.Module, moe: MoeSection, router_aux_loss_coef: float | None, *, adapters: bool
) -> BalancePlan:
    """Decide from the recipe, the family and what trains.

    Args:
        router_aux_loss_coef: TRL's key: a coefficient for the loss inside the models, whose balanced value is k.
        adapters: the run trains and saves adapters only.

    Raises :class:`MoEError` when the recipe asks for what this family or this run cannot have.
    """
    family = _family(model)
    asked = moe.balance_coefficient
    if asked is None and router_aux_loss_coef is not None:
        asked = router_aux_loss_coef * family.top_k
    if family.layout.balance == "bias":
        return _by_bias(family, moe, asked, adapters=adapters)
    if not any(parameter.requires_grad for parameter in router_parameters(model).values()):
        if asked or moe.z_loss:
            raise MoEError(
                "the routers are frozen, so a balance or z-loss would only bend the layers before them. Train the "
                f"routers (lora_modules_to_save: [{family.layout.router}], or use_peft: false), or leave "
                "moe.balance_coefficient, moe.z_loss and router_aux_loss_coef out."
            )
        return BalancePlan(reason="off: the routers are frozen")
    own = family.aux_loss_coef or 0.0
    balance, why = (
        (own * family.top_k, f"the model's own {own:g} x {family.top_k}")
        if asked is None
        else (
            asked,
            "as the recipe says",
        )
    )
    return BalancePlan(
        balance=balance,
        z=moe.z_loss,
        exact=moe.balance_counts == "exact",
        reason=f"loss per layer over the global batch, coefficient {balance:g} ({why})"
        if balance
        else f"off ({why})",
    )


def _by_bias(family: MoEFamily, moe: MoeSection, asked: float | None, *, adapters: bool) -> BalancePlan:
    if asked or moe.z_loss:
        raise MoEError(
            f"{family.model_type} is balanced by a bias on the choice and scores experts in its own way: a balance or "
            "z-loss on softmaxed logits has no meaning for it. Leave moe.balance_coefficient, moe.z_loss and "
            "router_aux_loss_coef out; moe.bias_rate moves the bias."
        )
    if adapters:
        return BalancePlan(reason="choice bias as loaded: only adapters are saved, so it must not move")
    return BalancePlan(
        bias_rate=moe.bias_rate, reason=f"choice bias, moved by {moe.bias_rate:g} after each step"
    )


class RouterLosses:
    """The losses of the routers and the step of their biases, micro-batch by micro-batch."""

    def __init__(self, model: nn.Module, plan: BalancePlan, *, micro_batches: int) -> None:
        """``micro_batches``: per optimizer step and rank."""
        self.family, self.plan = _family(model), plan
        self._micro_batches = micro_batches
        self._recorder = RouterRecorder(model)
        self._balance = GlobalBatchBalance(top_k=self.family.top_k, micro_batches=micro_batches)
        self._layers: list[RoutedLayer] = routed_layers(model)
        self._mean_tokens: Tensor | float | None = None
        self._exact: Tensor | None = None
        self._step_counts: Tensor | None = None
        self._seen: list[Tensor] = []

    def recording(self) -> AbstractContextManager[Routing]:
        """Keep the routing of the forwards inside the block."""
        return self._recorder.recording()

    def begin_step(self, tokens: Tensor, counts: Tensor | None = None) -> None:
        """Before the first micro-batch: ``tokens`` real ones of this rank in the step, and, if known, its pairs per
        expert (L, E). A collective call."""
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self._mean_tokens = sum_over_ranks(tokens) / (self._micro_batches * ranks)
        self._exact = None if counts is None else sum_over_ranks(counts)

    def counts(self, routing: Routing, mask: Tensor | None) -> Tensor:
        """Pairs per expert (L, E) of one forward."""
        return choice_counts(routing.chosen, self.family.num_experts, mask)

    def loss(self, routing: Routing, mask: Tensor | None) -> Tensor | None:
        """The weighted loss of one micro-batch, to be averaged over micro-batches and ranks; None without one.

        ``mask`` marks the real tokens; None: all are. A collective call.
        """
        counts = self.counts(routing, mask)
        if self.plan.bias_rate:
            self._step_counts = counts if self._step_counts is None else self._step_counts + counts
        if not self.plan.needs_gradient:
            return None
        balance = self._balance.loss(
            routing.logits, mask, local_counts=counts, counts=self._exact, mean_tokens=self._mean_tokens
        )
        z = z_loss(routing.logits, mask, tokens=self._mean_tokens)
        self._seen.append(torch.stack([balance.detach(), z.detach()]))
        return self.plan.balance * balance.mean() + self.plan.z * z.mean()

    def step_biases(self) -> None:
        """After the optimizer's step, where the family is balanced by a bias; a collective call."""
        if self._step_counts is None:
            return
        for routed, counts in zip(self._layers, sum_over_ranks(self._step_counts), strict=True):
            balance_bias_step(routed.bias(self.family), counts, rate=self.plan.bias_rate)
        self._step_counts = None

    def metrics(self) -> dict[str, float]:
        """Means since the last call over micro-batches and ranks, of all layers and of the worst; a collective call."""
        if not self._seen:
            return {}
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        balance, z = (sum_over_ranks(torch.stack(self._seen).mean(dim=0)) / ranks).tolist()
        self._seen.clear()
        found = {"aux_loss": sum(balance) / len(balance), "aux_loss_worst": max(balance)}
        return {**found, "router_z_loss": sum(z) / len(z)} if self.plan.z else found

    def save(self, folder: Path) -> None:
        """The window of counts, without which a resumed run would start its first steps with another load."""
        window = self._balance.state_dict()["window"]
        if window and self._micro_batches > 1:
            save_file({"window": torch.stack(window).cpu()}, folder / BALANCE_STATE)

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote.

        Raises :class:`MoEError` when a checkpoint of an accumulating run lacks it.
        """
        if self._micro_batches == 1 or self.plan.exact or not self.plan.balance:
            return
        if not (folder / BALANCE_STATE).is_file():
            raise MoEError(f"{folder} holds no {BALANCE_STATE}, so its run did not balance as this one does.")
        device = self._layers[0].router.weight.device
        window = load_file(folder / BALANCE_STATE)["window"].to(device)
        self._balance.load_state_dict({"window": list(window)})


def _family(model: nn.Module) -> MoEFamily:
    family = moe_family(model_config(model))
    if family is None:
        raise MoEError(f"{type(model).__name__} has no experts to balance.")
    return family
