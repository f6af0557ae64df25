"""Which model? Built from a config with random weights, or loaded from a folder or a hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, get_quantization_config

from training_ready import TrainingReadyError


class ModelError(TrainingReadyError):
    """The model that the recipe names cannot be had."""


def build_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, model_args: ModelConfig, seed: int
) -> PreTrainedModel:
    """A model with random weights from a transformers config, its vocabulary and special tokens the tokenizer's.

    Raises:
        ModelError: transformers refuses the config.
    """
    values = dict(config)
    model_type = values.pop("model_type")
    try:
        built = AutoConfig.for_model(
            model_type,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **values,
        )
        unknown = sorted(set(values) - set(built.to_dict()))
        if unknown:
            raise ModelError(
                f"model.config: {model_type} has no {', '.join(unknown)}; see its transformers config class"
            )
        set_seed(seed)
        return AutoModelForCausalLM.from_config(
            built, dtype=_dtype(model_args.dtype), attn_implementation=model_args.attn_implementation
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"model.config does not make a {model_type} model: {error}") from error


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
