"""What happened in a run, counted: the facts that its summary and its model card are made of."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import ModelConfig

from training_ready.corpus.manifest import Manifest
from training_ready.moe.families import moe_family, routed_layers
from training_ready.moe.monitor import LoadSnapshot
from training_ready.moe.quant import quantised_experts
from training_ready.moe.shared_base import SharedExperts
from training_ready.recipe.recipe import Recipe
from training_ready.stream.plan import fill_of, tokens_by_source
from training_ready.training.arguments import world
from training_ready.training.checkpoints import ResumeError, checkpoints_in
from training_ready.training.data import RunData
from training_ready.training.run_folder import RunFolder


def data_facts(recipe: Recipe, data: RunData) -> dict[str, Any]:
    manifest, *others = data.manifests.values()
    return {
        "corpus": manifest.name,
        "manifest_uri": manifest.uri,
        "manifest_sha256": manifest.sha256,
        "target_role": recipe.data.target_role,
        "splits": dict(manifest.splits),
        "sources": [source for one in data.manifests.values() for source in _source_facts(one)],
        "other_corpora": [
            {"corpus": other.name, "manifest_uri": other.uri, "manifest_sha256": other.sha256}
            for other in others
        ],
    }


def _source_facts(manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {
            "name": source.name,
            "license": source.license,
            "records_in": source.records_in,
            "kept": source.kept,
            "rejected": source.rejected,
            "pii_status": source.pii_status,
            "consent": source.consent,
        }
        for source in manifest.sources
    ]


def token_facts(data: RunData, packs_consumed: int) -> dict[str, Any]:
    plan = data.packs.plan
    parts = plan.count(packs_consumed)
    return {
        **asdict(data.counts),
        "untokenised_blocks": data.untokenised_blocks,
        "packs": sum(part.packs for part in parts.values()),
        "pack_fill": round(fill_of(list(parts.values()), data.max_length), 4),
        "trained_rows": sum(part.rows for part in parts.values()),
        "trained_tokens": sum(part.tokens for part in parts.values()),
        "trained_learned_tokens": sum(part.learned_tokens for part in parts.values()),
        "trained_parts": [
            {
                "name": name,
                "packs": part.packs,
                "epochs": None if part.epochs is None else round(part.epochs, 4),
                "rows": part.rows,
                "tokens": part.tokens,
                "learned_tokens": part.learned_tokens,
            }
            for name, part in parts.items()
        ],
        "trained_sources": [
            {"name": name, "rows": int(rows), "tokens": int(tokens), "learned_tokens": int(learned)}
            for name, (rows, tokens, learned) in tokens_by_source(plan, parts).items()
        ],
    }


def moe_facts(load: LoadSnapshot, domains: dict[str, Any] | None, folder: RunFolder) -> dict[str, Any]:
    aux = folder.series("aux_loss")
    return {
        "layers": [{"layer": one.layer, "load": one.load, "entropy": one.entropy} for one in load.layers],
        "aux_loss_first": aux[0][1] if aux else None,
        "aux_loss_last": aux[-1][1] if aux else None,
        "domains": domains,
    }


def loss_facts(folder: RunFolder, evaluation: dict[str, float]) -> dict[str, Any]:
    losses = [loss for _, loss in folder.series("loss")]
    if not losses:
        raise ResumeError(
            f"no loss was logged in {folder.path}: set logging_steps to at most the number of steps"
        )
    return {"first": losses[0], "last": losses[-1], "eval": evaluation.get("eval_loss")}


def model_facts(model: PreTrainedModel, model_args: ModelConfig) -> dict[str, Any]:
    adapters = sum(_size(weight) for name, weight in model.named_parameters() if _ADAPTER.search(name))
    return {
        "architecture": type(model).__name__,
        "parameters_total": _released(model),
        "parameters_merged": adapters,
        "parameters_trainable": sum(
            _size(parameter) for parameter in model.parameters() if parameter.requires_grad
        ),
        "base_model": model_args.model_name_or_path,
        "base_revision": getattr(model.config, "_commit_hash", None),
    }


_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save|split_lora|experts\.adapters)\.")
"""Parameters that a release merges: LoRA and whole layers of PEFT, adapters of experts, experts over a shared base."""


def _released(model: PreTrainedModel) -> int:
    """Parameters of the release: adapters merged, experts in four bits as weights, those over a shared base whole."""
    total = sum(_size(weight) for name, weight in model.named_parameters() if not _ADAPTER.search(name))
    if moe_family(model.config) is None:
        return total
    total += sum(math.prod(quantised.shape) for _, quantised in quantised_experts(model))
    for routed in routed_layers(model):
        experts = routed.block.experts
        if isinstance(experts, SharedExperts):
            total += (experts.num_experts - 1) * sum(_size(weight) for weight in experts.shared.parameters())
    return total


def _size(parameter: torch.nn.Parameter) -> int:
    """Elements of a parameter; under ZeRO-3 the local part is empty and DeepSpeed keeps the true size."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def versions() -> dict[str, str]:
    names = ("training-ready", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def hardware(device: torch.device) -> dict[str, Any]:
    on_gpu, (_, world_size) = device.type == "cuda", world()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "device_count": world_size if on_gpu else 0,
        "processes": world_size,
        "processor": platform.processor() or platform.machine(),
        "processor_count": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
    }


def last_checkpoint(folder: Path) -> Path:
    complete, _ = checkpoints_in(folder)
    if not complete:
        raise ResumeError(
            f"{folder} holds no complete checkpoint after training: set save_strategy in the recipe"
        )
    return complete[-1]
