"""Tiny random models of every supported family, built from configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training_ready.moe.families import FAMILIES, routed_layers

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "output_router_logits": True,
}
LATENT_ATTENTION = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
GROUPED = {
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 16, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "qwen3_next": {
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "minimax": {"layer_types": ["full_attention", "linear_attention"], "block_size": 8},
    "granitemoeshared": {"shared_intermediate_size": 16},
    "minimax_m2": {"rotary_dim": 8},
    "deepseek_v2": {**LATENT_ATTENTION, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT_ATTENTION, **GROUPED},
    "glm4_moe": GROUPED,
    "dots1": GROUPED,
    "ernie4_5_moe": {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
}
MOE_WIDTH = {
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "dots1",
    "ernie4_5_moe",
}


def small_config(model_type: str, **changes: Any) -> Any:
    settings = {**SMALL, FAMILIES[model_type].experts: 4, **SPECIAL.get(model_type, {})}
    if model_type in MOE_WIDTH:
        settings["moe_intermediate_size"] = 24
    return AutoConfig.for_model(model_type, **{**settings, **changes})


def _model(model_type: str, *, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(small_config(model_type, **changes), attn_implementation="eager")
    with torch.no_grad():
        for routed in routed_layers(model):
            routed.router.weight.normal_(std=0.5)
    return model


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    """Builds a family's configuration with 4 experts, top-2 and a hidden size of 32."""
    return small_config


@pytest.fixture
def tiny_model() -> Callable[..., Any]:
    """Builds a random model whose routers are spread enough to choose differently from token to token."""
    return _model


@pytest.fixture
def token_ids() -> torch.Tensor:
    """(B=3, T=10), no padding token among them."""
    return torch.randint(3, 96, (3, 10), generator=torch.Generator().manual_seed(7))


@pytest.fixture(params=sorted(FAMILIES))
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)
