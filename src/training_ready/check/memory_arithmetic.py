"""What is computed because it cannot be traced: states of other optimizers, weights in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from training_ready.check.memory_step import StepSpec, build_on_meta, trainable
from training_ready.check.memory_trace import PeakMemory, Split, decoder_layers

Shape = tuple[int, ...]
_EXPERTS_AT_ONCE = 256 * 2**20
"""Bytes of a group of unpacked experts, as in ``moe/quant.py``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The weights of a whole model, counted on the meta device.

    Args:
        trainable, frozen: parameters. ``bytes_each``: of a frozen weight as loaded.
        shapes: of the trainable ones.
        gradient_bytes: gradients in the types of their weights.
        layers: parameters of each decoder layer; ``ends``: of embedding, head and final norm together.
        linear: parameters that bitsandbytes would quantise: the base's linear layers without the head. Experts that are
            fused into one tensor are none. ``largest_linear``: the largest one.
        experts: parameters of fused experts. ``largest_expert``: of one projection of one expert.
    """

    trainable: int
    frozen: int
    bytes_each: int
    shapes: tuple[Shape, ...]
    gradient_bytes: int
    layers: tuple[int, ...]
    ends: int
    linear: int
    largest_linear: int
    experts: int = 0
    largest_expert: int = 0

    @property
    def all(self) -> int:
        return self.trainable + self.frozen


def count_weights(spec: StepSpec) -> Weights:
    """Counts the model of ``spec`` with its adapters."""
    model = build_on_meta(spec)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    learned = trainable(model)
    every = list(model.parameters())
    layers = tuple(sum(w.numel() for w in layer.parameters()) for layer in decoder_layers(base.base_model))
    head = base.get_output_embeddings()
    linear = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]
    fused = [
        weight
        for name, weight in model.named_parameters()
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")) and weight.dim() == 3
    ]
    return Weights(
        trainable=sum(w.numel() for w in learned),
        frozen=sum(w.numel() for w in every if not w.requires_grad),
        bytes_each=spec.dtype.itemsize,
        shapes=tuple(tuple(w.shape) for w in learned),
        gradient_bytes=sum(w.numel() * w.element_size() for w in learned),
        layers=layers,
        ends=sum(w.numel() for w in every) - sum(layers),
        linear=sum(linear),
        largest_linear=max(linear, default=0),
        experts=sum(weight.numel() for weight in fused),
        largest_expert=max((weight[0].numel() for weight in fused), default=0),
    )


# --------------------------------------------------------------------------- optimizers
@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerMemory:
    """Bytes of an optimizer: its state, and what a step needs besides."""

    state: int
    workspace: int


def _adam_8bit(shapes: Sequence[Shape]) -> OptimizerMemory:
    """bitsandbytes: two moments of one byte and an fp32 scale per 256 values; tensors below 4,096 values in fp32."""
    state = 0
    for shape in shapes:
        count = prod(shape)
        state += 8 * count if count < 4096 else 2 * count + 2 * 4 * -(-count // 256)
    return OptimizerMemory(state=state, workspace=0)


def _adafactor(shapes: Sequence[Shape]) -> OptimizerMemory:
    """transformers' Adafactor without first moment: fp32 means of rows and columns; fp32 copies of gradient, update and
    weight of one tensor at a time."""
    state = 0
    for shape in shapes:
        factored = len(shape) >= 2
        state += 4 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1] if factored else prod(shape))
    return OptimizerMemory(state=state, workspace=3 * 4 * max(prod(shape) for shape in shapes))


def _adam_32bit(shapes: Sequence[Shape]) -> OptimizerMemory:
    return OptimizerMemory(state=8 * sum(prod(shape) for shape in shapes), workspace=0)


COMPUTED: Mapping[str, Callable[[Sequence[Shape]], OptimizerMemory]] = {
    "adafactor": _adafactor,
    "adamw_8bit": _adam_8bit,
    "adamw_bnb_8bit": _adam_8bit,
    "paged_adamw_8bit": _adam_8bit,
    "paged_adamw_32bit": _adam_32bit,
}
"""Optimizers by arithmetic. Paged states can leave the GPU under pressure; here they are counted as if they stayed."""


def with_optimizer(peak: PeakMemory, memory: OptimizerMemory, weights: Weights) -> PeakMemory:
    """A trace without an optimizer, and the optimizer's state at every moment and a moment of its own."""
    moments = {name: split.plus(optimizer=memory.state) for name, split in peak.moments.items()}
    parameters = next(iter(peak.moments.values())).parameters
    moments["optimizer"] = Split(
        parameters=parameters,
        gradients=weights.gradient_bytes,
        optimizer=memory.state,
        activations=memory.workspace,
    )
    return replace(peak, moments=moments)


# --------------------------------------------------------------------------- quantised weights
def quantised(peak: PeakMemory, weights: Weights, *, bits: int, nested: bool) -> PeakMemory:
    """The trace with the base's linear weights in 4 or 8 bits.

    4 bits: half a byte per weight and a scale per 64 (fp32; nested: one byte, and an fp32 scale per 256 scales); each
    product unpacks its weight, so that the largest is there once in the computing type.
    8 bits: one byte; the scales per row are less than a thousandth and not counted.
    """
    scales = (1 / 64 + 4 / (64 * 256)) if nested else 4 / 64
    each = 0.5 + scales if bits == 4 else 1.0
    saved = round(weights.linear * (weights.bytes_each - each))
    unpacked = weights.largest_linear * torch.bfloat16.itemsize if bits == 4 else 0
    moments = {
        name: split.plus(parameters=-saved, activations=0 if name == "optimizer" else unpacked)
        for name, split in peak.moments.items()
    }
    return replace(peak, moments=moments)


def quantised_experts(peak: PeakMemory, weights: Weights, *, double: bool) -> PeakMemory:
    """The trace with the experts in NF4 (``moe/quant.py``): half a byte per weight and a scale per 64, fp32 or, double,
    a byte and an fp32 step per 256 scales. Each product unpacks experts in groups of 256 MB, at least one: in the
    computing type, and one expert's codes as int32 and values as fp32 on the way."""
    scales = (1 + 4 / 256) / 64 if double else 4 / 64
    saved = round(weights.experts * (weights.bytes_each - 0.5 - scales))
    one = weights.largest_expert * weights.bytes_each
    # A group of several experts is stacked from its parts, so it is there twice for a moment.
    group = one if 2 * one > _EXPERTS_AT_ONCE else 2 * _EXPERTS_AT_ONCE
    unpacked = group + 6 * weights.largest_expert
    moments = {
        name: split.plus(parameters=-saved, activations=0 if name == "optimizer" else unpacked)
        for name, split in peak.moments.items()
    }
    return replace(peak, moments=moments)
