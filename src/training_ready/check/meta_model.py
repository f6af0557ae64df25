"""What would be trained, without a single weight: configuration, and the model on the meta device."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_ready import TrainingReadyError
from training_ready.check.context import CheckContext, Missing
from training_ready.recipe.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


class MetaModelError(TrainingReadyError):
    """The model that the recipe describes cannot be built, not even without weights; ``key`` is at fault."""

    key: str | None = None


def model_source(context: CheckContext) -> str:
    """``model_name_or_path`` in a form that loads: a folder, the hub's name, or offline the copy in the hub's cache.

    Raises:
        Missing: offline, and the cache has no copy.
    """
    name, revision = str(context.recipe.trl["model_name_or_path"]), context.recipe.effective("model_revision")
    if Path(name).is_dir() or not context.offline:
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return str(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, FileNotFoundError) as error:
        raise Missing(
            f"{name} is neither a folder nor in the hub's cache of this machine, and this check is --offline",
            owner=None,
        ) from error


def config_of(context: CheckContext) -> PretrainedConfig:
    """The transformers configuration of the recipe's model. See :attr:`CheckContext.model_config`."""
    recipe = context.recipe
    if recipe.model.config is not None:
        from training_ready.training.scratch import scratch_config

        return scratch_config(recipe.model.config, vocab_size=_vocabulary(context))
    from transformers import AutoConfig

    source, revision = model_source(context), recipe.effective("model_revision")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
        return config
    except (OSError, ValueError, KeyError) as error:
        raise MetaModelError(
            f"no configuration of {source!r} (revision {revision or 'main'}): {_first_line(error)}. Check the name, "
            "HF_ENDPOINT and HF_TOKEN"
        ) from error


def _vocabulary(context: CheckContext) -> int:
    """Rows of the embedding of a model from scratch: the tokenizer's if there is one, else as many as it may get."""
    try:
        return len(context.tokenizer)
    except Missing:
        tokenizer = context.recipe.model.tokenizer
        return tokenizer.vocab_size if tokenizer else 0


def build_on_meta(recipe: Recipe, config: PretrainedConfig) -> PreTrainedModel:
    """The model with shapes and no weights, in the recipe's dtype, all parameters trainable.

    Attention is transformers' choice, not the recipe's: flash-attn need not be installed where a recipe is checked.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = recipe.effective("dtype")
    dtype: Any = None if name in (None, "auto") else getattr(torch, str(name))
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError, AttributeError) as error:
        raise MetaModelError(
            f"transformers builds no causal language model from this {config.model_type} configuration: "
            f"{_first_line(error)}"
        ) from error


def adapted(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """The model as it would be trained: with its adapters, everything else frozen, when ``use_peft`` is set.

    Raises:
        ModelError: ``lora_target_modules`` matches no module.
        MetaModelError: peft refuses the adapters.
        MoEError: the experts cannot be adapted, or not be built over this base.
    """
    trained: PreTrainedModel | PeftModel = model
    if recipe.moe.shared_base is not None:
        import torch

        from training_ready.training.shared_experts import new_experts

        with torch.device("meta"):
            trained = model = new_experts(model, recipe.moe.shared_base)
    if recipe.effective("use_peft"):
        trained = _with_lora(recipe, model)
    if recipe.moe.shared_base is not None:
        from training_ready.moe.shared_base import train_shared_base

        train_shared_base(trained)  # PEFT has frozen all but its own
    if recipe.moe.adapters is not None:
        import torch

        from training_ready.training.expert_adapters import adapt_experts

        with torch.device("meta"):
            adapt_experts(trained, recipe.moe.adapters)
    return trained


def _with_lora(recipe: Recipe, model: PreTrainedModel) -> PeftModel:
    import torch
    from peft import get_peft_model
    from trl import ModelConfig

    from training_ready.training.lora import lora_config

    config = lora_config(ModelConfig(**recipe.trl_group("ModelConfig")), model)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # names that match nothing: the probe of the parameters says it better
            return get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        refusal = MetaModelError(f"peft refuses these adapters: {_first_line(error)}")
        refusal.key = "lora_dropout" if "lora_dropout" in str(error) else None
        raise refusal from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
