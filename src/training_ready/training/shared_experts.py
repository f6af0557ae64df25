"""Experts over one shared dense base in a run: built as the recipe says, kept apart from the base in checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import set_seed

from training_ready.moe.adapter_files import WEIGHTS
from training_ready.moe.dense_identity import BaseIdentity, identify
from training_ready.moe.families import MoEError, routed_layers
from training_ready.moe.routing import route_in_float32
from training_ready.moe.shared_base import build_shared_base, train_shared_base
from training_ready.moe.shared_base_files import (
    fill_shared_base,
    load_shared_base,
    read_shared_base,
    read_shared_lora,
    save_shared_base,
)
from training_ready.recipe.sections import SharedBaseSection
from training_ready.training.checkpoints import ResumeError
from training_ready.training.expert_adapters import fill_peft


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedExperts:
    """What a checkpoint holds of such a model: adapters, routers, and which base they belong to.

    LoRA on the attention lies beside it, as PEFT saves it.
    """

    base: BaseIdentity
    experts: tuple[str, ...]
    """What each expert is for."""

    def write(self, model: Any, folder: Path) -> None:
        save_shared_base(model, folder, experts=self.experts, base=self.base)

    def read(self, model: Any, folder: Path) -> None:
        settings, tensors = read_shared_base(folder)
        if settings.base_sha256 != self.base.sha256:
            raise ResumeError(
                f"{folder} was trained over {settings.base} (sha256 {(settings.base_sha256 or 'unknown')[:12]}), this "
                f"base is {self.base.name} ({self.base.sha256[:12]}). Name the base of that run, or start anew with "
                "another output_dir."
            )
        fill_shared_base(model, tensors, folder)
        if read_shared_lora(folder, settings):  # refuses what is not whole
            fill_peft(model, load_file(folder / WEIGHTS), folder)


def share_base(dense: Any, chosen: SharedBaseSection, *, seed: int) -> tuple[Any, SharedExperts]:
    """A mixture of experts over ``dense``, which is used up; everything but adapters and routers is frozen.

    When PEFT has put LoRA on the attention, ``train_shared_base`` has to be called once more.

    Adapters and routers are fp32 whatever the base is, and routers compute in it: steps of 1e-4 vanish in bf16.

    Raises MoEError for a base that no target holds, or a ``start`` that does not fit the recipe.
    """
    if any(isinstance(parameter, DTensor) for parameter in dense.parameters()):
        raise MoEError(
            "moe.shared_base needs a base that lies whole in each process, and this one is sharded."
        )
    base = identify(dense)
    set_seed(seed)  # the same factors and routers in every process and at every start
    if chosen.start is None:
        experts = tuple(str(expert) for expert in range(chosen.experts))
        model = new_experts(dense, chosen)
    else:
        experts = _refuse_other_start(chosen, Path(chosen.start))
        model = load_shared_base(dense, Path(chosen.start), dropout=chosen.dropout)
    keep_routers_in_float32(model)
    route_in_float32(model)
    train_shared_base(model)
    model.enable_input_require_grads()  # re-entrant checkpointing needs an input with a gradient
    return model, SharedExperts(base=base, experts=experts)


def new_experts(dense: Any, chosen: SharedBaseSection) -> Any:
    """Experts over ``dense``, which is used up, as the recipe says; on the meta device in shapes only."""
    return build_shared_base(
        dense,
        experts=chosen.experts,
        top_k=chosen.top_k,
        rank=chosen.rank,
        alpha=chosen.alpha,
        dropout=chosen.dropout,
    )


def keep_routers_in_float32(model: Any) -> None:
    """The routers' weights; that they also compute in it is ``route_in_float32``."""
    for routed in routed_layers(model):
        router: Any = routed.router
        router.weight = nn.Parameter(router.weight.detach().to(torch.float32))


def _refuse_other_start(chosen: SharedBaseSection, start: Path) -> tuple[str, ...]:
    """The names of the experts in ``start``, if it was made as the recipe says."""
    saved, _ = read_shared_base(start)
    pairs = {
        "experts": (chosen.experts, len(saved.experts)),
        "top_k": (chosen.top_k, saved.top_k),
        "rank": (chosen.rank, saved.rank),
        "alpha": (chosen.alpha, saved.alpha),
    }
    wrong = [f"{key} {ours:g}, there {there:g}" for key, (ours, there) in pairs.items() if ours != there]
    if wrong:
        raise MoEError(
            f"moe.shared_base.start {start} was made otherwise than the recipe says: {'; '.join(wrong)}."
        )
    return tuple(saved.experts)
