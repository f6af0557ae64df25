"""The same step for real: TRL's ``SFTTrainer`` on CPU with real tensors, two steps, under the tracker of the trace."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from training_ready.check.memory_step import StepSpec
from training_ready.check.memory_trace import MomentTracker

SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}


def dense(**changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model("qwen3", intermediate_size=512, head_dim=32, **{**SHAPE, **changes})


def mixture(**changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(
        "qwen3_moe",
        head_dim=32,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        **{**SHAPE, **changes},
    )


def mixtral(**changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(
        "mixtral", intermediate_size=256, num_local_experts=4, num_experts_per_tok=2, **{**SHAPE, **changes}
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<unk>": 1, "<eos>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
    )


def packs(spec: StepSpec, count: int) -> Dataset:
    """Packs of two conversations; where nothing is packed, one conversation a row, the second of a batch shorter."""
    half = -(-spec.length // 2)
    rows = []
    for index in range(count):
        length = spec.length if spec.packed or index % 2 == 0 else spec.length - 8
        ids = torch.randint(3, spec.config.vocab_size, (length,)).tolist()
        row = {"input_ids": ids, "labels": ids}
        rows.append({**row, "seq_lengths": [half, length - half]} if spec.packed else row)
    return Dataset.from_list(rows)


def real_peak(spec: StepSpec, folder: Path) -> int:
    """Bytes at the highest point of two optimizer steps of a real training run on CPU."""
    set_seed(1)
    steps = 2 if spec.accumulates else 1
    model = AutoModelForCausalLM.from_config(
        spec.config, dtype=spec.dtype, attn_implementation=spec.attention
    )
    kwargs: dict[str, Any] = {"use_reentrant": spec.reentrant}
    if spec.checkpointing == "selective":
        kwargs = {"selective": True}
    args = SFTConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=spec.rows,
        gradient_accumulation_steps=steps,
        max_length=spec.length,
        packing=spec.packed,
        bf16=spec.autocast,
        use_cpu=True,
        gradient_checkpointing=spec.checkpointing != "off",
        gradient_checkpointing_kwargs=kwargs if spec.checkpointing != "off" else None,
        optim=spec.optimizer,
        router_aux_loss_coef=spec.router_loss if hasattr(spec.config, "output_router_logits") else None,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=100,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=packs(spec, 2 * steps * spec.rows),
        processing_class=tokenizer(),
        peft_config=spec.lora,
    )
    tracker = MomentTracker()
    tracker.track_external(trainer.model)
    gc.collect()
    with tracker:
        trainer.train()
    return tracker.moments()["forward"].total


def on_cpu(spec: StepSpec) -> StepSpec:
    return replace(spec, device="cpu")
