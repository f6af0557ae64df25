"""Decisions about balance, thresholds on the load, and fp32 routers, on tiny real models."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from training_ready.moe.balance import balance_loss
from training_ready.moe.families import MoEError, routed_layers
from training_ready.moe.routing import RouterRecorder, route_in_float32
from training_ready.recipe.sections import MoeSection
from training_ready.training.expert_load import ExpertLoadLog
from training_ready.training.moe_losses import RouterLosses, plan_balance

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "pad_token_id": 0,
}
IDS = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def build(model_type: str = "mixtral", **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, "router_aux_loss_coef": 0.02, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for routed in routed_layers(model):
            routed.router.weight.normal_(std=0.5)
    return model.train()


def plan(model: Any, coefficient: float | None = None, *, adapters: bool = False, **moe: Any) -> Any:
    return plan_balance(model, MoeSection(**moe), coefficient, adapters=adapters)


def test_the_models_own_coefficient_keeps_its_meaning() -> None:
    assert plan(build()).balance == pytest.approx(0.02 * 2)
    assert plan(build(), 0.01).balance == pytest.approx(0.01 * 2)
    assert plan(build(), balance_coefficient=0.3).balance == 0.3
    assert plan(build(), 0.0).balance == 0
    assert not plan(build(), balance_coefficient=0.0).needs_gradient


def test_frozen_routers_are_not_balanced_and_asking_for_it_is_refused() -> None:
    frozen = get_peft_model(build(), LoraConfig(target_modules=["q_proj", "o_proj"]))
    assert "frozen" in plan(frozen, adapters=True).reason
    assert not plan(frozen, adapters=True).needs_gradient
    for wanted in ({"balance_coefficient": 0.1}, {"z_loss": 0.1}):
        with pytest.raises(MoEError, match="lora_modules_to_save"):
            plan(frozen, adapters=True, **wanted)
    trained = get_peft_model(
        build(), LoraConfig(target_modules=["q_proj", "o_proj"], modules_to_save=["gate"])
    )
    assert plan(trained, adapters=True).balance == pytest.approx(0.04)


def test_the_step_of_two_micro_batches_is_the_loss_of_both_together() -> None:
    model = build()
    losses = RouterLosses(
        model, plan(model, balance_coefficient=1.0, z_loss=0.1, balance_counts="exact"), micro_batches=2
    )
    mask = torch.ones_like(IDS)
    mask[3, 4:] = 0
    with losses.recording() as whole:
        model(input_ids=IDS, attention_mask=mask)
    counts = losses.counts(whole, mask)
    assert counts.sum().item() == 2 * 2 * int(mask.sum())
    expected = balance_loss(whole.logits, counts, mask)
    losses.begin_step(mask.sum(), counts)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        with losses.recording() as part:
            model(input_ids=IDS[rows], attention_mask=mask[rows])
        parts.append(losses.loss(part, mask[rows]))
    metrics = losses.metrics()
    assert metrics["aux_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert metrics["aux_loss_worst"] == pytest.approx(expected.max().item(), rel=1e-5)
    mean = torch.stack([part for part in parts if part is not None]).mean()
    assert mean.item() == pytest.approx(metrics["aux_loss"] + 0.1 * metrics["router_z_loss"], rel=1e-5)
    assert losses.metrics() == {}


def test_an_expert_without_tokens_warns_and_stops(caplog: pytest.LogCaptureFixture) -> None:
    model = build("gpt_oss")
    for routed in routed_layers(model):
        routed.router.bias.data[3] = -1e9
    watched = ExpertLoadLog(model, MoeSection(warn_min_share=0.01, stop_on_dead_steps=10))
    model(input_ids=IDS)
    with caplog.at_level(logging.WARNING, logger="training_ready"):
        metrics = watched.since_last_log(5)
    assert "2 experts got less than moe.warn_min_share" in caplog.text
    assert "expert 3 of layer 0" in caplog.text
    assert metrics["moe/dead_experts"] == 2
    assert metrics["expert_load/layer_1/expert_3"] == 0
    model(input_ids=IDS)
    with pytest.raises(MoEError, match=r"step 10: 2 experts got no token .* expert 3 of layer 0 for 10"):
        watched.since_last_log(10)


def test_an_expert_that_comes_back_does_not_stop() -> None:
    model = build("gpt_oss")
    routers = [routed.router for routed in routed_layers(model)]
    watched = ExpertLoadLog(model, MoeSection(stop_on_dead_steps=10))
    for step, bias in ((5, -1e9), (10, 1e9), (15, -1e9)):
        for router in routers:
            router.bias.data[3] = bias
            router.bias.data[2] = 0.5 - bias  # the other one gets its share in turn
        model(input_ids=IDS)
        watched.since_last_log(step)


def test_many_experts_are_logged_by_their_worst_layer_only() -> None:
    model = build(num_local_experts=200)
    watched = ExpertLoadLog(model, MoeSection())
    model(input_ids=IDS)
    assert not any(name.startswith("expert_load/") for name in watched.since_last_log(1))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_fp32_routers_choose_as_an_fp32_model_does(family: str) -> None:
    """The bf16 model's own hidden states, routed by fp32 arithmetic; and the gradient reaches the bf16 weight."""
    model = build(family).to(torch.bfloat16)
    hidden: dict[int, torch.Tensor] = {}
    for index, routed in enumerate(routed_layers(model)):
        routed.router.register_forward_pre_hook(
            lambda _, args, index=index: hidden.__setitem__(index, args[0].detach())
        )
    route_in_float32(model)
    recorder = RouterRecorder(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), recorder.recording() as routing:
        out = model(input_ids=IDS).logits
    for index, (routed, logits) in enumerate(zip(routed_layers(model), routing.logits, strict=True)):
        bias = getattr(routed.router, "bias", None)
        rows = hidden[index].float().reshape(-1, 32)
        exact = rows @ routed.router.weight.float().T + (0 if bias is None else bias.float())
        assert logits.dtype == torch.float32
        assert torch.allclose(logits, exact, atol=1e-6)
    out.float().square().mean().backward()
    weight = routed_layers(model)[0].router.weight
    assert weight.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_fp32_routers_leave_an_fp32_model_as_it_was() -> None:
    model = build().eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        route_in_float32(model)
        assert torch.equal(before, model(input_ids=IDS).logits)
