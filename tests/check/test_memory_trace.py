"""Is the traced peak the real one? Held against TRL's trainer, run for real on CPU."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from training_ready.check import memory_trace
from training_ready.check.memory_step import StepSpec, TraceError
from training_ready.check.memory_trace import cut_layers, trace_step

from . import real_step as real

QUICK = (
    "dense, full, 64, optimizer not fused",
    "dense, LoRA, 512",
    "MoE, full, 256",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in real.COMBINATIONS],
)
def test_the_traced_peak_is_the_peak_of_a_real_run(name: str, tmp_path: Path) -> None:
    spec: StepSpec = real.COMBINATIONS[name]
    traced = trace_step(spec)
    measured = real.real_moments(spec, tmp_path)
    assert traced.peak.total == pytest.approx(max(s.total for s in measured.values()), rel=0.05)
    if spec.lora is None and not (spec.moe and (spec.moe.adapters or spec.moe.shared_base)):
        for moment, split in traced.moments.items():
            assert split.total == pytest.approx(measured[moment].total, rel=0.05), moment


@pytest.mark.parametrize("config", [pytest.param(real.dense, marks=pytest.mark.slow), real.mixture])
def test_extrapolation_over_layers_equals_the_whole_trace(config, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = StepSpec(config=config(num_hidden_layers=9), length=256, moe=None)
    short = trace_step(spec)
    monkeypatch.setattr(memory_trace, "FEW", (9, 9, 9))
    whole = trace_step(spec)
    assert short.traced_layers == (2, 3, 4)
    assert whole.traced_layers == ()
    for moment, split in short.moments.items():
        assert asdict(split) == pytest.approx(asdict(whole.moments[moment]), rel=1e-3, abs=4096), moment


def test_layers_that_differ_are_all_traced() -> None:
    mixed = real.mixture(num_hidden_layers=8, mlp_only_layers=[0, 5])
    assert trace_step(StepSpec(config=mixed, length=64)).traced_layers == ()


def test_a_cut_model_keeps_the_kinds_of_its_first_layers() -> None:
    config = real.dense(num_hidden_layers=8, layer_types=["sliding_attention", "full_attention"] * 4)
    assert cut_layers(config, 3).layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config.num_hidden_layers == 8


def test_a_gpu_holds_one_tile_of_logits_where_a_cpu_holds_copies() -> None:
    on_cpu = real.step(real.dense(), 512)
    gpu = trace_step(replace(on_cpu, device="gpu")).moments["loss"].loss
    tile = 512 * 32768 * 4  # rows x the vocabulary chunk of TRL, fp32
    assert tile < gpu < 1.5 * tile
    assert trace_step(on_cpu).moments["loss"].loss > gpu


def test_packing_under_sdpa_costs_a_mask_that_flash_attention_does_not_have() -> None:
    spec = StepSpec(config=real.dense(), length=2048, checkpointing="off")
    masked = trace_step(spec).peak.activations
    flash = trace_step(replace(spec, attention="flash_attention_2")).peak.activations
    layers, mask = 3, 2048 * 2048 * 2
    assert masked - flash > layers * mask


def test_what_cannot_be_traced_is_an_error_that_names_it() -> None:
    spec = StepSpec(config=real.dense(num_hidden_layers=2), length=64, attention="flex_attention")
    with pytest.raises(TraceError, match="qwen3 with attention flex_attention cannot be traced"):
        trace_step(spec)
