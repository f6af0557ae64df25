"""Which model? Built from a config with random weights, or loaded from a folder or a hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.distributed import DistributedConfig
from trl import ModelConfig, get_quantization_config

from training_ready.training.scratch import ModelError, scratch_config


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


def load_model(model_args: ModelConfig, *, distributed: DistributedConfig | None = None) -> PreTrainedModel:
    """A pretrained model, from safetensors only; with ``distributed`` every rank loads its own part.

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
            **({} if distributed is None else {"distributed_config": distributed}),
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot load model {model_args.model_name_or_path!r} (revision {model_args.model_revision}): {error}. "
            "Check model_name_or_path, HF_ENDPOINT and HF_TOKEN."
        ) from error


def _dtype(name: str | None) -> torch.dtype | str:
    return name if name in (None, "auto") else getattr(torch, str(name))  # type: ignore[return-value]
