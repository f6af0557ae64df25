"""The record's domain goes with its tokens as far as the routers, packed and padded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from training_ready.training.expert_domains import DomainCollator, ExpertDomains
from training_ready.training.trainer import StreamSFTTrainer

NAMES = ["anxiety", "grief"]


def example(*rows: tuple[int, str]) -> dict[str, Any]:
    length = sum(size for size, _ in rows)
    return {
        "input_ids": np.arange(1, length + 1),
        "labels": np.arange(1, length + 1),
        "seq_lengths": [size for size, _ in rows],
        "domains": [domain for _, domain in rows],
    }


@pytest.mark.parametrize("packed", [True, False])
def test_every_token_has_the_domain_of_its_conversation(packed: bool) -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    batch = DomainCollator(collate, NAMES)([example((2, "grief"), (1, "")), example((1, "anxiety"))])
    assert batch["domains"].shape == batch["input_ids"].shape
    expected = [[1, 1, -1, 0]] if packed else [[1, 1, -1], [0, -1, -1]]
    assert batch["domains"].tolist() == expected
    assert batch["domains"].dtype == torch.int64


def test_counts_of_other_domains_are_not_taken_for_these(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shape = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    config = MixtralConfig(**shape, num_attention_heads=1, num_key_value_heads=1, num_local_experts=4)
    model = MixtralForCausalLM(config)
    counted = torch.arange(16).view(2, 2, 4)
    ExpertDomains(model, NAMES).save(counted, tmp_path)
    same, other = ExpertDomains(model, NAMES), ExpertDomains(model, ["anxiety", "sleep"])
    for domains in (same, other):
        domains.restore(tmp_path, here=True)
    assert same.counted().equal(counted)
    assert not other.counted().any()
    assert "does not count ['anxiety', 'sleep']" in caplog.text


RECIPE = """
data: {corpus: final_dataset/quickstart/manifest.json, eval_split: val}
stream: {max_truncated: 1.0}
model:
  config: {model_type: qwen3_moe, hidden_size: 32, moe_intermediate_size: 16, num_hidden_layers: 2,
           num_attention_heads: 4, num_key_value_heads: 2, num_experts: 4, num_experts_per_tok: 2,
           max_position_embeddings: 512}
  tokenizer: {vocab_size: 600}
attn_implementation: sdpa
dtype: float32
bf16: false
use_cpu: true
activation_checkpointing: true
max_length: 256
max_steps: 4
per_device_train_batch_size: 2
per_device_eval_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-2
logging_steps: 2
save_steps: 4
eval_strategy: steps
eval_steps: 4
seed: 7
moe: {balance_counts: exact}
"""


@pytest.mark.parametrize("packing", ["true", "false"])
def test_a_run_says_what_its_domains_choose(
    run_here: Callable[..., StreamSFTTrainer], tmp_path: Path, packing: str
) -> None:
    trainer: Any = run_here(f"output_dir: {tmp_path / 'run'}\npacking: {packing}\n{RECIPE}")
    domains = json.loads((tmp_path / "run/summary.json").read_text())["moe"]["domains"]
    assert domains["measured_in"] == "evaluation"
    assert len(domains["names"]) > 1
    # Each evaluated token is counted once per chosen expert, padding not at all, the packs that fill up a round again.
    plan = trainer._eval_packs.plan
    tokens = dict.fromkeys(domains["names"], 0)
    for line in plan.lines:
        for cell, (_, count, _) in zip(line.index.cells, line.epoch_counts.tolist(), strict=True):
            tokens[cell.domain] = tokens.get(cell.domain, 0) + 2 * count
    whole = plan.packs_per_pass % 2 == 0
    for name, counted in zip(domains["names"], domains["pairs"], strict=True):
        assert counted == tokens[name] if whole else counted >= tokens[name]
    assert all(0 <= value < 1.4 for value in domains["mutual_information"])
    logged = [logs for logs in trainer.state.log_history if "moe/mutual_information_mean" in logs]
    assert [logs["step"] for logs in logged] == [2, 4]
    evaluated = [logs for logs in trainer.state.log_history if "eval_moe/mutual_information_max" in logs]
    assert evaluated[0]["eval_moe/mutual_information_max"] == pytest.approx(
        max(domains["mutual_information"])
    )
