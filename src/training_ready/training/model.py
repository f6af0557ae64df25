"""Which model? Built from a config with random weights, or loaded from a folder or a hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl import ModelConfig, get_quantization_config

from training_ready import TrainingReadyError
from training_ready.recipe.faults import did_you_mean


class ModelError(TrainingReadyError):
    """The model that the recipe names cannot be had."""


def build_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, model_args: ModelConfig, seed: int
) -> PreTrainedModel:
    """A model with random weights from a transformers config, its vocabulary and special tokens the tokenizer's.

    Raises:
        ModelError: transformers refuses the config.
    """
    built = scratch_config(
        config,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(
            built, dtype=_dtype(model_args.dtype), attn_implementation=model_args.attn_implementation
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"model.config does not make a {built.model_type} model: {error}") from error


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
    known = {*kind().to_dict(), *kind.attribute_map}  # a config takes any other name too, and ignores it
    unknown = [f"{name} ({did_you_mean(name, known) or 'ignored'})" for name in values if name not in known]
    if unknown:
        raise ModelError(f"model.config: {kind.__name__} has no {', '.join(unknown)}")
    try:
        built = AutoConfig.for_model(model_type, vocab_size=vocab_size, **special_tokens, **values)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"model.config does not make a {model_type} model: {error}") from error
    return built


def load_model(model_args: ModelConfig) -> PreTrainedModel:
    """A pretrained model, from safetensors only.

    Raises:
        ModelError: it cannot be found or loaded.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            dtype=_dtype(model_args.dtype),
            attn_implementation=model_args.attn_implementation,
            quantization_config=get_quantization_config(model_args),
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load model {model_args.model_name_or_path!r} (revision {model_args.model_revision}): {error}. "
            "Check model_name_or_path, HF_ENDPOINT and HF_TOKEN."
        ) from error


def _dtype(name: str | None) -> torch.dtype | str:
    return name if name in (None, "auto") else getattr(torch, str(name))  # type: ignore[return-value]
