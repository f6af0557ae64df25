"""How does an adapter leave without its base model? As PEFT writes it, experts as 2-D matrices of their own.

PEFT keeps the adapters of fused experts as one pair per layer, A (E*r, in) with the expert slow and B (out, r*E) with
the expert fast; engines that serve expert adapters look for one pair per expert and projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_ready.release.export import ExportError
from training_ready.release.shared_base import is_shared_base
from training_ready.release.targets.table import refuse
from training_ready.release.targets.tokenizer_files import read_json, write_json
from training_ready.release.targets.weights import PER_EXPERT

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PROJECTIONS = ("gate_up_proj", "down_proj")
_FUSED = re.compile(r"(?P<block>.*)\.mlp\.experts(?P<wraps>(\.base_layer)*)\.lora_[AB]\.weight")
# Settings under which a pair means something else than B @ A * alpha / r.
_UNSUPPORTED = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save")


def write_adapter(folder: Path, out: Path) -> None:
    """Write the adapter of a checkpoint `folder` into `out`: dense pairs as they are, experts in two dimensions.

    Raises ExportError when the adapter is incomplete or says something that per-expert pairs cannot.
    """
    from safetensors.torch import load_file, save_file

    if is_shared_base(folder):
        raise ExportError(
            f"{folder} holds experts over a shared base, and PEFT's adapter in it is the attention's alone: build the "
            "release of that run and export it for another target"
        )
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA" or not config.get("base_model_name_or_path"):
        raise ExportError(f"{folder / CONFIG}: a LoRA adapter that names its base model is needed")
    if not (folder / WEIGHTS).is_file():
        raise ExportError(f"{folder / WEIGHTS} does not exist; only safetensors are exported")
    tensors = dict(load_file(folder / WEIGHTS))
    if any(_FUSED.fullmatch(key) for key in tensors):
        family = base_family(config)
        tensors = dict(per_expert(tensors, config, family))
        config = _per_expert_config(config, family)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        out / WEIGHTS,
        metadata={"format": "pt"},
    )
    write_json(out / CONFIG, config)


def base_family(config: Mapping[str, Any]) -> str:
    """The model type of the base model that an adapter names, from its config.json, local or on the hub."""
    from transformers import AutoConfig

    base, revision = config["base_model_name_or_path"], config.get("revision")
    try:
        return str(
            AutoConfig.from_pretrained(base, revision=revision or "main", trust_remote_code=False).model_type
        )
    except (OSError, ValueError) as error:
        raise ExportError(f"the configuration of the base model {base} cannot be read: {error}") from error


def fused_parts(key: str, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The block and the projection that a key of fused experts belongs to; None for other keys.

    Raises ExportError when the configuration names fewer projections than the key wraps.
    """
    match = _FUSED.fullmatch(key)
    if match is None:
        return None
    targets = {target.split(".")[-1] for target in config.get("target_parameters") or []}
    projections = [name for name in _PROJECTIONS if name in targets]
    # The last projection wraps first: each base_layer leads to the one before it.
    depth = match["wraps"].count(".base_layer")
    if depth >= len(projections):
        raise ExportError(
            f"{key}: target_parameters names only {len(projections)} projections of the experts"
        )
    return match["block"], projections[-1 - depth]


def per_expert(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], family: str
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the adapter, each fused pair split into one pair per expert and projection."""
    if family not in PER_EXPERT:
        raise refuse("adapter", f"expert adapters of {family}", "its experts have no 2-D names", "hf")
    if unsupported := [key for key in _UNSUPPORTED if config.get(key)]:
        raise refuse(
            "adapter", "expert adapters", f"{', '.join(unsupported)} cannot be split by expert", "hf"
        )
    for key, tensor in tensors.items():
        parts = fused_parts(key, config)
        if parts is None:
            yield key, tensor
            continue
        block, projection = parts
        side = "A" if ".lora_A." in key else "B"
        for expert, matrix in enumerate(_experts(tensor, side, int(config["r"]))):
            for name, part in _named(matrix, side, projection, PER_EXPERT[family]):
                yield f"{block}.{PER_EXPERT[family][0]}.experts.{expert}.{name}.lora_{side}.weight", part


def _experts(tensor: Tensor, side: str, rank: int) -> Tensor:
    """(E, r, in) of an A, (E, out, r) of a B."""
    if side == "A":
        return tensor.view(-1, rank, tensor.shape[1])
    return tensor.view(tensor.shape[0], rank, -1).permute(2, 0, 1)


def _named(
    matrix: Tensor, side: str, projection: str, names: tuple[str, str, str, str]
) -> Iterator[tuple[str, Tensor]]:
    _, gate, up, down = names
    if projection == "down_proj":
        yield down, matrix
    elif side == "A":
        yield gate, matrix
        yield up, matrix.clone()
    else:
        yield gate, matrix[: len(matrix) // 2]
        yield up, matrix[len(matrix) // 2 :]


def _per_expert_config(config: Mapping[str, Any], family: str) -> dict[str, Any]:
    targets = {target.split(".")[-1] for target in config["target_parameters"]}
    _, gate, up, down = PER_EXPERT[family]
    names = [*((gate, up) if "gate_up_proj" in targets else ()), *((down,) if "down_proj" in targets else ())]
    dense = config.get("target_modules") or []
    if isinstance(dense, str):
        raise ExportError(f"target_modules is the expression {dense!r}; a list of names is needed")
    written = {key: value for key, value in config.items() if key != "target_parameters"}
    return {**written, "target_modules": sorted({*dense, *names})}
