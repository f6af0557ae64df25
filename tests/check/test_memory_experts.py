"""Are experts in four bits counted as large as they are?"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from training_ready.check.memory_arithmetic import count_weights, quantised_experts
from training_ready.check.memory_step import StepSpec
from training_ready.check.memory_trace import PeakMemory, Split
from training_ready.moe.quant import quantise_experts


@pytest.mark.parametrize("double", [False, True])
def test_the_weights_shrink_by_what_quantising_really_saves(double: bool) -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    spec = StepSpec(config=config, length=64, dtype=torch.bfloat16)
    weights = count_weights(spec)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    before = sum(p.numel() * 2 for name, p in model.named_parameters() if ".experts." in name)
    assert weights.experts * 2 == before
    assert weights.largest_expert == 2 * 256 * 128
    saved = before - quantise_experts(model, double=double)
    peak = PeakMemory(moments={"forward": Split(parameters=before), "optimizer": Split(parameters=before)})
    found = quantised_experts(peak, weights, double=double).moments
    assert before - found["forward"].parameters == pytest.approx(saved, rel=1e-3)
    # An expert exists unpacked while it computes, and never in the optimizer's step.
    assert found["forward"].activations > 2 * weights.largest_expert
    assert found["optimizer"].activations == 0
