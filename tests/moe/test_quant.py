from __future__ import annotations

import copy

import pytest
import torch

from training_ready.moe.adapter_files import load_expert_adapters, save_expert_adapters
from training_ready.moe.experts_lora import add_expert_adapters, expert_adapters, merge_expert_adapters
from training_ready.moe.families import MoEError, routed_layers
from training_ready.moe.quant import (
    Nf4Experts,
    load_quantised_experts,
    quantise_experts,
    quantised_experts,
    save_quantised_experts,
)
from training_ready.moe.quant_nf4 import LEVELS, dequantise_nf4, quantise_nf4

FUSED = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3"]
"""gpt_oss stores its experts transposed and with biases."""


def quantised_and_dense(model, *, double=False):
    """The model with NF4 experts, and one with the same experts dequantised into plain weights."""
    quantised = copy.deepcopy(model).requires_grad_(False)
    quantise_experts(quantised, double=double)
    dense = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for name, weight in quantised_experts(quantised):
            dense.get_parameter(name).copy_(weight.weight(0, weight.shape[0]))
    return quantised, dense


def adapted(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for adapter in add_expert_adapters(model, rank=4, alpha=8.0):
            adapter.A.uniform_(-0.2, 0.2, generator=generator)
            adapter.B.normal_(std=0.3, generator=generator)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def language_loss(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=False).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_scales_and_values_are_those_of_bitsandbytes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is in the extra 'gpu'")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[3, :64] = 0.0
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    mine = quantise_nf4(weight)
    assert torch.equal(mine.packed, theirs.view(-1))
    assert torch.equal(mine.scales, state.absmax)
    assert torch.equal(dequantise_nf4(mine, (96, 128), dtype), functional.dequantize_4bit(theirs, state))


def test_every_value_gets_its_nearest_level():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    restored = dequantise_nf4(quantise_nf4(weight), (64, 64), torch.float32)
    levels = torch.tensor(LEVELS)
    candidates = weight.abs().amax(dim=1)[:, None, None] * levels
    nearest = (candidates - weight[:, :, None]).abs().amin(dim=-1)
    assert torch.allclose((restored - weight).abs(), nearest, atol=1e-6)


def test_double_quantisation_saves_scales_and_costs_little():
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(3))
    once, twice = quantise_nf4(weight), quantise_nf4(weight, double=True)
    values = weight.numel()
    assert 8 * once.bytes / values == 4.5
    assert 8 * twice.bytes / values == pytest.approx(4.127, abs=0.001)
    errors = [
        float((dequantise_nf4(each, (512, 256), torch.float32) - weight).square().mean())
        for each in (once, twice)
    ]
    assert errors[0] < errors[1] < 1.01 * errors[0]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("model_type", FUSED)
def test_forward_and_gradients_equal_the_dequantised_model(model_type, double, tiny_model, token_ids):
    base = tiny_model(model_type, hidden_size=64, intermediate_size=32).eval()
    quantised, dense = (adapted(model) for model in quantised_and_dense(base, double=double))
    first, second = logits(quantised, token_ids), logits(quantised, token_ids)
    assert torch.equal(first, second)
    assert torch.allclose(first, logits(dense, token_ids), atol=1e-5)
    assert not torch.allclose(first, logits(adapted(copy.deepcopy(base)), token_ids), atol=1e-3)
    for model in (quantised, dense):
        model.enable_input_require_grads()
        language_loss(model, token_ids).backward()
    pairs = zip(expert_adapters(quantised), expert_adapters(dense), strict=True)
    for (_, mine), (_, theirs) in pairs:
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert b.grad.abs().max() > 1e-5
            assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_without_adapters_too(tiny_model, token_ids):
    quantised, dense = quantised_and_dense(tiny_model("mixtral", hidden_size=64).eval())
    assert torch.allclose(logits(quantised, token_ids), logits(dense, token_ids), atol=1e-5)


def test_input_gradients_reach_lower_layers(tiny_model, token_ids):
    quantised, dense = quantised_and_dense(tiny_model("mixtral", hidden_size=64).eval())
    gradients = []
    for model in (quantised, dense):
        embedding = model.get_input_embeddings().weight.requires_grad_(True)
        language_loss(model, token_ids).backward()
        gradients.append(embedding.grad)
    assert gradients[1].abs().max() > 1e-5
    assert torch.allclose(*gradients, atol=1e-7)


def test_checkpointing_gives_the_same_gradients(tiny_model, token_ids):
    def gradients(checkpointing):
        model, _ = quantised_and_dense(tiny_model("qwen3_moe", hidden_size=64))
        adapted(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        language_loss(model, token_ids).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_nothing_dequantised_is_kept_and_little_memory_is_taken(tiny_model, token_ids):
    base = tiny_model("mixtral", hidden_size=64, intermediate_size=192, num_local_experts=8)
    plain = sum(p.numel() for name, p in base.named_parameters() if ".experts." in name)
    model = base.requires_grad_(False)
    assert 8 * quantise_experts(model) == pytest.approx(4.5 * plain)
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    adapted(model).train().enable_input_require_grads()
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        language_loss(model, token_ids)
    assert shapes
    assert not any(shape[-2:] in {(384, 64), (64, 384), (192, 64), (64, 192)} for shape in shapes)


@pytest.mark.parametrize("double", [False, True])
def test_saved_and_loaded_into_an_empty_model(double, tiny_model, tiny_config, token_ids, tmp_path):
    model, _ = quantised_and_dense(tiny_model("mixtral", hidden_size=64).bfloat16().eval(), double=double)
    save_quantised_experts(model, tmp_path)
    other = tiny_model("mixtral", hidden_size=64).bfloat16().eval()
    for routed in routed_layers(other):
        routed.block.experts.to("meta")
    load_quantised_experts(other, tmp_path)
    assert torch.equal(logits(other, token_ids), logits(model, token_ids))
    with pytest.raises(MoEError, match=r"\[4, 60, 64\] in this model, \[4, 48, 64\] in the file"):
        load_quantised_experts(tiny_model("mixtral", hidden_size=64, intermediate_size=30), tmp_path)


def test_adapters_trained_on_nf4_load_on_plain_experts(tiny_model, token_ids, tmp_path):
    quantised, dense = quantised_and_dense(tiny_model("mixtral", hidden_size=64).eval())
    expected = logits(adapted(quantised), token_ids)
    save_expert_adapters(quantised, tmp_path)
    load_expert_adapters(dense, tmp_path)
    assert torch.allclose(logits(dense, token_ids), expected, atol=1e-5)
    with pytest.raises(MoEError, match="merge it into the unquantised model"):
        merge_expert_adapters(quantised)


def test_casting_changes_what_comes_out_and_no_scale():
    weight = torch.randn(2, 8, 64)
    quantised = Nf4Experts.quantised(weight, double=True)
    before = {name: buffer.clone() for name, buffer in quantised.named_buffers()}
    quantised.to(torch.bfloat16)
    assert quantised.weight(0, 2).dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in quantised.named_buffers())
    assert {buffer.dtype for buffer in before.values()} == {torch.uint8, torch.int8, torch.float32}


def test_experts_are_read_in_groups_and_idle_ones_not_at_all(monkeypatch):
    quantised = Nf4Experts.quantised(torch.randn(4, 8, 64))
    rows, ends = torch.randn(5, 64), torch.tensor([2, 2, 5, 5], dtype=torch.int32)
    whole = quantised(rows, ends)
    monkeypatch.setattr("training_ready.moe.quant._GROUP_BYTES", 1)
    read = []
    original = Nf4Experts.weight
    monkeypatch.setattr(Nf4Experts, "weight", lambda self, a, b: read.append((a, b)) or original(self, a, b))
    assert torch.allclose(quantised(rows, ends), whole, atol=1e-6)
    assert read == [(0, 1), (2, 3)]


def test_what_cannot_be_quantised_is_refused(tiny_model):
    with pytest.raises(MoEError, match=r"\(3, 50\) has 150 values, NF4 needs a multiple of 64"):
        quantise_nf4(torch.randn(3, 50))
    with pytest.raises(MoEError, match="not finite"):
        quantise_nf4(torch.full((64,), float("nan")))
    with pytest.raises(MoEError, match="no plain fused weight"):
        quantise_experts(adapted(tiny_model("mixtral")))
