"""Does the probe compare the right figure with the right GPU, and is its advice true?"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding
from training_ready.check.memory import MARGIN, probe_memory, target_of
from training_ready.check.memory_arithmetic import COMPUTED, Weights, quantised
from training_ready.check.memory_ranks import Ranks, on_one_rank
from training_ready.check.memory_trace import PeakMemory, Split
from training_ready.check.run import PROBES, check_recipe
from training_ready.recipe.load import load_recipe

N = 1_000_000_000
FULL = Weights(
    trainable=N,
    frozen=0,
    bytes_each=2,
    shapes=((N,),),
    gradient_bytes=2 * N,
    layers=(100_000_000,) * 9,
    ends=100_000_000,
    linear=N,
    largest_linear=10_000_000,
)
TRACED = PeakMemory(
    moments={
        "forward": Split(parameters=2 * N, activations=7),
        "backward of the first layer": Split(parameters=2 * N, gradients=2 * N, activations=5, loss=1),
    }
)


# --------------------------------------------------------------------------- arithmetic
def test_zero_divides_what_its_stage_says() -> None:
    for stage, (weights, gradients, optimizer) in {
        "zero0": (2, 2, 12),
        "zero1": (2, 2, 12 / 4),
        "zero2": (2, 2 / 4, 12 / 4),
        "zero3": (2 / 4, 2 / 4, 12 / 4),
    }.items():
        ranks = Ranks(sharding=stage, processes=4, bucket=1000, overlap=True, live=250_000_000)
        peak = on_one_rank(TRACED, FULL, ranks)
        split = peak.moments["backward of the first layer"]
        assert (split.parameters, split.gradients, split.optimizer) == (
            weights * N,
            gradients * N,
            optimizer * N,
        )
        assert split.activations == 5
        assert split.loss == 1
        assert split.gathers == 2 * 2 * 1000 + (2 * 250_000_000 if stage == "zero3" else 0)


def test_zero_steps_with_an_fp32_copy_of_its_gradients_unless_the_optimizer_is_elsewhere() -> None:
    ranks = Ranks(sharding="zero3", processes=4, group=10_000_000)
    assert on_one_rank(TRACED, FULL, ranks).moments["optimizer"].gathers == 4 * 10_000_000
    offloaded = replace(ranks, optimizer_offloaded=True)
    assert on_one_rank(TRACED, FULL, offloaded).moments["optimizer"].optimizer == 0


def test_fsdp_holds_a_quarter_in_fp32_and_two_layers_in_bf16() -> None:
    traced = replace(
        TRACED, moments={name: split.plus(optimizer=4 * N) for name, split in TRACED.moments.items()}
    )
    ranks = Ranks(sharding="fsdp2", processes=4)
    forward = on_one_rank(traced, FULL, ranks).moments["forward"]
    assert (forward.parameters, forward.gradients, forward.optimizer) == (N, 0, 2 * N)
    assert forward.gathers == 2 * 100_000_000 + 2 * 2 * 100_000_000
    kept = on_one_rank(traced, FULL, replace(ranks, reshard=False)).moments["forward"]
    assert kept.gathers == 2 * N


def test_ddp_keeps_buckets_as_large_as_the_gradients() -> None:
    peak = on_one_rank(TRACED, FULL, Ranks(sharding="ddp", processes=2))
    assert peak.moments["forward"].gathers == 2 * N
    assert on_one_rank(TRACED, FULL, Ranks(sharding="ddp", processes=1)) == TRACED


def test_four_bits_are_half_a_byte_and_scales() -> None:
    moments = quantised(TRACED, FULL, bits=4, nested=False).moments
    assert moments["forward"].parameters == round(N * (0.5 + 4 / 64))
    assert moments["forward"].activations == 7 + 2 * 10_000_000
    assert quantised(TRACED, FULL, bits=8, nested=False).moments["forward"].parameters == N


def test_adafactor_keeps_rows_and_columns_and_8_bit_adam_two_bytes() -> None:
    assert COMPUTED["adafactor"]([(8, 100, 50)]).state == 4 * (8 * 100 + 8 * 50)
    assert COMPUTED["adamw_8bit"]([(64, 64), (10,)]).state == 2 * 4096 + 8 * 16 + 8 * 10


# --------------------------------------------------------------------------- the probe
@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    config = {
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 8192,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path / 'model'}\n"
        "data: {corpus: final_dataset/x/manifest.json}\n"
        "dtype: bfloat16\nattn_implementation: sdpa\npacking: true\nmax_length: 1024\n"
        "per_device_train_batch_size: 2\nactivation_checkpointing: false\n"
    )
    return path


def _probe(recipe: Path, *overrides: str) -> Finding:
    (found,) = probe_memory(CheckContext(load_recipe(recipe, overrides), offline=True))
    return found


def test_a_step_that_fits_says_how_much_and_of_what(recipe: Path) -> None:
    found = _probe(recipe, "launch.gpu_memory_gib=24")
    assert found.status == "pass"
    assert "22.6 GiB usable of the GPU (24 GiB less 6%)" in found.message
    assert sum(found.measured["split_gib"].values()) == pytest.approx(found.measured["peak_gib"], abs=0.05)
    assert found.measured["traced_layers"] == [2, 3, 4]


def test_each_advised_change_gives_the_peak_that_it_promises(recipe: Path) -> None:
    found = _probe(recipe, "launch.gpu_memory_gib=0.5")
    assert found.status == "fail"
    assert found.key == "launch.gpu_memory_gib"
    promised = re.findall(
        r"([^;:]+): ([\d.]+) GiB \((?:fits|not enough)\)", (found.fix or "")[len("one of: ") :]
    )
    assert len(promised) == 3
    peaks = [float(gib) for _, gib in promised]
    assert peaks == sorted(peaks)
    assert peaks[-1] < found.measured["peak_gib"]
    for keys, gib in promised:
        changed = _probe(recipe, "launch.gpu_memory_gib=0.5", *keys.split())
        assert changed.measured["peak_gib"] == pytest.approx(float(gib), abs=0.06), keys


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "gpu", "change"),
    [
        ("max_length: 8192", 4, "max_length=4096"),
        ("per_device_train_batch_size: 16", 3, "per_device_train_batch_size=8"),
        ("dtype: float32", 0.9, "activation_checkpointing=true"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_at_its_line_with_a_way_out(
    recipe: Path, mistake: str, gpu: float, change: str
) -> None:
    key = mistake.partition(":")[0]
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith(f"{key}:")]
    recipe.write_text("\n".join([*lines, mistake, f"launch: {{gpu_memory_gib: {gpu}}}"]) + "\n")
    report = check_recipe(
        recipe, offline=True, skip=[name for name in PROBES if name not in ("keys", "memory")]
    )
    [(probe, finding)] = report.failures
    assert (probe, finding.key) == ("memory", "launch.gpu_memory_gib")
    assert finding.where == f"{recipe}:{len(lines) + 2}"
    assert change in (finding.fix or "")


def test_without_a_gpu_to_compare_with_the_figure_is_still_given(recipe: Path) -> None:
    found = _probe(recipe)
    assert found.status == "pass"
    assert "compared with nothing: set launch.gpu_memory_gib" in found.message


def test_an_optimizer_of_unknown_state_is_not_guessed(recipe: Path) -> None:
    found = _probe(recipe, "optim=lomo")
    assert found.status == "not run"
    assert "the state of the optimizer lomo is not known" in found.message


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw_8bit"])
def test_a_computed_optimizer_takes_less_than_adam(recipe: Path, optimizer: str) -> None:
    less = _probe(recipe, f"optim={optimizer}").measured["split_gib"]["optimizer"]
    assert less < _probe(recipe).measured["split_gib"]["optimizer"]


def test_the_card_of_a_flavour_is_the_target_and_the_key_overrides_it(recipe: Path) -> None:
    ovh = "launch.ovh={image: r/i:1, flavor: l40s-1-gpu, region: GRA}"
    target = target_of(load_recipe(recipe, [ovh]))
    assert target is not None
    assert target.key == "launch.ovh.flavor"
    assert target.gib == 45.0
    assert target.usable == pytest.approx(45.0 * (1 - MARGIN))
    own = target_of(load_recipe(recipe, [ovh, "launch.gpu_memory_gib=40"]))
    assert own is not None
    assert own.gib == 40


@pytest.mark.slow
def test_a_30b_mixture_is_checked_in_little_memory(recipe: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    }
    (recipe.parent / "model" / "config.json").write_text(json.dumps(config))
    code = (
        "import resource, sys\n"
        "from training_ready.check.context import CheckContext\n"
        "from training_ready.check.memory import probe_memory\n"
        "from training_ready.recipe.load import load_recipe\n"
        "recipe = load_recipe(sys.argv[1], ['max_length=8192', 'launch.gpu_memory_gib=80', 'launch.num_processes=8',"
        " 'launch.accelerate_config=zero3'])\n"
        "found, = probe_memory(CheckContext(recipe, offline=True))\n"
        "print(found.status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=True, timeout=300
    )
    status, kilobytes = ran.stdout.split()[-2:]
    assert status == "fail"
    assert int(kilobytes) < 4_000_000
    assert torch.cuda.is_available() or "CUDA" not in ran.stdout
