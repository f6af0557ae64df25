from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training_ready.moe.families import MoEError, moe_family
from training_ready.moe.monitor import ExpertLoadMonitor, layer_load


def counted_from_logits(outputs, mask, top_k=2, experts=4):
    rows = []
    for logits in outputs.router_logits:
        chosen = logits.softmax(dim=-1, dtype=torch.float).topk(top_k).indices
        rows.append(torch.bincount(chosen[mask.flatten().bool()].flatten(), minlength=experts))
    return torch.stack(rows)


def test_counts_equal_those_of_the_models_own_router_logits(model_type, tiny_model, token_ids):
    model = tiny_model(model_type).eval()
    mask = torch.ones_like(token_ids)
    mask[1, 6:] = 0
    mask[2, 3:] = 0
    chosen = []
    with ExpertLoadMonitor(model) as monitor, torch.no_grad():
        for routed in monitor._layers:
            routed.router.register_forward_hook(lambda _m, _i, output: chosen.append(output[2]))
        with monitor.tokens(mask):
            outputs = model(input_ids=token_ids, attention_mask=mask)
    if moe_family(model.config).layout.chosen_by_logits:
        expected = counted_from_logits(outputs, mask)
    else:
        real = mask.flatten().bool()
        expected = torch.stack([torch.bincount(index[real].flatten(), minlength=4) for index in chosen])
    counts = monitor.counts("eval")
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected)
    assert counts.sum(dim=1).tolist() == [2 * int(mask.sum())] * len(monitor.layers)
    assert monitor.mask is None
    assert monitor.counts("train").sum() == 0


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_forwards_are_not_counted_again(model_type, reentrant, tiny_model, token_ids):
    def run(checkpointing):
        model = tiny_model(model_type).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        forwards = []
        monitor = ExpertLoadMonitor(model)
        monitor._layers[0].router.register_forward_hook(lambda *_: forwards.append(1))
        for part in token_ids.split(1):  # gradient accumulation
            with monitor.tokens(torch.ones_like(part)):
                model(input_ids=part, labels=part, use_cache=False).loss.backward()
        return monitor.counts(), len(forwards)

    plain, forwards = run(False)
    recomputed, with_recompute = run(True)
    assert forwards == 3
    assert with_recompute == 6, "nothing was recomputed: the test proves nothing"
    assert torch.equal(plain, recomputed)
    assert plain.sum(dim=1).tolist() == [60, 60]


def test_accumulates_over_forwards_and_keeps_train_and_eval_apart(tiny_model, token_ids):
    model = tiny_model("qwen2_moe")
    with ExpertLoadMonitor(model) as monitor:
        assert monitor.layers == [0, 2]
        model.train()
        model(input_ids=token_ids)
        once = monitor.counts()
        model(input_ids=token_ids)
        model.eval()
        model(input_ids=token_ids[:1])
        assert torch.equal(monitor.counts(), 2 * once)
        assert monitor.snapshot("eval").tokens == 10
        monitor.reset("train")
        assert monitor.counts().sum() == 0
        assert monitor.counts("eval").sum() == 2 * 2 * 10
        monitor.reset()
        assert monitor.counts("eval").sum() == 0
    model(input_ids=token_ids)
    assert monitor.counts("eval").sum() == 0, "a closed monitor still counts"


def test_a_mask_of_another_batch_is_refused(tiny_model, token_ids):
    model = tiny_model("mixtral")
    refused = pytest.raises(MoEError, match=r"layers\.0.*\(2, 10\) has 20 tokens, the router saw 30")
    with ExpertLoadMonitor(model) as monitor, monitor.tokens(torch.ones(2, 10)), refused:
        model(input_ids=token_ids)


def test_a_dense_model_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    with pytest.raises(MoEError, match="no experts"):
        ExpertLoadMonitor(AutoModelForCausalLM.from_config(config))


def test_snapshot_of_a_collapsed_layer(tiny_model, token_ids):
    model = tiny_model("gpt_oss").eval()
    with ExpertLoadMonitor(model) as monitor, torch.no_grad():
        monitor._layers[1].router.weight.zero_()
        monitor._layers[1].router.bias.copy_(torch.tensor([0.0, 9.0, 5.0, 0.0]))
        model(input_ids=token_ids)
        snapshot = monitor.snapshot("eval")
    free, collapsed = snapshot.layers
    assert collapsed.load == [0.0, 0.5, 0.5, 0.0]
    assert collapsed.dead == [0, 3]
    assert collapsed.entropy == pytest.approx(math.log(2))
    assert (collapsed.max_share, collapsed.min_share) == (0.5, 0.0)
    assert sum(free.load) == pytest.approx(1.0)
    assert free.entropy > collapsed.entropy
    assert collapsed.tie_share is None
    metrics = snapshot.metrics()
    assert metrics["moe/entropy_worst"] == pytest.approx(0.5)
    assert metrics["moe/dead_experts"] == 2.0
    assert json.loads(json.dumps(snapshot.as_dict()))["layers"][1]["dead"] == [0, 3]
    assert snapshot.load().shape == (2, 4)


def test_ties_are_counted_where_logits_decide(tiny_model, token_ids):
    model = tiny_model("mixtral").eval()
    with ExpertLoadMonitor(model, ties=True) as monitor, torch.no_grad():
        monitor._layers[0].router.weight.zero_()
        model(input_ids=token_ids)
        shares = [layer.tie_share for layer in monitor.snapshot("eval").layers]
    assert shares == [1.0, 0.0]
    with ExpertLoadMonitor(tiny_model("deepseek_v3"), ties=True) as monitor:
        assert monitor.snapshot().layers[0].tie_share is None


def test_nothing_counted_is_zero_not_an_error():
    empty = layer_load(0, [0, 0, 0])
    assert (empty.load, empty.entropy, empty.dead) == ([0.0, 0.0, 0.0], 0.0, [0, 1, 2])


TWO_RANKS = Path(__file__).with_name("two_ranks.py")


def test_two_ranks_reduce_to_the_sum_and_to_the_loss_of_one_rank(tmp_path):
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TWO_RANKS), str(rank), str(tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(logs)
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    own = torch.tensor([report["own"] for report in reports])
    assert not torch.equal(own[0], own[1])
    for report in reports:
        assert report["reduced"] == own.sum(dim=0).tolist()
        assert report["reduced_again"] == report["reduced"]
        assert report["tokens"] == 16
        assert report["gradient_difference"] < 1e-7
        assert report["loss"] == pytest.approx(report["loss_of_one_rank"], rel=1e-6)
