"""Packing: the logits of a conversation in a pack are those it has alone, or packing is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training_ready.stream.attention import SEPARATING, LeakError, leak, refuse_leak, refuse_unknown_backend

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def model_of(kind: str, implementation: str, **more: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**TINY, **more})
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


ASKED = {"vocab_size": 64, "device": torch.device("cpu")}


@pytest.mark.parametrize(
    "implementation",
    ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)],  # compiles for half a minute
)
def test_packed_and_separate_logits_agree(implementation: str) -> None:
    assert leak(model_of("llama", implementation), **ASKED) is None


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mixtral", EXPERTS),
        ("qwen3", {"head_dim": 8}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 4}),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2}),
        ("lfm2", {}),
    ],
)
def test_families_that_keep_conversations_apart(kind: str, more: dict[str, Any]) -> None:
    assert leak(model_of(kind, "sdpa", **more), **ASKED) is None


@pytest.mark.parametrize(
    ("kind", "implementation", "more"),
    [
        ("mamba", "eager", {"state_size": 4}),
        ("recurrent_gemma", "sdpa", {}),
        ("jamba", "sdpa", {}),
        ("opt", "sdpa", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
        ("bloom", "eager", {}),
    ],
)
def test_families_that_leak_are_refused(kind: str, implementation: str, more: dict[str, Any]) -> None:
    with pytest.raises(LeakError, match=rf"in a {kind} model .* Set packing: false"):
        refuse_leak(model_of(kind, implementation, **more), **ASKED)


def test_a_backend_that_is_not_known_to_separate_is_refused_and_the_others_named() -> None:
    for implementation in (*SEPARATING, "kernels-community/flash-attn2", "kernels-community/flash-attn3"):
        refuse_unknown_backend(implementation)
    for implementation in ("paged|sdpa", "kernels-community/metal-flash-sdpa"):
        with pytest.raises(LeakError, match="eager, sdpa, flex_attention, flash_attention_2"):
            refuse_unknown_backend(implementation)
