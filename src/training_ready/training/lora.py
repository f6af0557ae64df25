"""Which layers does LoRA adapt? Those that TRL and PEFT make of ``lora_target_modules``, and never none."""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from trl import ModelConfig, get_peft_config

from training_ready.recipe.faults import did_you_mean
from training_ready.training.scratch import ModelError


def lora_config(model_args: ModelConfig, model: nn.Module) -> LoraConfig | None:
    """TRL's configuration of LoRA for ``model``; None without ``use_peft``.

    Raises:
        ModelError: ``lora_target_modules`` matches no module.
    """
    config: LoraConfig | None = get_peft_config(model_args)
    if config is None or not config.target_modules or config.target_modules == "all-linear":
        return config
    names = [name for name, _ in model.named_modules()]
    try:
        matched = any(check_target_module_exists(config, name) for name in names)
    except re.error as error:
        raise ModelError(
            f"lora_target_modules: {config.target_modules!r} is no regular expression ({error}); TRL makes one of a "
            "single name. Write names of modules, or '.*' before the last part of their names"
        ) from error
    if not matched:
        raise ModelError(f"lora_target_modules: {_unmatched(config.target_modules, names)}")
    return config


def _unmatched(targets: Any, names: list[str]) -> str:
    """What is wrong with targets of which none is in the model: a text is one expression for whole names."""
    wanted = [targets] if isinstance(targets, str) else sorted(targets)
    if isinstance(targets, str) and any(name.endswith(f".{targets}") for name in names):
        return (
            f"TRL makes of one name alone a regular expression for whole names, and {targets!r} matches none of them; "
            rf"write '.*\.{re.escape(targets)}'"
        )
    last = {name.rpartition(".")[2] for name in names if not name.endswith(tuple("0123456789"))}
    near = [hint for one in wanted if (hint := did_you_mean(one, last))]
    return f"{', '.join(wanted)} matches no module of this model; {' '.join(near) or 'correct the names'}"
