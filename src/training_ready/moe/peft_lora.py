"""What does a plain LoRA of PEFT add to which weight? As its files say, without the model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training_ready.moe.adapter_files import CONFIG, WEIGHTS
from training_ready.moe.families import MoEError

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_REFUSED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")


class LowRank(NamedTuple):
    """What is added to a weight (out, in): ``scaling * b @ a``."""

    a: Tensor
    """(r, in)"""
    b: Tensor
    """(out, r)"""
    scaling: float


def read_lora(folder: Path) -> dict[str, LowRank]:
    """What the adapter in ``folder`` adds, by the name of the layer, as ``model.layers.0.self_attn.q_proj``.

    Raises :class:`MoEError` when it cannot be read, lacks half of a pair, or is another kind than plain LoRA on linear
    layers.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise MoEError(f"{folder}: not a readable PEFT adapter ({error}).") from error
    refused = [key for key in _REFUSED if config.get(key)]
    if refused or config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise MoEError(
            f"{path}: only a plain LoRA can be summed into weights, not {', '.join(refused) or 'this one'}."
        )
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise MoEError(f"{folder / WEIGHTS}: {key} is no LoRA of a linear layer.")
        found.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in found.items():
        if len(pair) != 2 or pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            shapes = {factor: tuple(tensor.shape) for factor, tensor in pair.items()}
            raise MoEError(
                f"{folder / WEIGHTS}: {name} has {shapes}, needed are A (r, in) and B (out, r), r={rank}."
            )
    return {name: LowRank(a=pair["A"], b=pair["B"], scaling=scaling) for name, pair in found.items()}
