"""The same step for real: TRL's ``SFTTrainer`` on CPU with real tensors, two steps, under the tracker of the trace.

Run as a script it measures every combination and prints the table of docs/check_memory.md.
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from training_ready.check.memory_step import StepSpec, router_losses
from training_ready.check.memory_trace import MomentTracker, Split, trace_step
from training_ready.moe.shared_base import train_shared_base
from training_ready.recipe.sections import ExpertAdaptersSection, MoeSection, SharedBaseSection
from training_ready.training.expert_adapters import adapt_experts
from training_ready.training.moe_losses import RouterLosses
from training_ready.training.shared_experts import share_base

SHAPE = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}


def dense(**changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model("qwen3", **{"intermediate_size": 512, "head_dim": 32, **SHAPE, **changes})


def mixture(**changes: Any) -> PretrainedConfig:
    experts = {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
    return AutoConfig.for_model(
        "qwen3_moe", **{"intermediate_size": 512, "head_dim": 32, **experts, **SHAPE, **changes}
    )


def mixtral(**changes: Any) -> PretrainedConfig:
    experts = {"intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2}
    return AutoConfig.for_model("mixtral", **{**experts, **SHAPE, **changes})


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


class _Trainer(SFTTrainer):  # type: ignore[misc]
    """TRL's trainer with the routers' losses, added where :class:`MoETrainer` adds them."""

    losses: RouterLosses | None = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.losses is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.begin_step(torch.tensor(inputs["input_ids"].numel()))
        with self.losses.recording() as routing:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss + self.losses.loss(routing, inputs.get("attention_mask"))


def real_moments(spec: StepSpec, folder: Path) -> dict[str, Split]:
    """The highest point of each moment over two optimizer steps of a real training run on CPU."""
    set_seed(1)
    steps = 2 if spec.accumulates else 1
    model = AutoModelForCausalLM.from_config(
        spec.config, dtype=spec.dtype, attn_implementation=spec.attention
    )
    if spec.moe is not None and spec.moe.shared_base is not None:
        model, _ = share_base(model, spec.moe.shared_base, seed=1)
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
        router_aux_loss_coef=0.0 if hasattr(model.config, "output_router_logits") else None,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=100,
    )
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=packs(spec, 2 * steps * spec.rows),
        processing_class=tokenizer(),
        peft_config=spec.lora,
    )
    if spec.moe is not None and spec.moe.adapters is not None:
        adapt_experts(trainer.model, spec.moe.adapters)
    if spec.moe is not None and spec.moe.shared_base is not None:
        train_shared_base(trainer.model)
    trainer.losses = router_losses(trainer.model, spec)
    tracker = MomentTracker(trainer.model, None)
    gc.collect()
    with tracker:
        trainer.train()
    return tracker.moments()


def lora(*targets: str, **changes: Any) -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules=list(targets), **changes)


def step(config: PretrainedConfig, length: int, **changes: Any) -> StepSpec:
    """On CPU, in fp32 unless said otherwise."""
    usual = {"dtype": torch.float32, "autocast": False, "checkpointing": "off", "device": "cpu"}
    return StepSpec(config=config, length=length, **{**usual, **changes})


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
HALF = {"dtype": torch.bfloat16, "autocast": True}
MOE = MoeSection()
SPLIT = MoeSection(adapters=ExpertAdaptersSection(rank=8, alpha=16.0))
SHARED = MoeSection(shared_base=SharedBaseSection(experts=4, top_k=2, rank=8, alpha=16.0))
WIDE = {"hidden_size": 384, "num_hidden_layers": 6}

COMBINATIONS: dict[str, StepSpec] = {
    "dense, full, 256": step(dense(), 256),
    "dense, full, 2 x 512, checkpointing": step(dense(), 512, rows=2, checkpointing="on"),
    "dense, full, 256, checkpointing, accumulation": step(dense(), 256, checkpointing="on", accumulates=True),
    "dense, full, 512, bf16, checkpointing": step(dense(), 512, checkpointing="on", **HALF),
    "dense, full, 512, bf16 autocast over fp32": step(dense(), 512, autocast=True),
    "dense, full, 512, selective checkpointing": step(dense(), 512, checkpointing="selective"),
    "dense, full, 2 x 384, not packed": step(dense(), 384, rows=2, packed=False),
    "dense, full, 64, optimizer not fused": step(dense(), 64, optimizer="adamw_torch"),
    "dense wide, full, 64": step(dense(intermediate_size=1536, **WIDE), 64),
    "dense, LoRA, 512": step(dense(), 512, lora=lora(*ATTENTION)),
    "dense, LoRA, 1024, bf16, checkpointing": step(
        dense(), 1024, lora=lora(*ATTENTION), checkpointing="on", **HALF
    ),
    "dense, LoRA, 512, re-entrant checkpointing": step(
        dense(), 512, lora=lora(*ATTENTION), checkpointing="on", reentrant=True
    ),
    "MoE, full, 256": step(mixture(), 256, moe=MOE),
    "MoE, full, 512, checkpointing": step(mixture(), 512, moe=MOE, checkpointing="on"),
    "MoE, full, 512, bf16, checkpointing, accumulation": step(
        mixture(), 512, moe=MOE, checkpointing="on", accumulates=True, **HALF
    ),
    "MoE wide, full, 128": step(mixture(moe_intermediate_size=512, **WIDE), 128, moe=MOE),
    "Mixtral, full, 512": step(mixtral(), 512, moe=MOE),
    "MoE, LoRA on attention, 2 x 512, bf16": step(
        mixture(), 512, rows=2, lora=lora(*ATTENTION), moe=MOE, **HALF
    ),
    "MoE, PEFT on experts, 512": step(mixture(), 512, lora=lora(*ATTENTION, **EXPERTS), moe=MOE),
    "MoE, split adapters on experts, 512": step(mixture(), 512, moe=SPLIT),
    "MoE, split adapters and LoRA, 512, bf16, checkpointing": step(
        mixture(), 512, lora=lora(*ATTENTION), moe=SPLIT, checkpointing="on", **HALF
    ),
    "shared base, 512": step(dense(), 512, moe=SHARED),
    "shared base, 512, bf16, checkpointing": step(dense(), 512, moe=SHARED, checkpointing="on", **HALF),
    "shared base and LoRA, 512, bf16, checkpointing": step(
        dense(), 512, lora=lora(*ATTENTION), moe=SHARED, checkpointing="on", **HALF
    ),
}


def main() -> None:
    print("| combination | traced (MiB) | real, CPU (MiB) | difference | GPU |\n|---|---|---|---|---|")
    for name, spec in COMBINATIONS.items():
        traced = trace_step(spec).peak.total
        with tempfile.TemporaryDirectory() as folder:
            real = max(split.total for split in real_moments(spec, Path(folder)).values())
        print(
            f"| {name} | {traced / 2**20:.2f} | {real / 2**20:.2f} | {traced / real - 1:+.2%} | unmeasured |",
            flush=True,
        )


if __name__ == "__main__":
    main()
