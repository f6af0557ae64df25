"""Releases of tiny random models of every family, with queries and keys sharpened so that position matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from training_ready.release.export import write_release
from training_ready.release.targets.conversations import multilingual_text

CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\n' }}\n"
    "    {%- if message['role'] == 'assistant' %}\n"
    "        {%- generation %}\n"
    "        {{- message['content'] + '<|im_end|>' }}\n"
    "        {%- endgeneration %}\n"
    "    {%- else %}\n"
    "        {{- message['content'] + '<|im_end|>' }}\n"
    "    {%- endif %}\n"
    "    {{- '\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\n' }}\n"
    "{%- endif %}\n"
)
# Large enough for every vocabulary below, small enough to run in a moment.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
THETA = 50_000.0
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": THETA,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def plain(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}, **more}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": plain(model_type="llama"),
    "llama3-rope": {"model_type": "llama", "rope_parameters": LLAMA3},
    "mistral": plain(model_type="mistral", head_dim=32, sliding_window=None),
    "mistral-tied": plain(model_type="mistral", sliding_window=None, tie_word_embeddings=True),
    "mistral-window": plain(model_type="mistral", sliding_window=64),
    "qwen2": plain(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": plain(model_type="qwen3", head_dim=32),
    "mixtral": plain(model_type="mixtral", **EXPERTS),
    "mixtral-top1": plain(model_type="mixtral", **{**EXPERTS, "num_experts_per_tok": 1}),
    "mixtral-tied": plain(model_type="mixtral", tie_word_embeddings=True, **EXPERTS),
    "mixtral-narrow-heads": plain(model_type="mixtral", head_dim=8, **EXPERTS),
    "llama3-narrow-heads": {"model_type": "llama", "head_dim": 8, "rope_parameters": LLAMA3},
    "phi3": plain(model_type="phi3", pad_token_id=1, original_max_position_embeddings=512),
    "gemma3_text": {
        "model_type": "gemma3_text",
        "head_dim": 32,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 70_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        },
    },
    "granite": plain(
        model_type="granite",
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        attention_multiplier=0.2,
        residual_multiplier=0.7,
    ),
    "starcoder2": plain(model_type="starcoder2", sliding_window=None),
    "cohere": plain(model_type="cohere", logit_scale=0.5),
    "deepseek_v2": plain(
        model_type="deepseek_v2",
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        topk_method="greedy",
        n_group=None,
        topk_group=None,
    ),
    "llama4_text": {
        "model_type": "llama4_text",
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 128,
        "rope_parameters": LLAMA3,
    },
}


def byte_level_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any script can be written; some merges, so that boundaries matter."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|unk|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=508,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(multilingual_text(100_000, seed=1), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|unk|>",
        additional_special_tokens=special[2:],
    )
    tokenizer.chat_template = template
    return tokenizer


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Random weights attend almost evenly, and then a wrong rotary base would not show."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(
                part in name for part in ("q_proj.weight", "k_proj.weight", "qkv_proj.weight", "kv_b_proj")
            ):
                weight.mul_(12)
            elif name.endswith("norm.weight"):
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def tiny_release(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A release of a family, by its name above or by a configuration; built once per name."""
    built: dict[str, Path] = {}

    def build(name: str, settings: Mapping[str, Any] | None = None) -> Path:
        if name not in built:
            values = {
                **SHAPE,
                "vocab_size": 512,
                "bos_token_id": None,
                "eos_token_id": 3,
                **(settings or FAMILIES[name]),
            }
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
            place = tmp_path_factory.mktemp(name)
            # Beside a qwen2 configuration transformers reads every tokenizer as Qwen's, so it has to be one.
            model.config.save_pretrained(place / "tokenizer")
            tokenizer.save_pretrained(place / "tokenizer")
            own = AutoTokenizer.from_pretrained(place / "tokenizer")
            built[name] = write_release(sharpened(model), own, place / "release", end_of_turn_ids=[3])
        return built[name]

    return build
