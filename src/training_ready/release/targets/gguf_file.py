"""How does a model become one GGUF file? Llama and Mixtral, tensor by tensor, through the `gguf` package.

llama.cpp rotates neighbouring dimensions where transformers rotates halves, so the rows of q and k change places;
experts of a layer become one tensor; everything with one dimension, and the router, stays float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_ready.moe.upcycle_shards import ShardedTensors
from training_ready.release.export import ExportError
from training_ready.release.targets.gguf_vocabulary import add_vocabulary
from training_ready.release.targets.table import gguf_row, refuse
from training_ready.release.targets.tokenizer_files import chat_template
from training_ready.release.targets.weights import Progress

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TYPES = ("f32", "f16", "q8_0")
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
_DENSE = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_EXPERTS = {"w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps"}


@dataclass(kw_only=True, slots=True, frozen=True)
class Entry:
    """One tensor of the file: its name there, the tensors it is made of (several: stacked), the heads to permute."""

    name: str
    sources: tuple[str, ...]
    heads: int = 0


def file_name(gguf_type: str) -> str:
    return f"model-{gguf_type}.gguf"


def write_gguf(
    release: Path,
    folder: Path,
    config: Mapping[str, Any],
    gguf_type: str,
    progress: Progress | None = None,
    *,
    target: str = "gguf",
) -> None:
    """Write `model-<type>.gguf` with weights, vocabulary and chat template into `folder`.

    At most one tensor of the file is in memory: the experts of one projection of one layer are one tensor.

    Raises ExportError for an architecture, setting or tokenizer that the file cannot say.
    """
    gguf = _gguf()
    if gguf_type not in TYPES:
        raise ExportError(f"GGUF type {gguf_type!r} is none of {', '.join(TYPES)}")
    architecture = gguf_row(config, target)
    _check(config, target)
    path = folder / file_name(gguf_type)
    writer = gguf.GGUFWriter(path, architecture)
    _add_shape(writer, config, gguf_type)
    add_vocabulary(writer, release, target)
    writer.add_chat_template(chat_template(release))
    tensors = ShardedTensors(release)
    entries = list(_entries(config, set(tensors.names)))
    factors = _rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for entry in entries:
        shape = tuple(tensors.get(entry.sources[0]).shape)
        shape = shape if len(entry.sources) == 1 else (len(entry.sources), *shape)
        _declare(writer, entry, shape, gguf_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for done, entry in enumerate(entries, start=1):
        writer.write_tensor_data(_values(entry, tensors, gguf_type))
        if progress:
            progress(done, len(entries))
    writer.close()


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ExportError("the target needs the gguf package: pip install 'training-ready[gguf]'") from error
    return gguf


def _check(config: Mapping[str, Any], target: str) -> None:
    family, window = config["model_type"], config.get("sliding_window")
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise refuse(target, f"{family} with biases", "the writer knows projections without bias", "vllm")
    if window and window < config["max_position_embeddings"]:
        raise refuse(
            target, f"{family} with a sliding window of {window}", "llama.cpp attends to everything", "vllm"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise refuse(target, f"{family} with {config['hidden_act']}", "llama.cpp computes SiLU", "vllm")


def _add_shape(writer: Any, config: Mapping[str, Any], gguf_type: str) -> None:
    gguf = _gguf()
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(
        gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[gguf_type]]
    )
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope.get("rope_type", "default") not in ("default", "llama3"):
        raise refuse(
            "gguf", f"rope_type {rope['rope_type']}", "the writer knows default, linear, llama3", "vllm"
        )
    if config["model_type"] == "mixtral":
        writer.add_expert_count(config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])


def _rope_factors(config: Mapping[str, Any]) -> np.ndarray[Any, Any] | None:
    """Llama 3's scaling as llama.cpp takes it: what each rotary frequency is divided by, (head_dim/2,) float32."""
    import numpy as np

    rope = config["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    factors = []
    for place in range(0, head_dim, 2):
        turns = rope["original_max_position_embeddings"] / (
            2 * math.pi * rope["rope_theta"] ** (place / head_dim)
        )
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - share) / factor + share))
    return np.array(factors, dtype=np.float32)


def _entries(config: Mapping[str, Any], names: set[str]) -> Iterator[Entry]:
    """The file's tensors in the order of the layers. Raises ExportError for a tensor that has no place in it."""
    heads = config["num_attention_heads"]
    turned = {"attn_q": heads, "attn_k": config.get("num_key_value_heads") or heads}
    found: list[Entry] = [Entry(name="token_embd.weight", sources=("model.embed_tokens.weight",))]
    for layer in range(config["num_hidden_layers"]):
        source, block = f"model.layers.{layer}", f"blk.{layer}"
        moe = config["model_type"] == "mixtral"
        for theirs, ours in {**_LAYER, **({} if moe else _DENSE)}.items():
            found.append(
                Entry(
                    name=f"{block}.{ours}.weight",
                    sources=(f"{source}.{theirs}.weight",),
                    heads=turned.get(ours, 0),
                )
            )
        if moe:
            router = f"{source}.block_sparse_moe.gate.weight"
            found.append(Entry(name=f"{block}.ffn_gate_inp.weight", sources=(router,)))
            for theirs, ours in _EXPERTS.items():
                stack = (
                    f"{source}.block_sparse_moe.experts.{expert}.{theirs}.weight"
                    for expert in range(config["num_local_experts"])
                )
                found.append(Entry(name=f"{block}.{ours}.weight", sources=tuple(stack)))
    found.append(Entry(name="output_norm.weight", sources=("model.norm.weight",)))
    if "lm_head.weight" in names:
        found.append(Entry(name="output.weight", sources=("lm_head.weight",)))
    wanted = {source for entry in found for source in entry.sources}
    if wanted != names:
        raise ExportError(
            f"weights that GGUF has no place for: {sorted(names - wanted)[:3]}; weights that are missing: "
            f"{sorted(wanted - names)[:3]}"
        )
    yield from found


def _precision(entry: Entry, dimensions: int, width: int, gguf_type: str) -> Any:
    gguf = _gguf()
    if dimensions == 1 or gguf_type == "f32" or "ffn_gate_inp" in entry.name:
        return gguf.GGMLQuantizationType.F32
    if gguf_type == "f16" or width % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType.Q8_0


def _declare(writer: Any, entry: Entry, shape: tuple[int, ...], gguf_type: str) -> None:
    import numpy as np

    gguf = _gguf()
    precision = _precision(entry, len(shape), shape[-1], gguf_type)
    block, size = gguf.GGML_QUANT_SIZES[precision]
    row = shape[-1] // block * size
    kinds = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    kind = np.dtype(kinds.get(precision, np.uint8))
    stored = shape if precision in kinds else (*shape[:-1], row)
    writer.add_tensor_info(entry.name, stored, kind, math.prod(shape[:-1]) * row, raw_dtype=precision)


def _values(entry: Entry, tensors: ShardedTensors, gguf_type: str) -> np.ndarray[Any, Any]:
    import torch

    parts = [_turned(tensors.get(source), entry.heads) for source in entry.sources]
    whole = parts[0] if len(parts) == 1 else torch.stack(parts)
    precision = _precision(entry, whole.dim(), whole.shape[-1], gguf_type)
    values: np.ndarray[Any, Any] = _gguf().quants.quantize(whole.float().numpy(), precision)
    return values


def _turned(weight: Tensor, heads: int) -> Tensor:
    """Rows of a rotary head from (half, half) to neighbours; `heads` 0 means a weight that is not rotated."""
    if not heads:
        return weight
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
