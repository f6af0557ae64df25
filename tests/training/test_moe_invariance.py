"""The same sixteen conversations in one optimizer step: every way to split them gives the same gradient.

One step of plain gradient descent moves each weight by learning rate x gradient, so the checkpoints are compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from training_ready.storage.embedded import EmbeddedStore

from .moe_corpus import build_sixteen

HERE = Path(__file__).parent
LEARNING_RATE = 1.0
BASE = f"""
data: {{corpus: final_dataset/sixteen/manifest.json}}
attn_implementation: sdpa
dtype: float32
bf16: false
use_cpu: true
max_length: 288
max_steps: 1
optim: sgd
learning_rate: {LEARNING_RATE}
lr_scheduler_type: constant
max_grad_norm: 0.0
weight_decay: 0.0
logging_steps: 1
save_steps: 1
seed: 3
moe: {{balance_coefficient: 1.0, z_loss: 0.1, balance_counts: exact}}
"""
MODEL = """
model:
  config: {model_type: qwen3_moe, hidden_size: 32, intermediate_size: 64, moe_intermediate_size: 24,
           num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, num_experts: 4,
           num_experts_per_tok: 2, norm_topk_prob: true, max_position_embeddings: 512}
  tokenizer: {vocab_size: 260}
activation_checkpointing: false
per_device_train_batch_size: 8
packing: true
"""

Runs = Callable[..., None]


@pytest.fixture(scope="module")
def environment(store_server: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build_sixteen(store_server, tmp_path_factory.mktemp("sixteen"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("invariance")


@pytest.fixture(scope="module")
def runs(environment: Mapping[str, str], folder: Path) -> Runs:
    """Trains {name: overrides} in one process per rank, each into ``folder / name``."""

    def train(jobs: Mapping[str, list[str]], *, recipe: Path, ranks: int = 1) -> None:
        listed = [[str(recipe), [f"output_dir={folder / name}", *more]] for name, more in jobs.items()]
        file = folder / f"{next(iter(jobs))}.json"
        file.write_text(json.dumps(listed), encoding="utf-8")
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        )
        done = subprocess.run(
            [sys.executable, *launcher, str(HERE / "moe_runs.py"), str(file)],
            env={**os.environ, **environment, "ACCELERATE_USE_CPU": "1"},
            capture_output=True,
            text=True,
            timeout=550,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        for name in jobs:
            refused = folder / name / "refused.txt"
            assert not refused.exists(), refused.read_text(encoding="utf-8")

    return train


@pytest.fixture(scope="module")
def started(runs: Runs, folder: Path) -> Path:
    """The random model that every run starts from, and the recipe that trains it for one step."""
    scratch = folder / "scratch.yaml"
    scratch.write_text(BASE + MODEL, encoding="utf-8")
    runs({"start": ["learning_rate=1.0e-30"]}, recipe=scratch)
    summary = json.loads((folder / "start" / "summary.json").read_text(encoding="utf-8"))
    assert summary["tokens"]["packs"] == 8
    assert summary["tokens"]["trained_rows"] == 16
    recipe = folder / "one_step.yaml"
    recipe.write_text(f"{BASE}\nmodel_name_or_path: {folder / 'start' / 'checkpoint-1'}\n", encoding="utf-8")
    return recipe


def split(*, ranks: int, accumulate: int, packed: bool, checkpointing: bool = False) -> list[str]:
    """Overrides that spread the sixteen conversations over micro-batches and ranks."""
    return [
        f"packing={str(packed).lower()}",
        f"per_device_train_batch_size={(8 if packed else 16) // (ranks * accumulate)}",
        f"gradient_accumulation_steps={accumulate}",
        f"activation_checkpointing={str(checkpointing).lower()}",
    ]


def weights(run: Path) -> dict[str, Tensor]:
    return dict(load_file(run / "checkpoint-1" / "model.safetensors"))


def gradients(folder: Path, name: str) -> dict[str, Tensor]:
    start, end = weights(folder / "start"), weights(folder / name)
    return {key: (start[key] - end[key]) / LEARNING_RATE for key in start}


def worst_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Of routers and experts: |difference| over the largest entry of the gradient."""
    assert expected.keys() == found.keys()
    judged = [key for key in expected if ".mlp." in key]
    assert sum("gate.weight" in key for key in judged) == 2
    assert all(expected[key].abs().max() > 0 for key in judged)
    return max(float((expected[key] - found[key]).abs().max() / expected[key].abs().max()) for key in judged)


def test_accumulated_and_padded_steps_equal_one_packed_batch(runs: Runs, started: Path, folder: Path) -> None:
    runs(
        {
            "core-whole": split(ranks=1, accumulate=1, packed=True),
            "core-split": split(ranks=1, accumulate=4, packed=False, checkpointing=True),
            "core-window": [*split(ranks=1, accumulate=4, packed=True), "moe.balance_counts=window"],
            "core-off": [
                *split(ranks=1, accumulate=1, packed=True),
                "moe.balance_coefficient=0",
                "moe.z_loss=0",
            ],
        },
        recipe=started,
    )
    whole = gradients(folder, "core-whole")
    assert worst_difference(whole, gradients(folder, "core-split")) < 1e-5
    # The losses are in the gradient, and a window that has seen one step only in part is not exact.
    assert worst_difference(whole, gradients(folder, "core-off")) > 1e-2
    assert worst_difference(whole, gradients(folder, "core-window")) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_split_has_the_same_gradients(runs: Runs, started: Path, folder: Path, ranks: int) -> None:
    runs({f"whole-{ranks}": split(ranks=1, accumulate=1, packed=True)}, recipe=started)
    jobs = {
        f"ranks{ranks}-accumulate{accumulate}-packed{packed}-checkpointing{checkpointing}": split(
            ranks=ranks, accumulate=accumulate, packed=packed, checkpointing=checkpointing
        )
        for accumulate, packed, checkpointing in product((1, 4), (True, False), (True, False))
    }
    runs(jobs, recipe=started, ranks=ranks)
    whole = gradients(folder, f"whole-{ranks}")
    differences = {name: worst_difference(whole, gradients(folder, name)) for name in jobs}
    print(json.dumps(differences, indent=1))
    assert all(difference < 1e-5 for difference in differences.values()), differences


@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 2])
def test_sharded_weights_have_the_same_gradients(
    runs: Runs, started: Path, folder: Path, experts: int
) -> None:
    """FSDP2 of transformers over two ranks, with the experts gathered or each on its own rank."""
    runs({f"whole-ep{experts}": split(ranks=1, accumulate=1, packed=True)}, recipe=started)
    sharded = f"model_init_kwargs={{distributed_config: {{fsdp_size: 2, ep_size: {experts}}}}}"
    jobs = {
        f"ep{experts}-accumulate{accumulate}-checkpointing{checkpointing}": [
            *split(ranks=2, accumulate=accumulate, packed=True, checkpointing=checkpointing),
            sharded,
            "save_only_model=true",
        ]
        for accumulate, checkpointing in product((1, 4), (False, True))
    }
    runs(jobs, recipe=started, ranks=2)
    whole = gradients(folder, f"whole-ep{experts}")
    differences = {name: worst_difference(whole, gradients(folder, name)) for name in jobs}
    print(json.dumps(differences, indent=1))
    assert all(difference < 1e-5 for difference in differences.values()), differences


@pytest.mark.slow
def test_mixed_precision_over_spread_experts_is_the_same_gradient_rounded(
    runs: Runs, started: Path, folder: Path
) -> None:
    """The keys of recipes/qwen3_30b_a3b_full.yaml together: fp32 weights, computed in bf16, routers in fp32."""
    runs({"whole-mixed": split(ranks=1, accumulate=1, packed=True)}, recipe=started)
    mixed = "model_init_kwargs={distributed_config: {fsdp_size: 2, ep_size: 2, fsdp_mixed_precision: true}}"
    spread = [*split(ranks=2, accumulate=1, packed=True, checkpointing=True), mixed, "save_only_model=true"]
    runs({"mixed": [*spread, "moe.fp32_router=true"]}, recipe=started, ranks=2)
    difference = worst_difference(gradients(folder, "whole-mixed"), gradients(folder, "mixed"))
    print(difference)
    assert 1e-5 < difference < 0.1


ADAPTERS = [
    "moe.adapters={rank: 8, alpha: 16}",
    "moe.balance_coefficient=null",
    "moe.z_loss=0.0",
    "max_steps=2",
    "save_steps=2",
]


@pytest.mark.slow
def test_adapters_of_experts_learn_the_same_when_the_experts_are_spread(
    runs: Runs, started: Path, folder: Path
) -> None:
    """Two steps, because B starts at zero and A has no gradient in the first."""
    runs({"adapters-whole": [*split(ranks=1, accumulate=1, packed=True), *ADAPTERS]}, recipe=started)
    jobs = {
        f"adapters-ep{experts}": [
            *split(ranks=2, accumulate=1, packed=True, checkpointing=True),
            *ADAPTERS,
            f"model_init_kwargs={{distributed_config: {{fsdp_size: 2, ep_size: {experts}}}}}",
            "save_only_model=true",
        ]
        for experts in (1, 2)
    }
    runs(jobs, recipe=started, ranks=2)
    whole = load_file(folder / "adapters-whole" / "checkpoint-2" / "adapter_model.safetensors")
    assert len(whole) == 8
    for name in jobs:
        found = load_file(folder / name / "checkpoint-2" / "adapter_model.safetensors")
        assert whole.keys() == found.keys()
        for key, expected in whole.items():
            assert (expected - found[key]).abs().max() < 1e-5 * expected.abs().max(), (name, key)


def test_the_gradient_of_a_weight_is_read_back_from_its_step() -> None:
    """float32 resolves lr x gradient finely enough beside the weight itself."""
    weight, gradient = torch.tensor(0.02), torch.tensor(1.234567e-3)
    assert abs((weight - (weight - LEARNING_RATE * gradient)) / LEARNING_RATE - gradient) / gradient < 1e-6
