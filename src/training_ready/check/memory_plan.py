"""What would a process of this recipe hold? The recipe as a step to trace, what is computed, and the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from trl import ModelConfig, get_peft_config

from training_ready.check.checkpointing import checkpointing_on, checkpointing_options
from training_ready.check.context import CheckContext
from training_ready.check.memory_arithmetic import (
    COMPUTED,
    count_weights,
    quantised,
    quantised_experts,
    with_optimizer,
)
from training_ready.check.memory_ranks import Ranks, on_one_rank
from training_ready.check.memory_step import OPTIMIZERS, Checkpointing, StepSpec, TraceError
from training_ready.check.memory_trace import PeakMemory, trace_step
from training_ready.check.processes import Topology
from training_ready.check.topology_native import is_divided_while_loading
from training_ready.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """A step, the micro-batches that it gathers, the way it is divided, the optimizer's name, and the bits of the
    base's linear weights (None: as loaded)."""

    step: StepSpec
    accumulation: int = 1
    ranks: Ranks
    optimizer: str
    bits: Literal[4, 8] | None = None
    nested: bool = False
    experts: Literal["nf4", "nf4_double"] | None = None
    """How the frozen experts are held (None: as loaded)."""


def plan_of(context: CheckContext) -> MemoryPlan:
    """The plan of a recipe.

    Raises:
        TraceError: the recipe asks for something whose memory is not known here.
    """
    recipe, topology = context.recipe, context.topology
    if any(size > 1 for size in topology.parallel.values()) or is_divided_while_loading(recipe):
        raise TraceError(
            "tensor, context and expert parallelism divide a layer, which is neither traced nor computed"
        )
    if topology.sharding not in ("single", "ddp") and recipe.effective("bf16") is False:
        raise TraceError(f"{topology.sharding} is computed for bf16 only, and the recipe says bf16: false")
    optimizer = str(recipe.effective("optim"))
    if optimizer not in OPTIMIZERS and optimizer not in COMPUTED:
        known = ", ".join(sorted({*OPTIMIZERS, *COMPUTED}))
        raise TraceError(f"the state of the optimizer {optimizer} is not known; known are {known}")
    if topology.sharding.startswith("zero") and not optimizer.startswith("adamw_torch"):
        raise TraceError(
            f"under DeepSpeed only AdamW's state is computed, and the recipe says optim: {optimizer}"
        )
    ranks = _ranks(topology, recipe, context.model_config.get_text_config().hidden_size)
    four, eight = recipe.effective("load_in_4bit"), recipe.effective("load_in_8bit")
    return MemoryPlan(
        step=_step(context, ranks, optimizer),
        accumulation=int(recipe.effective("gradient_accumulation_steps")),
        ranks=ranks,
        optimizer=optimizer,
        bits=4 if four else 8 if eight else None,
        nested=bool(recipe.trl.get("use_bnb_nested_quant")),
        experts=recipe.moe.experts_4bit if _routes(context.model_config) else None,
    )


def peak_of(plan: MemoryPlan) -> PeakMemory:
    """The moments of one process: traced, then what is computed."""
    step = plan.step
    if plan.ranks.sharding in ("fsdp1", "fsdp2", "zero0", "zero1", "zero2", "zero3"):
        step = replace(step, dtype=torch.bfloat16)
    weights = count_weights(step)
    peak = trace_step(step)
    if step.optimizer is None and not plan.ranks.deepspeed:
        peak = with_optimizer(peak, COMPUTED[plan.optimizer](weights.shapes), weights)
    if plan.bits is not None:
        peak = quantised(peak, weights, bits=plan.bits, nested=plan.nested)
    if plan.experts is not None:
        peak = quantised_experts(peak, weights, double=plan.experts == "nf4_double")
    return on_one_rank(peak, weights, plan.ranks)


def _step(context: CheckContext, ranks: Ranks, optimizer: str) -> StepSpec:
    recipe = context.recipe
    config = context.model_config
    on_cpu = context.topology.use_cpu
    half = bool(recipe.effective("bf16")) if on_cpu else recipe.effective("bf16") is not False
    moe = recipe.moe if _routes(config) or recipe.moe.shared_base is not None else None
    quantised_base = bool(recipe.effective("load_in_4bit") or recipe.effective("load_in_8bit"))
    return StepSpec(
        config=config,
        length=int(recipe.effective("max_length")),
        rows=int(recipe.effective("per_device_train_batch_size")),
        packed=bool(recipe.effective("packing")),
        dtype=_dtype(recipe, config),
        autocast=(half or bool(recipe.effective("fp16"))) and not ranks.deepspeed,
        attention=str(recipe.effective("attn_implementation") or "sdpa"),
        checkpointing=_checkpointing(recipe),
        reentrant=_reentrant(recipe, ranks),
        lora=get_peft_config(ModelConfig(**recipe.trl_group("ModelConfig"))),
        adapters_in_fp32=not quantised_base and not ranks.deepspeed,
        accumulates=int(recipe.effective("gradient_accumulation_steps")) > 1,
        optimizer=optimizer if optimizer in OPTIMIZERS and not ranks.deepspeed else None,
        moe=moe,
        router_coefficient=recipe.effective("router_aux_loss_coef") if moe else None,
        device="cpu" if on_cpu else "gpu",
    )


def _routes(config: Any) -> bool:
    from training_ready.moe.families import moe_family

    return moe_family(config) is not None


def _dtype(recipe: Recipe, config: Any) -> torch.dtype:
    name = recipe.effective("dtype")
    found = getattr(config, "dtype", None) if name in (None, "auto") else getattr(torch, str(name))
    return found if isinstance(found, torch.dtype) else torch.float32


def _checkpointing(recipe: Recipe) -> Checkpointing:
    if not checkpointing_on(recipe):
        return "off"
    return "selective" if checkpointing_options(recipe).get("selective") else "on"


def _reentrant(recipe: Recipe, ranks: Ranks) -> bool:
    forced = ranks.sharding == "zero3" and recipe.effective("use_peft")
    return bool(forced or checkpointing_options(recipe).get("use_reentrant"))


def _ranks(topology: Topology, recipe: Recipe, hidden: int) -> Ranks:
    if topology.sharding in ("single", "ddp"):
        return Ranks(sharding=topology.sharding, processes=topology.processes)
    if topology.sharding in ("fsdp1", "fsdp2"):
        kept = str(topology.fsdp.get("fsdp_reshard_after_forward", "true")).lower()
        return Ranks(
            sharding=topology.sharding,
            processes=topology.processes,
            reshard=kept in ("true", "full_shard"),
        )
    zero = topology.deepspeed.get("zero_optimization") or {}
    return Ranks(
        sharding=topology.sharding,
        processes=topology.processes,
        bucket=_elements(zero.get("reduce_bucket_size"), 500_000_000, auto=hidden**2),
        overlap=bool(zero.get("overlap_comm", topology.sharding == "zero3")),
        live=_elements(zero.get("stage3_max_live_parameters"), 1_000_000_000),
        group=_elements(zero.get("sub_group_size"), 1_000_000_000),
        optimizer_offloaded=_offloaded(zero, "offload_optimizer"),
        weights_offloaded=_offloaded(zero, "offload_param"),
    )


def _elements(value: Any, default: int, *, auto: int | None = None) -> int:
    """A number of a DeepSpeed file; ``auto`` is what transformers writes in its place."""
    if value == "auto":
        return default if auto is None else auto
    return default if value is None else int(value)


def _offloaded(zero: Mapping[str, Any], key: str) -> bool:
    return bool((zero.get(key) or {}).get("device", "none") != "none")
