"""One of two gloo ranks: counts its half of a batch and takes the balance loss over both.

Run by test_monitor.py as ``two_ranks.py RANK FOLDER``; writes FOLDER/rankN.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, MixtralConfig

from training_ready.moe.balance import GlobalBatchBalance, balance_loss, expert_counts
from training_ready.moe.families import routed_layers
from training_ready.moe.monitor import ExpertLoadMonitor


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 64, (2, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0  # the second rank has fewer real tokens
    weight = routed_layers(model)[0].router.weight

    whole = model(input_ids=ids, attention_mask=mask).router_logits
    expected = balance_loss(whole, expert_counts(whole, 2, mask), mask).mean()
    expected.backward()
    one_rank, weight.grad = weight.grad.clone(), None

    with ExpertLoadMonitor(model) as monitor, monitor.tokens(mask[rank]):
        part = model(input_ids=ids[rank : rank + 1], attention_mask=mask[rank : rank + 1]).router_logits
    balance = GlobalBatchBalance(top_k=2)
    loss = balance.loss(part, mask[rank], mean_tokens=mask.sum() / 2).mean()
    loss.backward()
    mean = torch.cat([weight.grad.flatten(), loss.detach()[None]])
    dist.all_reduce(mean)
    mean /= 2
    report = {
        "own": monitor.counts().tolist(),
        "reduced": monitor.reduce().tolist(),
        "reduced_again": monitor.reduce().tolist(),
        "tokens": monitor.snapshot().tokens,
        "gradient_difference": float((mean[:-1] - one_rank.flatten()).abs().max()),
        "loss": float(mean[-1]),
        "loss_of_one_rank": expected.item(),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    dist.barrier()  # a rank that leaves early can take the other one's store with it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # at Python's own exit a thread of gloo that is still running aborts the process now and then
