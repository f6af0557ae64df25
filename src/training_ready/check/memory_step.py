"""Which step is traced? The model, its inputs, its loss and its optimizer, as TRL's ``SFTTrainer`` sets them up.

Nothing here knows recipes. ``tests/check/test_memory_trace.py`` holds the step against the trainer, run for real.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.utils import add_fused_lm_head

from training_ready import TrainingReadyError
from training_ready.check.memory_kernels import attention_on_gpu
from training_ready.moe.routing import route_in_float32
from training_ready.moe.shared_base import train_shared_base
from training_ready.recipe.sections import MoeSection
from training_ready.training.expert_adapters import adapt_experts
from training_ready.training.moe_losses import RouterLosses, plan_balance
from training_ready.training.shared_experts import keep_routers_in_float32, new_experts

Checkpointing = Literal["off", "on", "selective"]


class TraceError(TrainingReadyError):
    """A step that cannot be traced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpec:
    """Everything that decides what one device holds during one step.

    Args:
        length, rows: tokens of a sequence and sequences of a micro-batch. Packed rows become one row of
            ``rows * length`` tokens, as TRL's collator makes them.
        dtype: of the weights as loaded. ``autocast``: computation in bfloat16 around them (``bf16: true``).
        accumulates: more than one micro-batch per step, so that gradients stay during a forward.
        adapters_in_fp32: PEFT's default; TRL turns it off for quantised models and under ZeRO-3.
        optimizer: a name of ``OPTIMIZERS``; None leaves the optimizer to arithmetic.
        moe: the recipe's section for a mixture of experts: adapters on experts, fp32 routers, the routers' losses.
        router_coefficient: TRL's ``router_aux_loss_coef``, which the section's losses take over.
        device: ``gpu`` traces with the memory of CUDA kernels, ``cpu`` with those that run here.
    """

    config: PretrainedConfig
    length: int
    rows: int = 1
    packed: bool = True
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = True
    attention: str = "sdpa"
    checkpointing: Checkpointing = "on"
    reentrant: bool = False
    lora: LoraConfig | None = None
    adapters_in_fp32: bool = True
    accumulates: bool = False
    optimizer: str | None = "adamw_torch_fused"
    moe: MoeSection | None = None
    router_coefficient: float | None = None
    device: Literal["gpu", "cpu"] = "gpu"


OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter], bool], torch.optim.Optimizer]] = {
    "adamw_torch": lambda weights, gpu: torch.optim.AdamW(
        weights, foreach=gpu
    ),  # what torch chooses by itself
    "adamw_torch_fused": lambda weights, gpu: torch.optim.AdamW(weights, fused=True),
    "sgd": lambda weights, gpu: torch.optim.SGD(weights, foreach=gpu),
}
"""Optimizers whose step runs on fake tensors; all others are computed (``memory_arithmetic.py``)."""


def build_on_meta(spec: StepSpec) -> Any:
    """The model with its adapters, in shapes only."""
    attention = attention_on_gpu(spec.attention) if spec.device == "gpu" else spec.attention
    shared = spec.moe.shared_base if spec.moe is not None else None
    with unset_fake_temporarily(), torch.device("meta"), no_init_weights():
        try:
            model = AutoModelForCausalLM.from_config(
                deepcopy(spec.config), dtype=spec.dtype, attn_implementation=attention
            )
            if shared is not None:
                model = new_experts(model, shared)
                keep_routers_in_float32(model)
            if spec.lora is not None:
                model = get_peft_model(
                    model, deepcopy(spec.lora), autocast_adapter_dtype=spec.adapters_in_fp32
                )
        except (ValueError, TypeError, ImportError) as error:
            raise TraceError(f"{spec.config.model_type} cannot be built as asked: {error}") from error
        if spec.moe is not None and spec.moe.adapters is not None:
            adapt_experts(model, spec.moe.adapters)
        if shared is not None:
            train_shared_base(model)
    return model


def build_model(spec: StepSpec) -> Any:
    """The model in training mode with adapters, checkpointing and TRL's fused head, in the order of ``SFTTrainer``.

    Its tensors are those of the current mode: under ``FakeTensorMode`` no weight exists.
    """
    model = build_on_meta(spec)
    base = model.get_base_model() if spec.lora is not None else model
    _leave_meta(model)
    shared = spec.moe is not None and spec.moe.shared_base is not None
    if shared or (spec.moe is not None and spec.moe.fp32_router):
        route_in_float32(model)
    if shared:
        model.enable_input_require_grads()
    if spec.checkpointing != "off":
        if spec.lora is not None:
            model.enable_input_require_grads()
        if spec.checkpointing == "selective":
            enable_selective_activation_checkpointing(model)
            model.gradient_checkpointing_enable()  # the method that TRL wraps
        else:
            model.activation_checkpointing_enable({"use_reentrant": spec.reentrant})
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    text = base.config.get_text_config()
    if hasattr(text, "output_router_logits"):
        text.output_router_logits = False  # the loss inside the model is replaced by ours
    model.train()
    return model


def _leave_meta(model: nn.Module) -> None:
    """Every tensor of the model, once each, as an empty one of the current mode: PEFT's conversions of weights and
    ``Module.to`` work on the meta device and not on fake tensors."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and old not in made:
                    made[old] = torch.empty(old.shape, dtype=old.dtype)
                    if isinstance(old, nn.Parameter):
                        made[old] = nn.Parameter(made[old], requires_grad=old.requires_grad)
                if old is not None:
                    tensors[name] = made[old]  # type: ignore[assignment]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def make_batch(spec: StepSpec) -> dict[str, Tensor]:
    """A micro-batch of two conversations per pack, every token of it learned: the most that a batch can hold."""
    shape = (1, spec.rows * spec.length) if spec.packed else (spec.rows, spec.length)
    ids = torch.ones(shape, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if spec.packed:
        positions = torch.arange(shape[1]) % -(-spec.length // 2)
        return {**batch, "position_ids": positions[None]}
    return {**batch, "attention_mask": torch.ones_like(ids)}


def router_losses(model: nn.Module, spec: StepSpec) -> RouterLosses | None:
    """The losses that :class:`training_ready.training.moe_trainer.MoETrainer` would add, if any."""
    if spec.moe is None:
        return None
    adapters = spec.lora is not None or bool(spec.moe.adapters or spec.moe.shared_base)
    plan = plan_balance(model, spec.moe, spec.router_coefficient, adapters=adapters)
    if not (plan.needs_gradient or plan.bias_rate):
        return None
    return RouterLosses(model, plan, micro_batches=2 if spec.accumulates else 1)


def compute_loss(
    model: nn.Module, batch: dict[str, Tensor], spec: StepSpec, losses: RouterLosses | None
) -> Tensor:
    """The loss as ``SFTTrainer.compute_loss`` makes it, under the autocast that accelerate wraps around a forward."""
    recording = losses.recording() if losses else nullcontext()
    with recording as routing:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=spec.autocast):
            outputs = model(**batch, use_cache=False, fused_lm_head=True)
        loss: Tensor = -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)
    if losses is None or routing is None:
        return loss
    extra = losses.loss(routing, batch.get("attention_mask"))
    return loss if extra is None else loss + extra


def run_step(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, spec: StepSpec, losses: RouterLosses | None
) -> None:
    """Forward, backward, clipping, optimizer step; gradients that the spec accumulates on must be there already."""
    batch = make_batch(spec)
    if losses is not None:
        losses.begin_step(torch.ones((), dtype=torch.long))
    torch.autograd.backward(compute_loss(model, batch, spec, losses))
    if optimizer is not None:
        torch.nn.utils.clip_grad_norm_(trainable(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def warm_up(model: nn.Module, optimizer: torch.optim.Optimizer | None, spec: StepSpec) -> None:
    """What an earlier step leaves behind: the optimizer's state, and the gradients of earlier micro-batches."""
    for weight in trainable(model):
        weight.grad = torch.zeros_like(weight)
    if optimizer is not None:
        optimizer.step()
    if not spec.accumulates:
        for weight in trainable(model):
            weight.grad = None
