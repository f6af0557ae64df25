"""Adapters on the experts in a run: added as the recipe says, kept in the checkpoint's one adapter folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor

from training_ready.moe.adapter_files import fill_expert_adapters, save_expert_adapters
from training_ready.moe.experts_lora import add_expert_adapters
from training_ready.recipe.sections import ExpertAdaptersSection
from training_ready.training.checkpoints import ResumeError


def adapt_experts(model: Any, chosen: ExpertAdaptersSection) -> str:
    """Add the adapters; without PEFT adapters on other layers everything else is frozen. Returns a line that says so.

    Raises MoEError for experts that cannot be adapted.
    """
    if not isinstance(model, PeftModel):
        model.requires_grad_(False)
        model.enable_input_require_grads()  # re-entrant checkpointing needs an input with a gradient
    added = add_expert_adapters(
        model,
        rank=chosen.rank,
        alpha=chosen.alpha,
        dropout=chosen.dropout,
        projections=chosen.projections,
    )
    size = sum(parameter.numel() for adapter in added for parameter in adapter.parameters())
    return (
        f"experts: rank {chosen.rank} on {', '.join(chosen.projections)} of every expert, {len(added)} adapter stacks, "
        f"{size} parameters"
    )


class ExpertAdapterFiles:
    """The experts' adapters, beside those of PEFT on other layers if there are any."""

    def write(self, model: Any, folder: Path) -> None:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        save_expert_adapters(model, folder, base_model=inner.config._name_or_path)

    def read(self, model: Any, folder: Path) -> None:
        others = fill_expert_adapters(model, folder)
        fill_peft(model, others, folder)


def fill_peft(model: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put what PEFT has saved in ``folder`` into its adapters of the model, if it has any.

    Raises ResumeError when one lacks what the other has.
    """
    strange = list(tensors)
    if isinstance(model, PeftModel):
        result = set_peft_model_state_dict(model, tensors)
        lacking = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
        strange = [*result.unexpected_keys, *lacking]
    if strange:
        raise ResumeError(
            f"{folder}: its adapter does not fit this model: {', '.join(sorted(strange)[:3])} …"
        )
