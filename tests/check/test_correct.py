"""Recipes that are right must not be refused, however unusual they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from training_ready.check.run import Report

from .right_recipes import FULL, LORA, MOE, SCRATCH, Keys

Check = Callable[..., Report]
CALLS = "final_dataset/calls/manifest.json"
NO_EVAL: Keys = {"eval_strategy": None, "eval_steps": None}

CORRECT: dict[str, tuple[Keys, Keys]] = {
    "scratch on a processor": (SCRATCH, {}),
    "scratch by epochs": (SCRATCH, {"max_steps": None, "num_train_epochs": "2.5", "warmup_steps": "0.1"}),
    "scratch without packing": (SCRATCH, {"packing": "false", "per_device_train_batch_size": "4"}),
    "scratch without evaluation": (SCRATCH, {"data": f"{{corpus: {CALLS}}}", **NO_EVAL}),
    "scratch for TGI": (SCRATCH, {"release": "{target: tgi}"}),
    "scratch as GGUF": (SCRATCH, {"release": "{target: gguf}"}),
    "the client as the target": (
        SCRATCH,
        {"data": "{corpus: final_dataset/clients/manifest.json, target_role: user}", **NO_EVAL},
    ),
    "system turns": (SCRATCH, {"data": "{corpus: final_dataset/system/manifest.json}", **NO_EVAL}),
    "long rows split between turns": (
        SCRATCH,
        {
            "data": "{corpus: final_dataset/long/manifest.json, eval_split: val}",
            "stream": "{overlong: split_turns}",
        },
    ),
    "a loss of rows on purpose": (
        SCRATCH,
        {
            "data": "{corpus: final_dataset/long/manifest.json, eval_split: val}",
            "stream": "{overlong: drop, max_truncated: 0.8}",
        },
    ),
    "a mixture of corpora": (
        SCRATCH,
        {
            "stream": "{mixture: {calls: {weight: 0.7}, "
            "long: {corpus: final_dataset/system/manifest.json, weight: 0.3}}}"
        },
    ),
    "LoRA on one GPU": (LORA, {}),
    "LoRA on four": (
        LORA,
        {"launch": "{accelerate_config: ddp, num_processes: 4}", "gradient_accumulation_steps": "1"},
    ),
    "LoRA in four bits": (LORA, {"load_in_4bit": "true"}),
    "LoRA by all-linear on a dense model": (LORA, {"lora_target_modules": "all-linear"}),
    "LoRA with sdpa and float16": (
        LORA,
        {"attn_implementation": "sdpa", "bf16": "false", "fp16": "true", "launch": None, "dtype": "float16"},
    ),
    "LoRA with a template of its own": (LORA, {"chat_template_path": "TEMPLATES/no_system.jinja"}),
    "the adapter alone is served": (LORA, {"release": "{target: adapter}"}),
    "attention of a mixture under ZeRO-3": (MOE, {}),
    "experts of a mixture under ZeRO-2": (
        MOE,
        {
            "moe": "{adapters: {rank: 8, alpha: 16}}",
            "lora_alpha": "16",
            "launch": "{accelerate_config: zero2, num_processes: 4}",
        },
    ),
    "experts over a shared base beside LoRA on the attention": (
        LORA,
        {
            "moe": "{shared_base: {experts: 4, rank: 8, alpha: 16}}",
            "lora_target_modules": "[q_proj, k_proj, v_proj, o_proj]",
        },
    ),
    "the router on purpose": (
        MOE,
        {
            "lora_modules_to_save": "[gate]",
            "router_aux_loss_coef": "0.01",
            "launch": "{accelerate_config: ddp, num_processes: 2}",
        },
    ),
    "a mixture in full under ZeRO-3": (FULL, {}),
    "a mixture in full under FSDP2": (FULL, {"launch": "{accelerate_config: fsdp2, num_processes: 4}"}),
    "experts spread over ranks": (
        FULL,
        {
            "model_init_kwargs": "{distributed_config: {fsdp_size: 4, ep_size: 2}}",
            "save_only_model": "true",
            "launch": "{accelerate_config: ddp, num_processes: 4}",
        },
    ),
    "another family under ZeRO-3": (
        FULL,
        {"model_name_or_path": "MODELS/qwen_moe", "launch": "{accelerate_config: TOPOLOGIES/qwen.yaml}"},
    ),
    "a recurrent model without packing": (
        FULL,
        {"model_name_or_path": "MODELS/recurrent", "packing": "false", "launch": "{accelerate_config: ddp}"},
    ),
}


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_recipe_is_not_refused(check: Check, name: str) -> None:
    base, change = CORRECT[name]
    report = check({**base, **change})
    assert report.failures == []


def test_there_are_enough() -> None:
    assert len(CORRECT) >= 20
