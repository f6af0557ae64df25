"""If it does not fit: which single changes help most? Each candidate is traced or computed again, none is guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig

from training_ready import TrainingReadyError
from training_ready.check.memory_plan import MemoryPlan, peak_of
from training_ready.check.memory_step import OPTIMIZERS


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Keys to set, as the command line takes them, and the peak in bytes that results."""

    keys: str
    peak: int


def best_changes(plan: MemoryPlan, peak: int, *, most: int = 3) -> list[Change]:
    """The ``most`` changes with the lowest peaks below ``peak``, lowest first."""
    found = []
    for keys, changed in _candidates(plan):
        try:
            new = peak_of(changed).peak.total
        except TrainingReadyError:
            continue  # a change that this model or recipe cannot have is no advice
        if new < peak:
            found.append(Change(keys=keys, peak=new))
    return sorted(found, key=lambda change: change.peak)[:most]


def _candidates(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    step = plan.step
    if step.checkpointing != "on":
        yield "activation_checkpointing=true", replace(plan, step=replace(step, checkpointing="on"))
    if step.rows > 1:
        rows, batches = step.rows // 2, 2 * plan.accumulation
        keys = f"per_device_train_batch_size={rows} gradient_accumulation_steps={batches}"
        yield keys, replace(plan, step=replace(step, rows=rows, accumulates=True), accumulation=batches)
    yield f"max_length={step.length // 2}", replace(plan, step=replace(step, length=step.length // 2))
    if step.attention in ("sdpa", "eager") and (step.autocast or step.dtype != torch.float32):
        yield (
            "attn_implementation=flash_attention_2",
            replace(plan, step=replace(step, attention="flash_attention_2")),
        )
    if step.dtype == torch.float32 and step.autocast:
        yield "dtype=bfloat16", replace(plan, step=replace(step, dtype=torch.bfloat16))
    yield from _other_training(plan)
    yield from _more_sharding(plan)


def _more_sharding(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    ranks = plan.ranks
    if plan.step.moe is not None and plan.step.moe.adapters is not None:
        return  # they cannot be saved under FSDP or ZeRO-3
    if ranks.processes > 1 and ranks.sharding not in ("ddp", "zero0", "zero1", "zero2"):
        more = replace(ranks, processes=2 * ranks.processes)
        yield f"launch.num_processes={more.processes}", replace(plan, ranks=more)
    elif plan.step.autocast or ranks.deepspeed:  # FSDP is computed for bf16 only
        processes = max(2, ranks.processes)
        optimizer = plan.optimizer if plan.optimizer in OPTIMIZERS else None
        step = replace(plan.step, optimizer=optimizer, autocast=True, adapters_in_fp32=True)
        fsdp = replace(ranks, sharding="fsdp2", processes=processes)
        keys = f"launch.accelerate_config=fsdp2 launch.num_processes={processes}"
        yield keys, replace(plan, step=step, ranks=fsdp)


def _other_training(plan: MemoryPlan) -> Iterator[tuple[str, MemoryPlan]]:
    """Changes of what is trained and how: they change the result, not only the memory."""
    step = plan.step
    adapters = step.lora is not None or (step.moe is not None and step.moe.adapters is not None)
    if not adapters:
        lora = LoraConfig(
            r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
        )
        keys = "use_peft=true lora_target_modules=[q_proj,k_proj,v_proj,o_proj]"
        yield keys, replace(plan, step=replace(step, lora=lora))
        if plan.optimizer not in ("adamw_8bit", "adafactor") and not plan.ranks.deepspeed:
            yield (
                "optim=adamw_8bit",
                replace(plan, optimizer="adamw_8bit", step=replace(step, optimizer=None)),
            )
    elif plan.bits is None and step.moe is None and plan.ranks.sharding in ("single", "ddp"):
        yield "load_in_4bit=true", replace(plan, bits=4, step=replace(step, adapters_in_fp32=False))
