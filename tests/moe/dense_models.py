"""Small random dense models to build experts over, for the tests of shared bases and of upcycling."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

ROPE = {"rope_type": "default", "rope_theta": 54_321.0}
# As in Mistral-Nemo the heads are narrower than hidden / heads = 12, and eps and theta are nobody's default.
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 3e-4,
    "pad_token_id": 0,
    "rope_parameters": ROPE,
}


def random_model(config: Any) -> Any:
    """No weight is at its initial value, the norms' neither."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model
