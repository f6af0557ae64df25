"""How do the experts of a large model fit on one card while adapters train on them?

bitsandbytes quantises linear layers and leaves fused experts, the bulk of the weights, as they are. Here the
experts themselves become NF4: frozen, read as a few experts' weights at a time in the forward and again in the
backward pass, which computes the gradient of the input only. The adapters of ``experts_lora`` run beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.integrations.moe import _grouped_linear

from training_ready.moe.families import MoEError, routed_layers
from training_ready.moe.quant_nf4 import Nf4, dequantise_nf4, quantise_nf4
from training_ready.moe.whole_files import replace_file

PROJECTIONS = ("gate_up_proj", "down_proj")
SETTINGS, WEIGHTS = "nf4_experts.json", "nf4_experts.safetensors"
_GROUP_BYTES = 256 * 2**20


class Nf4Experts(nn.Module):
    """One projection of all experts in NF4, standing where the fused parameter (E, out, in) stood.

    Buffers, first axis experts: ``packed`` uint8, ``scales``, and ``steps`` and ``centre`` where the scales are
    quantised too. Casting the module (``.to(bfloat16)``) changes ``dtype``, the type of the weights that it
    gives, and never the scales.
    """

    packed: Tensor
    scales: Tensor
    steps: Tensor | None
    centre: Tensor | None

    def __init__(self, experts: list[Nf4], *, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        for name in ("packed", "scales", "steps", "centre"):
            parts = [getattr(expert, name) for expert in experts]
            self.register_buffer(name, None if parts[0] is None else torch.stack(parts))

    @classmethod
    def quantised(cls, weight: Tensor, *, double: bool = False) -> Nf4Experts:
        """From a fused weight, expert by expert."""
        experts = [quantise_nf4(expert, double=double) for expert in weight]
        return cls(experts, shape=weight.shape, dtype=weight.dtype)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def weight(self, first: int, last: int) -> Tensor:
        """Experts ``first`` to ``last`` (not included), dequantised: (last - first, ...)."""
        parts = [
            dequantise_nf4(self._expert(expert), tuple(self.shape[1:]), self.dtype)
            for expert in range(first, last)
        ]
        return torch.stack(parts) if len(parts) > 1 else parts[0][None]

    def forward(self, rows: Tensor, ends: Tensor, *, is_transposed: bool = False) -> Tensor:
        """(S, in) rows sorted by expert, ``ends`` (E,) the row after each expert's last -> (S, out).

        Rows after the last expert's come out as zeros.
        """
        out: Tensor = _FrozenProduct.apply(rows, ends, self, is_transposed)  # type: ignore[no-untyped-call]
        return out

    def _expert(self, expert: int) -> Nf4:
        return Nf4(
            packed=self.packed[expert],
            scales=self.scales[expert],
            steps=None if self.steps is None else self.steps[expert],
            centre=None if self.centre is None else self.centre[expert],
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Nf4Experts:
        # The packed codes show the device, an empty tensor what would become of the type: scales stay fp32.
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype
        for name, buffer in self.named_buffers():
            moved = fn(buffer)
            setattr(self, name, moved if moved.dtype == buffer.dtype else buffer.to(moved.device))
        return self

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, {self.dtype}, nf4{'' if self.steps is None else ', double'}"


class _FrozenProduct(torch.autograd.Function):
    """Grouped product with weights that exist a group at a time; nothing of them is kept for backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, weight: Nf4Experts, is_transposed: bool) -> Tensor:
        ctx.ends, ctx.weight, ctx.is_transposed = ends, weight, is_transposed
        return _grouped_product(rows, ends, weight, is_transposed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        return _grouped_product(gradient, ctx.ends, ctx.weight, not ctx.is_transposed), None, None, None


def _grouped_product(rows: Tensor, ends: Tensor, weight: Nf4Experts, is_transposed: bool) -> Tensor:
    experts, width = weight.shape[0], weight.shape[2 if is_transposed else 1]
    out = rows.new_zeros(rows.shape[0], width)
    each = weight.shape[1] * weight.shape[2] * weight.dtype.itemsize
    group = min(experts, max(1, _GROUP_BYTES // each))
    bounds = [0, *ends.tolist()]
    for first in range(0, experts, group):
        last = min(first + group, experts)
        start, stop = bounds[first], bounds[last]
        if start < stop:  # experts without tokens are not even read
            part = rows[start:stop].to(weight.dtype)
            local = (ends[first:last] - start).to(torch.int32)
            product = _grouped_linear(part, weight.weight(first, last), local, is_transposed=is_transposed)
            out[start:stop] = product.to(out.dtype)
    return out


def quantise_experts(model: Any, *, double: bool = False, device: torch.device | None = None) -> int:
    """Replace the experts of all layers by NF4, layer by layer; returns the bytes that they take now.

    ``device``: where the codes go, e.g. a GPU that the model would not fit on. Add expert adapters afterwards.
    Raises :class:`MoEError` for a dense model, experts that are adapted or quantised already, or a shape that
    blocks of 64 do not fill.
    """
    layers = routed_layers(model)
    if not layers:
        raise MoEError(f"{type(model).__name__} has no experts to quantise.")
    taken = 0
    for routed in layers:
        experts: Any = routed.block.experts
        for name in PROJECTIONS:
            weight = getattr(experts, name, None)
            if not isinstance(weight, nn.Parameter) or hasattr(experts, "split_lora"):
                raise MoEError(
                    f"{routed.name}.experts.{name} is no plain fused weight that could be quantised."
                )
            try:
                quantised = Nf4Experts.quantised(weight.to(device or weight.device), double=double)
            except MoEError as error:
                raise MoEError(f"{routed.name}.experts.{name}: {error}") from error
            _put(experts, name, quantised)
            taken += quantised.bytes
    _run_quantised(model)
    return taken


def quantised_experts(model: Any) -> Iterator[tuple[str, Nf4Experts]]:
    """(Full name, projection) of every quantised projection, in order."""
    for routed in routed_layers(model):
        for name in PROJECTIONS:
            quantised = getattr(routed.block.experts, name, None)
            if isinstance(quantised, Nf4Experts):
                yield f"{routed.name}.experts.{name}", quantised


def save_quantised_experts(model: Any, folder: Path) -> None:
    """Write the quantised experts into ``folder``: codes and scales as they are, settings last."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {"format": "nf4", "block": 64, "experts": {}}
    for name, quantised in quantised_experts(model):
        for part, buffer in quantised.named_buffers():
            tensors[f"{name}.{part}"] = buffer.cpu().contiguous()
        dtype = str(quantised.dtype).removeprefix("torch.")
        settings["experts"][name] = {"shape": list(quantised.shape), "dtype": dtype}
    if not tensors:
        raise MoEError(f"{type(model).__name__} has no quantised experts to save.")
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    replace_file(folder / SETTINGS, lambda path: path.write_text(text))


def load_quantised_experts(model: Any, folder: Path, *, device: torch.device | None = None) -> None:
    """Put saved experts into a model whose own may be empty (meta device): they are never read.

    Raises :class:`MoEError` when files, layers or shapes do not match.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())["experts"]
        tensors = load_file(folder / WEIGHTS, device=str(device or "cpu"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise MoEError(f"{folder}: no readable {SETTINGS} and {WEIGHTS} ({error}).") from error
    for routed in routed_layers(model):
        for name in PROJECTIONS:
            full = f"{routed.name}.experts.{name}"
            standing = getattr(routed.block.experts, name, None)
            saved = settings.get(full)
            if standing is None or saved is None or list(standing.shape) != saved["shape"]:
                shape = None if standing is None else list(standing.shape)
                raise MoEError(
                    f"{folder}: {full} is {shape} in this model, {saved and saved['shape']} in the file."
                )
            parts = {part: tensors.get(f"{full}.{part}") for part in ("packed", "scales", "steps", "centre")}
            _put(routed.block.experts, name, _restored(parts, saved, full))
    _run_quantised(model)


def _restored(parts: dict[str, Tensor | None], saved: dict[str, Any], full: str) -> Nf4Experts:
    packed, scales = parts["packed"], parts["scales"]
    shape = torch.Size(saved["shape"])
    if packed is None or scales is None or packed.shape != (shape[0], shape[1] * shape[2] // 2):
        raise MoEError(f"{full}: the saved codes do not have the size of {tuple(shape)}.")
    experts = [
        Nf4(
            packed=packed[expert],
            scales=scales[expert],
            steps=None if parts["steps"] is None else parts["steps"][expert],
            centre=None if parts["centre"] is None else parts["centre"][expert],
        )
        for expert in range(shape[0])
    ]
    return Nf4Experts(experts, shape=shape, dtype=getattr(torch, saved["dtype"]))


def _put(experts: Any, name: str, quantised: Nf4Experts) -> None:
    delattr(experts, name)
    setattr(experts, name, quantised)


def _run_quantised(model: Any) -> None:
    from training_ready.moe.experts_lora import IMPLEMENTATION  # registers the forward that reads NF4

    model.set_experts_implementation(IMPLEMENTATION)
