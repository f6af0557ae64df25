"""A tiny dense model with a tokenizer, as a base for experts, and the recipe that trains over it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training_ready.training.tokenizer import train_tokenizer

# As in Mistral-Nemo the heads are narrower than hidden / heads, and eps is nobody's default.
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 3e-4,
    "max_position_embeddings": 512,
    "sliding_window": None,
}
RECIPE = """
data: {corpus: final_dataset/quickstart/manifest.json}
stream: {max_truncated: 1.0}
attn_implementation: sdpa
dtype: float32
bf16: false
use_cpu: true
activation_checkpointing: false
max_length: 256
packing: true
max_steps: 6
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-2
logging_steps: 1
save_steps: 2
seed: 7
"""


def write_model(folder: Path, model_type: str = "mistral", **shape: object) -> Path:
    tokenizer = train_tokenizer(["what goes through your mind when you wake at night?"], vocab_size=270)
    torch.manual_seed(3)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    config = AutoConfig.for_model(model_type, **{**SHAPE, **shape}, **special, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)
    return folder
