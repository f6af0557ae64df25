from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from training_ready.moe.balance import (
    GlobalBatchBalance,
    balance_bias_step,
    balance_loss,
    expert_counts,
    z_loss,
)
from training_ready.moe.families import MoEError

E = 4


def sure_of(expert: torch.Tensor) -> torch.Tensor:
    """Logits (T, E) that leave no doubt about one expert per token."""
    return 30.0 * torch.nn.functional.one_hot(expert, E).float()


def random_logits(layers=2, tokens=24, experts=E, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, experts, generator=generator).requires_grad_() for _ in range(layers)]


def loss_of(logits, top_k, mask=None):
    return balance_loss(logits, expert_counts(logits, top_k, mask), mask)


def test_layers_collapsed_on_different_experts_read_as_collapsed():
    layers = [sure_of(torch.full((32,), layer)) for layer in range(4)]
    assert loss_of(layers, top_k=1).tolist() == pytest.approx([4.0] * 4)
    pooled = load_balancing_loss_func(tuple(layers), num_experts=E, top_k=1)
    assert float(pooled) == pytest.approx(1.0), (
        "transformers' own loss no longer hides it: simplify docs/moe.md"
    )


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balanced_scores_one_whatever_top_k(top_k):
    tokens = torch.arange(16)
    logits = sum(sure_of((tokens + shift) % E) for shift in range(top_k))
    assert float(loss_of([logits], top_k)[0]) == pytest.approx(1.0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_layer_is_transformers_loss_over_top_k_gradients_included(top_k):
    (ours,) = random_logits(layers=1)
    theirs = ours.detach().clone().requires_grad_()
    loss = loss_of([ours], top_k)[0]
    reference = load_balancing_loss_func((theirs,), num_experts=E, top_k=top_k) / top_k
    assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
    loss.backward()
    reference.backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-8)


def specialised_micro_batches():
    """Four micro-batches of one domain each, every domain with an expert of its own."""
    return [[sure_of(torch.full((8,), domain)).requires_grad_()] for domain in range(4)]


def test_a_specialised_router_scores_one_over_the_global_batch_and_four_within_a_micro_batch():
    parts = specialised_micro_batches()
    counts = sum(expert_counts(part, 1) for part in parts)
    assert [balance_loss(part, counts)[0].item() for part in parts] == pytest.approx([1.0] * 4)
    assert [loss_of(part, 1)[0].item() for part in parts] == pytest.approx([4.0] * 4)


def test_the_window_fills_in_the_first_step_and_is_right_from_the_second_on():
    balance = GlobalBatchBalance(top_k=1, micro_batches=4)
    first, second = ([balance.loss(part)[0].item() for part in specialised_micro_batches()] for _ in range(2))
    assert first == pytest.approx([4.0, 2.0, 4 / 3, 1.0])
    assert second == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("split", [[24], [12, 12], [3, 10, 11], [0, 20, 4]])
def test_exact_counts_make_gradients_invariant_to_the_split(split):
    logits = random_logits(layers=3)
    mask = torch.rand(24, generator=torch.Generator().manual_seed(1)) > 0.3
    whole = torch.autograd.grad(loss_of(logits, 2, mask).mean() + z_loss(logits, mask).mean(), logits)
    counts, tokens = expert_counts(logits, 2, mask), mask.sum() / len(split)
    balance = GlobalBatchBalance(top_k=2, micro_batches=len(split))
    total = 0
    parts = zip(zip(*(layer.split(split) for layer in logits), strict=True), mask.split(split), strict=True)
    for part, part_mask in parts:
        loss = balance.loss(part, part_mask, counts=counts, mean_tokens=tokens).mean()
        total = total + (loss + z_loss(part, part_mask, tokens=tokens).mean()) / len(split)
    for got, expected in zip(torch.autograd.grad(total, logits), whole, strict=True):
        assert torch.allclose(got, expected, atol=1e-8)


def test_padding_changes_nothing():
    logits = random_logits(tokens=20)
    padded = [torch.cat([layer, torch.randn(12, E) * 50]) for layer in logits]
    mask = torch.cat([torch.ones(20), torch.zeros(12)]).reshape(4, 8)
    assert torch.equal(expert_counts(padded, 2, mask), expert_counts(logits, 2))
    assert torch.allclose(loss_of(padded, 2, mask), loss_of(logits, 2))
    assert torch.allclose(z_loss(padded, mask), z_loss(logits))


def test_a_micro_batch_of_padding_only_is_zero_and_keeps_its_graph():
    logits = random_logits()
    loss = GlobalBatchBalance(top_k=2).loss(logits, torch.zeros(24))
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert torch.equal(logits[0].grad, torch.zeros(24, E))


def test_losses_are_fp32_from_bf16_logits():
    logits = [layer.detach().bfloat16().requires_grad_() for layer in random_logits(tokens=512)]
    exact = [layer.detach().float() for layer in logits]
    assert loss_of(logits, 2).dtype == z_loss(logits).dtype == torch.float32
    assert torch.equal(loss_of(logits, 2), loss_of(exact, 2))
    assert torch.equal(z_loss(logits), z_loss(exact))


def test_z_loss_is_the_mean_squared_logsumexp():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, -100.0, -100.0, -100.0]])
    expected = (torch.log(torch.tensor(4.0)) ** 2 + 9.0) / 2
    assert float(z_loss([logits])[0]) == pytest.approx(float(expected))


def test_evaluation_does_not_enter_the_window():
    balance = GlobalBatchBalance(top_k=1, micro_batches=4)
    parts = specialised_micro_batches()
    balance.loss(parts[0])
    with torch.no_grad():
        assert float(balance.loss(parts[1])[0]) == pytest.approx(4.0)
    assert balance.loss(parts[1])[0].item() == pytest.approx(2.0)


def test_a_resumed_window_continues(tmp_path):
    parts = specialised_micro_batches()
    one = GlobalBatchBalance(top_k=1, micro_batches=4)
    for part in parts[:3]:
        one.loss(part)
    torch.save(one.state_dict(), tmp_path / "balance.pt")
    two = GlobalBatchBalance(top_k=1, micro_batches=4)
    two.load_state_dict(torch.load(tmp_path / "balance.pt", weights_only=True))
    assert torch.equal(two.loss(parts[3]), one.loss(parts[3]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_reentrant_checkpointing_is_refused(reentrant, tiny_model, token_ids):
    model = tiny_model("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    outputs = model(input_ids=token_ids, use_cache=False)
    balance = GlobalBatchBalance(top_k=2)
    if reentrant:
        with pytest.raises(MoEError, match="use_reentrant: false"):
            balance.loss(outputs.router_logits)
    else:
        assert balance.loss(outputs.router_logits).requires_grad


def test_wrong_shapes_are_refused():
    logits = random_logits()
    with pytest.raises(MoEError, match="7 tokens, the router logits have 24"):
        z_loss(logits, torch.ones(7))
    with pytest.raises(MoEError, match="counts of 1 layers, router logits of 2"):
        balance_loss(logits, torch.ones(1, E))
    with pytest.raises(MoEError, match="output_router_logits"):
        z_loss([])


def test_training_on_the_loss_revives_a_collapsed_router():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(512, 16, generator=generator)
    weight = (0.1 * torch.randn(E, 16, generator=generator)).requires_grad_()
    favour = torch.tensor([2.0, 0.0, 0.0, 0.0], requires_grad=True)
    optimiser = torch.optim.SGD([weight, favour], lr=1.0)
    before = expert_counts([hidden @ weight.T + favour], 1)[0]
    for _ in range(60):
        optimiser.zero_grad()
        loss_of([hidden @ weight.T + favour], 1).sum().backward()
        optimiser.step()
    after = expert_counts([hidden @ weight.T + favour], 1)[0]
    assert before.max() > 450
    assert after.max() < 220


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_the_bias_moves_against_the_load(shape):
    bias = torch.zeros(shape)
    balance_bias_step(bias, torch.tensor([10, 0, 5, 5]), rate=0.5)
    assert bias.flatten().tolist() == [-0.5, 0.5, 0.0, 0.0]


def test_bias_steps_balance_a_real_sigmoid_router(tiny_model, token_ids):
    from training_ready.moe.families import moe_family, routed_layers
    from training_ready.moe.monitor import ExpertLoadMonitor

    model = tiny_model("deepseek_v3", n_group=1, topk_group=1).eval()
    family = moe_family(model.config)
    entropies = []
    with ExpertLoadMonitor(model) as monitor, torch.no_grad():
        routed_layers(model)[0].bias(family)[0] = 5.0
        for _ in range(60):
            monitor.reset()
            model(input_ids=token_ids)
            entropies.append(monitor.snapshot("eval").layers[0].entropy)
            for routed, counts in zip(routed_layers(model), monitor.counts("eval"), strict=True):
                balance_bias_step(routed.bias(family), counts, rate=0.1)
    assert entropies[-1] > entropies[0] + 0.05
