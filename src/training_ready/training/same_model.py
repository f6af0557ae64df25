"""Do a checkpoint's weights still mean the same? Not under every recipe: many fit in shape and compute something else.

Adapters are scaled by alpha and rank, routers choose ``top_k`` experts, experts in NF4 are other experts, and none of
that is in a tensor. A checkpoint has the recipe that it was saved under; both are compared key by key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from training_ready.recipe.recipe import Recipe
from training_ready.recipe.sections import ExpertAdaptersSection, Section, SharedBaseSection
from training_ready.recipe.trl_keys import trl_keys
from training_ready.training.checkpoints import ResumeError
from training_ready.training.run_folder import RECIPE

_LORA = (
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "use_bnb_nested_quant",
)
"""What LoRA computes, and over which base. Dropout is no part of it: only training has it."""
_EXPERTS: Mapping[str, tuple[type[Section], frozenset[str]]] = {
    "adapters": (ExpertAdaptersSection, frozenset({"dropout"})),
    "shared_base": (SharedBaseSection, frozenset({"dropout", "start"})),
}
"""Sections of ``moe:``, and their keys that are no part of the function."""
_TRAINING_ONLY = re.compile(r"dropout|router_aux_loss_coef$")
"""Keys of a transformers configuration that only training has."""


def refuse_other_model(checkpoint: Path, recipe: Recipe) -> None:
    """
    Raises:
        ResumeError: the recipe makes another function of the checkpoint's weights than the one that was trained, or
            the checkpoint does not know its recipe.
    """
    try:
        then = _function(yaml.safe_load((checkpoint / RECIPE).read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ResumeError(
            f"{checkpoint} has no readable {RECIPE}, so nothing says which model its weights belong to: choose an "
            "earlier checkpoint, or start anew with another output_dir."
        ) from error
    now = _function(recipe.resolved())
    if not (then["use_peft"] and now["use_peft"]):  # LoRA's keys have no effect in one of them
        then, now = ({key: value for key, value in one.items() if key not in _LORA} for one in (then, now))
    changed = "; ".join(_changes(then, now))
    if changed:
        raise ResumeError(
            f"{checkpoint} holds weights of another model ({changed}): they would not fit, or fit and compute "
            "something else. Restore these values in the recipe, or start anew with another output_dir."
        )


def _function(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a resolved recipe says about the function that weights have, defaults filled in."""
    moe, config = resolved.get("moe") or {}, (resolved.get("model") or {}).get("config") or {}
    return {
        **{key: _unordered(resolved.get(key, trl_keys()[key].default)) for key in ("use_peft", *_LORA)},
        "moe": {name: _part(moe.get(name), *facts) for name, facts in _EXPERTS.items()}
        | {"experts_4bit": moe.get("experts_4bit")},
        "model": {"config": {key: config[key] for key in config if not _TRAINING_ONLY.search(key)}},
    }


def _part(
    given: Mapping[str, Any] | None, section: type[Section], aside: frozenset[str]
) -> dict[str, Any] | None:
    if given is None:
        return None
    fields = section.model_fields.items()
    return {key: _unordered(given.get(key, field.default)) for key, field in fields if key not in aside}


def _unordered(value: Any) -> Any:
    """Names of modules as a set: their order means nothing."""
    return sorted(value) if isinstance(value, list) else value


def _changes(then: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in sorted({*then, *now}):
        before, after = then.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, f"{path}{key}.")
        elif before != after:
            yield f"{path}{key}: {_said(before)} then, {_said(after)} now"


def _said(value: Any) -> str:
    """A value as a recipe writes it, on one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n...\n").strip()
