"""How are adapters over a dense checkpoint written as a plain mixture of experts that any engine serves?"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from training_ready.moe.dense_identity import fingerprint
from training_ready.moe.families import MoEError
from training_ready.moe.peft_lora import LowRank
from training_ready.moe.shared_base_files import (
    WEIGHTS,
    SharedBaseSettings,
    read_shared_base,
    read_shared_lora,
)
from training_ready.moe.upcycle_experts import BranchExperts, LowRankExperts, moe_tensors
from training_ready.moe.upcycle_shards import GIGABYTE, ShardedTensors, write_checkpoint
from training_ready.moe.upcycle_target import (
    PROJECTIONS,
    check_names,
    expected_names,
    target_config,
    target_of,
)

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "*.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
"""Files of the base that the exported model takes over as they are."""


def export_upcycled(
    base: Path,
    state: Path,
    folder: Path,
    *,
    checkpoints: Mapping[int, ShardedTensors] | None = None,
    shard_bytes: int = 4 * GIGABYTE,
    copied: Sequence[str] = COPIED,
) -> int:
    """Write the plain checkpoint of adapters and routers in ``state`` over a dense ``base``, shard by shard.

    LoRA on the attention is summed in like the experts' differences: in fp32, rounded once.

    ``state``: the mix stage, or what joint training saved. ``copied``: patterns of the base's files that go
    along. Returns the bytes of the weights. The dense model is never in memory.

    Raises :class:`MoEError` when the folder is not empty, the two do not fit, or this base is not the one that
    ``state`` was trained over.
    """
    if folder.exists() and any(folder.iterdir()):
        raise MoEError(f"{folder} is not empty: choose another folder for the exported model.")
    config = dense_config(base)
    settings, tensors = read_shared_base(state)
    own = {expert for expert, name in enumerate(settings.experts) if name in settings.materialised}
    if own != set(checkpoints or {}):
        raise MoEError(
            f"{state}: {', '.join(settings.materialised)} have weights of their own, not adapters: their checkpoints "
            "are needed."
        )
    target = target_config(config, experts=len(settings.experts), top_k=settings.top_k)
    _check_state(tensors, config, settings, state)

    def factors(layer: int, projection: str) -> tuple[Tensor, Tensor]:
        return tensors[f"layers.{layer}.{projection}.A"], tensors[f"layers.{layer}.{projection}.B"]

    low_rank = LowRankExperts(
        experts=len(settings.experts), scaling=settings.alpha / settings.rank, factors=factors
    )
    source = ShardedTensors(base)
    check_names(config, source.names, str(base))
    get = _as_trained(source, config, settings, state)
    if settings.base_dtype is not None:
        target.dtype = getattr(torch, settings.base_dtype)
    folder.mkdir(parents=True, exist_ok=True)
    written = write_checkpoint(
        moe_tensors(
            source.names,
            get,
            config=config,
            target=target_of(config),
            experts=BranchExperts(low_rank=low_rank, checkpoints=checkpoints or {}),
            routers=(tensors[f"layers.{layer}.router"] for layer in range(config.num_hidden_layers)),
            lora=_lora(state, settings, source),
        ),
        folder,
        shard_bytes=shard_bytes,
    )
    for pattern in copied:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
    target.save_pretrained(folder)
    return written


def _as_trained(
    source: ShardedTensors, config: Any, settings: SharedBaseSettings, state: Path
) -> Callable[[str], Tensor]:
    """Reads the base's tensors in the type that they had in training, once all are known to be the same."""
    if settings.base_sha256 is None or settings.base_dtype is None:
        return source.get
    dtype: torch.dtype = getattr(torch, settings.base_dtype)
    found = fingerprint(expected_names(config), source.get, dtype=dtype)
    if found != settings.base_sha256:
        raise MoEError(
            f"{state} was trained over {settings.base} with weights of sha256 {settings.base_sha256[:12]}, those in "
            f"{source.folder} have {found[:12]}: another base would make a model that nobody trained."
        )
    return lambda name: source.get(name).to(dtype)


def _lora(state: Path, settings: SharedBaseSettings, source: ShardedTensors) -> dict[str, LowRank]:
    """What is added to the attention, each pair of the shape of its weight."""
    found = read_shared_lora(state, settings)
    for name, pair in found.items():
        shape, needed = (len(pair.b), pair.a.shape[1]), tuple(source.get(f"{name}.weight").shape)
        if shape != needed:
            raise MoEError(f"{state}: LoRA on {name} is {shape}, the base needs {needed}.")
    return found


def _check_state(tensors: dict[str, Tensor], config: Any, settings: SharedBaseSettings, state: Path) -> None:
    experts, rank = len(settings.experts), settings.rank
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_hidden_layers):
        expected[f"layers.{layer}.router"] = (experts, config.hidden_size)
        for projection in PROJECTIONS:
            out_features, in_features = projection_shape(config, projection)
            expected[f"layers.{layer}.{projection}.A"] = (experts, rank, in_features)
            expected[f"layers.{layer}.{projection}.B"] = (experts, out_features, rank)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise MoEError(
                f"{state / WEIGHTS}: {name} is {found.get(name)}, the base needs {expected.get(name)}."
            )


def projection_shape(config: Any, projection: str) -> tuple[int, int]:
    """(out, in) of a feed-forward weight."""
    wide, narrow = config.intermediate_size, config.hidden_size
    return (narrow, wide) if projection == "down_proj" else (wide, narrow)


def dense_config(base: Path) -> Any:
    """The configuration of a dense checkpoint in a local folder."""
    if not (base / "config.json").is_file():
        raise MoEError(f"{base}: no config.json; the base is a local folder of a dense checkpoint.")
    return AutoConfig.from_pretrained(base, trust_remote_code=False)
