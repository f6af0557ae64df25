"""Which step is traced? The model, its inputs, its loss and its optimizer, exactly as TRL's ``SFTTrainer`` sets them up.

Nothing here knows recipes, and nothing here knows whether tensors are fake or real: the same step runs under either,
which is how the estimate is held against a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights
from trl.models import enable_selective_activation_checkpointing
from trl.trainer.utils import add_fused_lm_head

from training_ready.check.memory_kernels import ATTENTION_ON_GPU

Checkpointing = Literal["off", "on", "selective"]


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
        router_loss: the coefficient of the auxiliary loss of a mixture of experts; 0.0 turns it off.
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
    router_loss: float = 0.0
    device: Literal["gpu", "cpu"] = "gpu"


OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw_torch": lambda weights: torch.optim.AdamW(weights, foreach=True),  # what torch chooses on CUDA
    "adamw_torch_fused": lambda weights: torch.optim.AdamW(weights, fused=True),
    "sgd": lambda weights: torch.optim.SGD(weights, foreach=True),
}
"""Optimizers whose step runs on fake tensors; all others are computed (``memory_arithmetic.py``)."""


def build_model(spec: StepSpec) -> nn.Module:
    """The model in training mode with adapters, checkpointing and TRL's fused head, in the order of ``SFTTrainer``."""
    attention = (
        ATTENTION_ON_GPU.get(spec.attention, spec.attention) if spec.device == "gpu" else spec.attention
    )
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(spec.config, dtype=spec.dtype, attn_implementation=attention)
    base = model
    if spec.lora is not None:
        model = get_peft_model(base, spec.lora, autocast_adapter_dtype=spec.adapters_in_fp32)
    if spec.checkpointing != "off":
        if spec.lora is not None:
            model.enable_input_require_grads()
        if spec.checkpointing == "selective":
            enable_selective_activation_checkpointing(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": spec.reentrant})
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    text = base.config.get_text_config()
    if hasattr(text, "output_router_logits"):
        text.output_router_logits = spec.router_loss != 0.0
        text.router_aux_loss_coef = spec.router_loss
    model.train()
    return model


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


def compute_loss(model: nn.Module, batch: dict[str, Tensor], spec: StepSpec) -> Tensor:
    """The loss as ``SFTTrainer.compute_loss`` makes it, under the autocast that accelerate wraps around a forward."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=spec.autocast):
        inputs: dict[str, Any] = {**batch, "use_cache": False}
        if spec.router_loss:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, fused_lm_head=True)
    loss: Tensor = -outputs.log_probs.sum() / outputs.label_mask.sum().clamp(min=1)
    if spec.router_loss:
        loss = loss + spec.router_loss * outputs.aux_loss
    return loss


def run_step(model: nn.Module, optimizer: torch.optim.Optimizer | None, spec: StepSpec) -> None:
    """Forward, backward, clipping, optimizer step; gradients that the spec accumulates on must be there already."""
    compute_loss(model, make_batch(spec), spec).backward()
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
