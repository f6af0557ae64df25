"""What a summary counts is what the release has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl import ModelConfig

from training_ready.moe.experts_lora import add_expert_adapters, merge_expert_adapters
from training_ready.training.summary import model_facts

from . import dense_base


def tiny(model_type: str, **shape: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**dense_base.SHAPE, **shape}, vocab_size=64, pad_token_id=0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "o_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["attention", "DoRA", "embedding", "a whole layer"],
)
def test_lora_is_counted_as_the_release_has_it(options: dict[str, Any]) -> None:
    model = tiny("mistral")
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    facts = model_facts(model, ModelConfig(model_name_or_path="base"))
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert (facts["parameters_merged"], facts["parameters_trainable"]) == (trained, trained)
    assert trained > 0
    assert facts["parameters_total"] == size(adapted.merge_and_unload())


def test_adapters_of_experts_are_counted_as_the_release_has_them() -> None:
    model = tiny("mixtral", num_local_experts=4, head_dim=None)
    whole = size(model)
    assert model_facts(model, ModelConfig())["parameters_merged"] == 0
    model.requires_grad_(False)
    add_expert_adapters(model, rank=4, alpha=8)
    facts = model_facts(model, ModelConfig())
    assert facts["parameters_merged"] == facts["parameters_trainable"] == size(model) - whole
    merge_expert_adapters(model)
    assert facts["parameters_total"] == size(model) == whole
