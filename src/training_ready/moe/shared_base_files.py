"""Where do shared-base experts rest, and how do they leave as a plain mixture of experts?

A folder of ``shared_base.json`` and ``shared_base.safetensors`` holds adapters and routers only; the dense base
stays where it is. Exported is a Mixtral or Qwen3-MoE checkpoint with one weight per expert, which any engine
serves and which gives the trained model's logits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training_ready.moe.adapter_files import CONFIG
from training_ready.moe.dense_identity import BaseIdentity
from training_ready.moe.families import MoEError, RoutedLayer, model_config, moe_family, routed_layers
from training_ready.moe.peft_lora import LowRank, read_lora
from training_ready.moe.shared_base import (
    build_shared_base,
    lora_layers,
    set_router_rows,
    shared_base_adapters,
)
from training_ready.moe.upcycle_experts import LowRankExperts, moe_tensors
from training_ready.moe.upcycle_shards import GIGABYTE, write_checkpoint
from training_ready.moe.upcycle_target import TARGETS, expected_names
from training_ready.moe.whole_files import replace_file

SETTINGS, WEIGHTS = "shared_base.json", "shared_base.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedBaseSettings:
    """What it takes to build the model again around the dense base."""

    base: str
    """Path or repository of the dense model."""
    experts: list[str]
    """What each expert is for, e.g. its domain."""
    top_k: int
    rank: int
    alpha: float
    materialised: list[str] = field(default_factory=list)
    """Experts whose weights are a checkpoint of their own, which adapters cannot stand for."""
    base_revision: str | None = None
    base_dtype: str | None = None
    base_sha256: str | None = None
    """What ``base`` was in a training run (``dense_identity``); None where nothing was trained over it yet."""
    lora: list[str] = field(default_factory=list)
    """The attention's projections that were adapted too; PEFT saves what they learned, into the same folder."""


def save_shared_base(
    model: nn.Module,
    folder: Path,
    *,
    experts: Sequence[str] | None = None,
    base: BaseIdentity | None = None,
) -> None:
    """Write adapters and routers into ``folder``, each file whole or not at all. ``experts``: their names.

    LoRA on the attention is PEFT's to save there (``save_pretrained``); that it exists is written down here.
    """
    tensors = {
        f"layers.{layer}.{name}.{factor}": getattr(adapter, factor)
        for layer, name, adapter in shared_base_adapters(model)
        for factor in ("A", "B")
    }
    tensors |= {f"layers.{routed.layer}.router": _router_weight(routed) for routed in routed_layers(model)}
    config = model_config(model)
    family = moe_family(config)
    adapter = next(adapter for _, _, adapter in shared_base_adapters(model))
    names = list(experts or (str(expert) for expert in range(adapter.A.shape[0])))
    if len(names) != adapter.A.shape[0] or family is None:
        raise MoEError(f"{len(names)} names for {adapter.A.shape[0]} experts: {', '.join(names)}.")
    settings = SharedBaseSettings(
        base=base.name if base else config._name_or_path,
        experts=names,
        top_k=family.top_k,
        rank=adapter.rank,
        alpha=adapter.alpha,
        base_revision=base.revision if base else None,
        base_dtype=base.dtype if base else None,
        base_sha256=base.sha256 if base else None,
        lora=lora_layers(model),
    )
    write_shared_base(settings, tensors, folder)


def write_shared_base(settings: SharedBaseSettings, tensors: dict[str, Tensor], folder: Path) -> None:
    """Tensors ``layers.N.{gate_proj,up_proj,down_proj}.{A,B}`` and ``layers.N.router``; the settings last."""
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(folder / WEIGHTS, lambda path: save_file(on_cpu, path, metadata={"format": "pt"}))
    text = json.dumps(asdict(settings), indent=2, sort_keys=True) + "\n"
    replace_file(folder / SETTINGS, lambda path: path.write_text(text))


def read_shared_base(folder: Path) -> tuple[SharedBaseSettings, dict[str, Tensor]]:
    """Raises :class:`MoEError` when the folder is not one that :func:`save_shared_base` wrote."""
    try:
        settings = SharedBaseSettings(**json.loads((folder / SETTINGS).read_bytes()))
        return settings, load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise MoEError(f"{folder}: no readable {SETTINGS} and {WEIGHTS} ({error}).") from error


def read_shared_lora(folder: Path, settings: SharedBaseSettings) -> dict[str, LowRank]:
    """What LoRA of PEFT adds to the attention, by its projections; empty where none was trained.

    Raises :class:`MoEError` when the adapter in ``folder`` is not the one that ``settings`` speak of.
    """
    if not settings.lora and not (folder / CONFIG).is_file():
        return {}
    found = read_lora(folder)
    for name in sorted(set(found) ^ set(settings.lora)):
        where = ("in its files", f"in {SETTINGS}")
        has, lacks = where if name in found else where[::-1]
        raise MoEError(f"{folder}: LoRA on {name} is {has} and not {lacks}; they are not of the same run.")
    return found


def load_shared_base(
    dense: Any, folder: Path, *, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> Any:
    """The saved experts over a dense model, which is used up as in ``build_shared_base``.

    Raises :class:`MoEError` when they were trained on another shape.
    """
    settings, tensors = read_shared_base(folder)
    if settings.materialised:
        raise MoEError(
            f"{folder}: {', '.join(settings.materialised)} were branched as whole checkpoints and have no adapters; "
            "train the exported mixture instead."
        )
    if settings.lora:
        raise MoEError(
            f"{folder}: {len(settings.lora)} projections of the attention were adapted as well, which experts over the "
            "base alone would lose. Continue that run (resume_from_checkpoint), or train what it exports."
        )
    model = build_shared_base(
        dense,
        experts=len(settings.experts),
        top_k=settings.top_k,
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=dropout,
        dtype=dtype,
    )
    fill_shared_base(model, tensors, folder)
    return model


@torch.no_grad()
def fill_shared_base(model: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    """Put the tensors that ``folder`` held into adapters and routers, each in the type that it has there.

    Raises :class:`MoEError` when one is missing, left over or of another shape.
    """
    layers = [routed.layer for routed in routed_layers(model)]
    set_router_rows(
        model, torch.stack([_take(tensors, f"layers.{layer}.router", folder) for layer in layers])
    )
    for layer, name, adapter in shared_base_adapters(model):
        for factor in ("A", "B"):
            saved = _take(tensors, f"layers.{layer}.{name}.{factor}", folder)
            parameter = getattr(adapter, factor)
            if saved.shape != parameter.shape:
                raise MoEError(
                    f"{folder / WEIGHTS}: layers.{layer}.{name}.{factor} has shape {tuple(saved.shape)}, this "
                    f"model needs {tuple(parameter.shape)}."
                )
            parameter.copy_(saved)
    if tensors:
        raise MoEError(f"{folder / WEIGHTS}: this model has no place for {', '.join(sorted(tensors)[:3])}.")


def export_shared_base(model: nn.Module, folder: Path, *, shard_bytes: int = 4 * GIGABYTE) -> int:
    """Write the model as a plain Mixtral or Qwen3-MoE checkpoint; returns the bytes of its weights.

    Each expert's ``W + s * B A`` is summed in fp32 and rounded once to the type of W; LoRA of PEFT on the
    attention is merged in the same way. One output shard is held in memory besides the model. The
    configuration is written last. Raises :class:`MoEError` for a folder that is not empty, an adapter that
    is not a plain LoRA, or weights that are not here.
    """
    if folder.exists() and any(folder.iterdir()):
        raise MoEError(f"{folder} is not empty: choose another folder for the exported model.")
    config = model_config(model)
    target = next(target for target in TARGETS.values() if target.model_type == config.model_type)
    adapters = {(layer, name): adapter for layer, name, adapter in shared_base_adapters(model)}
    first = next(iter(adapters.values()))

    def factors(layer: int, projection: str) -> tuple[Tensor, Tensor]:
        adapter = adapters[layer, projection]
        return adapter.A.detach(), adapter.B.detach()

    inner: Any = model
    plain = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    folder.mkdir(parents=True, exist_ok=True)
    written = write_checkpoint(
        moe_tensors(
            expected_names(config),
            lambda name: _dense_weight(plain, name),
            config=config,
            target=target,
            experts=LowRankExperts(experts=first.A.shape[0], scaling=first.scaling, factors=factors),
            routers=(_router_weight(routed) for routed in routed_layers(model)),
        ),
        folder,
        shard_bytes=shard_bytes,
    )
    if plain.generation_config is not None:
        plain.generation_config.save_pretrained(folder)
    config.save_pretrained(folder)
    return written


@torch.no_grad()
def _dense_weight(model: nn.Module, name: str) -> Tensor:
    """A parameter under its name in the dense checkpoint, with PEFT's LoRA on it merged."""
    path, _, attribute = name.replace(".mlp.", ".mlp.experts.shared.").rpartition(".")
    module: Any = model.get_submodule(path)
    if hasattr(module, "original_module"):
        raise MoEError(f"{path} was trained as a whole (modules_to_save), which the shared base is not.")
    if not hasattr(module, "base_layer"):
        weight: Tensor = getattr(module, attribute)
    else:
        weight = getattr(module.base_layer, attribute)
        if attribute == "weight" and not module.merged:
            if not hasattr(module, "lora_A") or any(getattr(module, "use_dora", {}).values()):
                raise MoEError(
                    f"{path}: {type(module).__name__} is no plain LoRA; merge it before the export."
                )
            for adapter in module.active_adapters:
                delta = module.get_delta_weight(adapter).float()
                weight = (weight.float() + delta).to(weight.dtype)
    if weight.is_meta or not weight.is_floating_point():
        raise MoEError(
            f"{name} is {weight.dtype} on {weight.device}: gather the weights, unquantised, to export them."
        )
    return weight.detach()


def _router_weight(routed: RoutedLayer) -> Tensor:
    weight = routed.router.weight
    if not isinstance(weight, Tensor):
        raise MoEError(f"{routed.name}: the router has no weight.")
    return weight.detach()


def _take(tensors: dict[str, Tensor], name: str, folder: Path) -> Tensor:
    if name not in tensors:
        raise MoEError(f"{folder / WEIGHTS}: no tensor {name}; was it trained on another base?")
    return tensors.pop(name)
