"""Expert adapters on disk in PEFT's own format: PEFT reads what is written here, and the other way round.

PEFT names no parameter in its keys: of two adapted projections the first wraps the second's place, so
``experts.base_layer.lora_A`` is ``gate_up_proj`` and ``experts.lora_A`` is ``down_proj``; a single one is
always ``experts.lora_A``. A is stored (E * r, in) with the expert slow, B (out, r * E) with the expert
*fast*.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training_ready.moe.experts_lora import PROJECTIONS, SplitLora, add_expert_adapters, expert_adapters
from training_ready.moe.families import MoEError
from training_ready.moe.whole_files import replace_file

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNSUPPORTED = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora")


def save_expert_adapters(model: Any, folder: Path, *, base_model: str | None = None) -> None:
    """Write the expert adapters as a PEFT adapter into ``folder``.

    If the folder already holds an adapter of PEFT (of the attention, say), the experts are added to it, so
    that one folder is the whole adapter; both must then share rank and alpha. Dropout is written as 0,
    because PEFT refuses to load anything else on fused parameters and inference does not use it.
    """
    layers = list(expert_adapters(model))
    if not layers:
        raise MoEError(f"{type(model).__name__} carries no expert adapters to save.")
    names = [name for name in PROJECTIONS if name in layers[0][1]]
    first = layers[0][1][names[0]]
    if not isinstance(first, SplitLora):
        raise MoEError(f"{layers[0][0]}: {type(first).__name__} is no expert adapter.")
    config = _config(folder, first, names, base_model or getattr(model.config, "_name_or_path", None))
    tensors = load_file(folder / WEIGHTS) if (folder / WEIGHTS).exists() else {}
    for module, adapters in layers:
        for key, adapter in _keys(module.removeprefix(PREFIX), names, adapters):
            a, b = adapter.A.detach(), adapter.B.detach()
            tensors[f"{key}.lora_A.weight"] = a.flatten(0, 1).cpu().contiguous()
            tensors[f"{key}.lora_B.weight"] = b.permute(1, 2, 0).flatten(1).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    replace_file(
        folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    )


def load_expert_adapters(model: Any, folder: Path, *, dtype: torch.dtype = torch.float32) -> list[str]:
    """Add adapters to the experts and fill them from a PEFT adapter; returns the keys that belong to other layers.

    Raises :class:`MoEError` when files are missing, when no expert projection is targeted, or when a tensor
    is missing or has another shape than this model's experts need.
    """
    config, names = _config_for_experts(folder)
    add_expert_adapters(
        model, rank=int(config["r"]), alpha=float(config["lora_alpha"]), projections=names, dtype=dtype
    )
    return sorted(fill_expert_adapters(model, folder))


def fill_expert_adapters(model: Any, folder: Path) -> dict[str, Tensor]:
    """Fill adapters that the experts carry already from a PEFT adapter; returns the tensors of other layers.

    Raises :class:`MoEError` as :func:`load_expert_adapters` does, and when other projections were adapted.
    """
    config, names = _config_for_experts(folder)
    tensors = _read(folder)
    rank = int(config["r"])
    for module, adapters in expert_adapters(model):
        if sorted(adapters) != sorted(names):
            raise MoEError(f"{folder} adapts {', '.join(names)}, {module} has {', '.join(adapters)}.")
        for key, adapter in _keys(module.removeprefix(PREFIX), names, adapters):
            experts = adapter.A.shape[0]
            a = _take(tensors, f"{key}.lora_A.weight", (experts * rank, adapter.A.shape[2]), folder)
            b = _take(tensors, f"{key}.lora_B.weight", (adapter.B.shape[1], rank * experts), folder)
            with torch.no_grad():
                adapter.A.copy_(a.view_as(adapter.A))
                adapter.B.copy_(b.view(adapter.B.shape[1], rank, experts).permute(2, 0, 1))
    return tensors


def adapts_experts(folder: Path) -> bool:
    """Is there an adapter of fused experts in ``folder``?"""
    if not (folder / CONFIG).is_file():
        return False
    targets = json.loads((folder / CONFIG).read_text()).get("target_parameters") or []
    return any(target.split(".")[-1] in PROJECTIONS for target in targets)


def _config_for_experts(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The adapter's configuration and the projections of the experts that it targets."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise MoEError(f"{folder}: not a readable PEFT adapter ({error}).") from error
    targets = config.get("target_parameters") or []
    names = [name for name in PROJECTIONS if any(target.split(".")[-1] == name for target in targets)]
    if not names:
        raise MoEError(
            f"{folder / CONFIG}: target_parameters {targets} names none of {', '.join(PROJECTIONS)}."
        )
    unsupported = [key for key in UNSUPPORTED if config.get(key)]
    if unsupported:
        raise MoEError(f"{folder / CONFIG}: {', '.join(unsupported)} cannot be read for expert adapters.")
    return config, names


def _read(folder: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(folder / WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise MoEError(f"{folder}: not a readable PEFT adapter ({error}).") from error


def _keys(module: str, names: list[str], adapters: nn.ModuleDict) -> list[tuple[str, SplitLora]]:
    """PEFT's key for each projection of one experts module."""
    found = []
    for depth, name in enumerate(reversed(names)):
        adapter = adapters[name]
        if not isinstance(adapter, SplitLora):
            raise MoEError(f"{module}.{name}: {type(adapter).__name__} is no expert adapter.")
        found.append((f"{PREFIX}{module}{'.base_layer' * depth}", adapter))
    return found


def _take(tensors: dict[str, Tensor], key: str, shape: tuple[int, int], folder: Path) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise MoEError(
            f"{folder / WEIGHTS}: no tensor {key}; was the adapter trained on another architecture?"
        )
    if tuple(tensor.shape) != shape:
        raise MoEError(
            f"{folder / WEIGHTS}: {key} has shape {tuple(tensor.shape)}, these experts need {shape}."
        )
    return tensor


def _config(folder: Path, adapter: SplitLora, names: list[str], base_model: str | None) -> dict[str, Any]:
    """The configuration already in the folder, or a new one, with the experts' projections as targets."""
    path = folder / CONFIG
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "target_modules": [],
        "bias": "none",
        "inference_mode": True,
    }
    if path.exists():
        config = json.loads(path.read_text())
        r, alpha = config.get("r"), config.get("lora_alpha")
        if (r, alpha) != (adapter.rank, adapter.alpha):
            raise MoEError(
                f"{path}: the adapter there has r={r} and lora_alpha={alpha}, the experts have r={adapter.rank} "
                f"and lora_alpha={adapter.alpha}. One folder holds only one of each: train both with the same, "
                "or save the experts to a folder of their own."
            )
    others = [
        target for target in config.get("target_parameters") or [] if target.split(".")[-1] not in names
    ]
    targets = others + [f"experts.{name}" for name in names]
    return {**config, "lora_dropout": 0.0, "target_parameters": targets}
