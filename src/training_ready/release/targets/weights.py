"""How do the tensors change on the way to an engine? A stream: read one at a time, renamed, written shard by shard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from training_ready.moe.upcycle_shards import GIGABYTE, OutgoingTensor, ShardedTensors, write_checkpoint
from training_ready.release.targets.table import refuse

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 2 * GIGABYTE
Change = Callable[[str, "Tensor"], Iterable[tuple[str, "Tensor"]]]
Progress = Callable[[int, int], None]

# Where transformers 5 fuses experts in memory, and the names that engines look for on disk.
_FUSED = re.compile(r"(?P<block>.*)\.mlp\.experts\.(?P<which>gate_up_proj|down_proj)$")
PER_EXPERT = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def rewrite_weights(
    release: Path, out: Path, changes: Iterable[Change], progress: Progress | None = None
) -> int:
    """Send every tensor of `release` through `changes` in turn and write them to `out`; returns the bytes.

    At most one output shard of 2 GB is in memory, and one mapped input file. `progress(done, total)` counts tensors.
    """
    changes = list(changes)
    tensors = ShardedTensors(release)
    return write_checkpoint(_changed(tensors, changes, progress), out, shard_bytes=SHARD_BYTES)


def _changed(
    tensors: ShardedTensors, changes: list[Change], progress: Progress | None
) -> Iterator[OutgoingTensor]:
    names = tensors.names
    for done, name in enumerate(names, start=1):
        pairs = [(name, tensors.get(name))]
        for change in changes:
            pairs = [result for pair in pairs for result in change(*pair)]
        for written, tensor in pairs:
            yield OutgoingTensor(written, tensor.shape, tensor.dtype, partial(_put, tensor))
        if progress:
            progress(done, len(names))


def _put(tensor: Tensor, place: Tensor) -> None:
    place.copy_(tensor)


def expert_by_expert(family: str) -> Change:
    """Fused experts (E, 2I, H) and (E, H, I) as one matrix per expert and projection; other tensors as they are."""

    def change(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        match = _FUSED.fullmatch(name)
        if family not in PER_EXPERT:
            yield name, tensor
            return
        block, gate, up, down = PER_EXPERT[family]
        if match is None:
            yield name.replace(".mlp.gate.", f".{block}.gate."), tensor
            return
        for expert, matrix in enumerate(tensor):
            prefix = f"{match['block']}.{block}.experts.{expert}"
            if match["which"] == "down_proj":
                yield f"{prefix}.{down}.weight", matrix
            else:
                yield f"{prefix}.{gate}.weight", matrix[: len(matrix) // 2]
                yield f"{prefix}.{up}.weight", matrix[len(matrix) // 2 :]

    return change


def untied(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The embedding a second time as the output head."""
    yield name, tensor
    if name == "model.embed_tokens.weight":
        yield "lm_head.weight", tensor


def zero_padded_heads(*, heads: int, key_value_heads: int, old: int, new: int) -> Change:
    """Attention heads of `old` dimensions as heads of `new` ones that compute the same.

    Each half of a rotary head goes to the front of the wider half, the rest is zero, so that dimension i turns by
    theta^(-2i/old) when theta becomes theta^(new/old) (:func:`padded_theta`). Queries grow by sqrt(new/old) because
    the engine divides by sqrt(new). In bfloat16 that factor rounds the queries once more.
    """
    import torch

    def widen(weight: Tensor, count: int, *, rotary: bool, scale: float = 1.0) -> Tensor:
        rows = weight.view(count, old, -1)
        wide = torch.zeros(count, new, rows.shape[2], dtype=weight.dtype)
        half = old // 2
        wide[:, :half] = rows[:, :half]
        start = new // 2 if rotary else half
        wide[:, start : start + old - half] = rows[:, half:]
        return (wide.float() * scale).to(weight.dtype).view(count * new, -1)

    def change(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        if name.endswith("self_attn.q_proj.weight"):
            yield name, widen(tensor, heads, rotary=True, scale=(new / old) ** 0.5)
        elif name.endswith("self_attn.k_proj.weight"):
            yield name, widen(tensor, key_value_heads, rotary=True)
        elif name.endswith("self_attn.v_proj.weight"):
            yield name, widen(tensor, key_value_heads, rotary=False)
        elif name.endswith("self_attn.o_proj.weight"):
            yield name, widen(tensor.t().contiguous(), heads, rotary=False).t().contiguous()
        elif ".self_attn." in name and name.endswith(".bias"):
            raise refuse("tgi", name, "the zero-padded form of heads is for projections without bias", "vllm")
        else:
            yield name, tensor

    return change


def padded_theta(theta: float, *, old: int, new: int) -> float:
    """The rotary base that gives wider heads the frequencies of the narrow ones."""
    return float(theta ** (new / old))
