"""What configuration does a model from scratch have? Without TRL, so that a recipe can be checked in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from training_ready import TrainingReadyError
from training_ready.recipe.faults import did_you_mean


class ModelError(TrainingReadyError):
    """The model that the recipe names cannot be had."""


def scratch_config(
    config: Mapping[str, Any], *, vocab_size: int, **special_tokens: int | None
) -> PretrainedConfig:
    """The transformers configuration that ``model.config`` describes, with the tokenizer's vocabulary.

    Raises:
        ModelError: the model type is unknown, or has no such keys.
    """
    values = dict(config)
    model_type = str(values.pop("model_type"))
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING)
        raise ModelError(
            f"model.config.model_type: transformers knows no {model_type!r}; {hint or 'correct it'}"
        )
    kind = CONFIG_MAPPING[model_type]
    # A config takes any other name too, and ignores it; head_dim alone is read by models whose config lacks it.
    known = {*kind().to_dict(), *kind.attribute_map, "head_dim"}
    unknown = [f"{name} ({did_you_mean(name, known) or 'ignored'})" for name in values if name not in known]
    if unknown:
        raise ModelError(f"model.config: {kind.__name__} has no {', '.join(unknown)}")
    try:
        built = AutoConfig.for_model(model_type, vocab_size=vocab_size, **special_tokens, **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"model.config does not make a {model_type} model: {error}") from error
    return built
