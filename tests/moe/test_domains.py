"""Mutual information against its definition, and counts against a hand-made routing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from training_ready.moe.domains import DomainLoadMonitor, mutual_information
from training_ready.moe.families import MoEError, routed_layers
from training_ready.moe.monitor import ExpertLoadMonitor


def test_known_values_of_mutual_information() -> None:
    specialised = 5 * torch.eye(4, dtype=torch.int64)
    shared = torch.full((4, 4), 7)
    half = torch.tensor([[2, 2, 0, 0], [0, 0, 2, 2]])
    assert mutual_information(specialised).item() == pytest.approx(math.log(4))
    assert mutual_information(shared).item() == pytest.approx(0, abs=1e-12)
    assert mutual_information(half).item() == pytest.approx(math.log(2))
    assert mutual_information(torch.zeros(4, 4)).item() == 0
    assert mutual_information(torch.stack([specialised, shared])).tolist() == pytest.approx([math.log(4), 0])


def test_it_is_the_definition_for_any_counts() -> None:
    counts = torch.randint(0, 50, (3, 5), generator=torch.Generator().manual_seed(1)).double()
    joint = counts / counts.sum()
    expected = sum(
        float(p * torch.log(p / (joint[d].sum() * joint[:, x].sum())))
        for d, row in enumerate(joint)
        for x, p in enumerate(row)
        if p > 0
    )
    assert mutual_information(counts).item() == pytest.approx(expected)


def test_the_stated_overestimate_of_independent_counts() -> None:
    experts = torch.randint(0, 16, (200, 4000), generator=torch.Generator().manual_seed(2))
    domains = torch.arange(4000) % 4
    found = [
        mutual_information(torch.bincount(domains * 16 + row, minlength=64).view(4, 16)).item()
        for row in experts
    ]
    assert sum(found) / len(found) == pytest.approx(3 * 15 / (2 * 4000), rel=0.05)


def test_tokens_are_counted_by_their_domain_and_checkpointing_does_not_count_twice(
    tiny_model: Callable[..., Any], model_type: str, token_ids: torch.Tensor
) -> None:
    model = tiny_model(model_type)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    domain = torch.arange(3)[:, None].expand_as(token_ids).clone()
    domain[2, 5:] = -1  # padding
    monitor = DomainLoadMonitor(model, ["a", "b", "c"])
    with monitor.tokens(domain):
        model(input_ids=token_ids, use_cache=False).logits.sum().backward()
    model(input_ids=token_ids, use_cache=False)  # of no domain
    counts = monitor.counts()
    assert counts.shape == (len(routed_layers(model)), 3, 4)
    assert counts.sum(dim=2).tolist() == [[20, 20, 10]] * counts.shape[0]
    assert list(monitor.mutual_information()) == [routed.layer for routed in routed_layers(model)]


@pytest.mark.parametrize("first", [0, 1])
def test_what_came_after_a_mark_is_forgotten(
    tiny_model: Callable[..., Any], token_ids: torch.Tensor, first: int
) -> None:
    """Of ``first`` forwards before the mark and one after it, those before stay; then counting goes on."""
    model = tiny_model("mixtral")
    load, domains = ExpertLoadMonitor(model), DomainLoadMonitor(model.train(), ["a", "b"])
    with domains.tokens(torch.arange(3)[:, None].expand_as(token_ids) % 2):
        for _ in range(first):
            model(input_ids=token_ids)
        before = load.counts(), domains.counts()
        assert [int(counts.sum()) > 0 for counts in before] == [bool(first)] * 2
        marks = load.mark(), domains.mark()
        model(input_ids=token_ids)
        for forget in marks:
            forget()
        assert torch.equal(load.counts(), before[0])
        assert torch.equal(domains.counts(), before[1])
        model(input_ids=token_ids)
    for counts, was in zip((load.counts(), domains.counts()), before, strict=True):
        assert int(counts.sum()) == int(was.sum()) + 2 * 2 * token_ids.numel()  # two layers, two choices


def test_domains_of_another_forward_are_an_error(
    tiny_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    model = tiny_model("mixtral")
    monitor = DomainLoadMonitor(model, ["a"])
    with (
        monitor.tokens(torch.zeros(7, dtype=torch.int64)),
        pytest.raises(MoEError, match="7 tokens were named"),
    ):
        model(input_ids=token_ids)
    monitor.close()
    with monitor.tokens(torch.zeros(7, dtype=torch.int64)):
        model(input_ids=token_ids)
    assert not monitor.counts().any()
