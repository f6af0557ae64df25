"""Which engine serves which architecture faithfully? One row per architecture, one column per target.

For TGI the rows are what its own modules computed from an export of tiny random models, compared with the trained
logits; the row "others" and every refusal name the target that can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training_ready.release.export import ExportError

TARGETS = ("hf", "vllm", "tgi", "gguf", "ollama", "adapter")
TGI_VERSION = "3.3.7"


@dataclass(kw_only=True, slots=True, frozen=True)
class Served:
    """How TGI serves an architecture: the limit of max |Δlogit| in fp32, and what its modules make of settings."""

    limit: float = 0.0
    pads_heads: bool = False
    """A head_dim below hidden/heads can be widened with zeros."""
    own_head_dim: bool = False
    """head_dim is read from config.json; otherwise it must be hidden/heads."""
    needs_lm_head: bool = False
    """The output head must be a tensor of its own, even when it equals the embedding."""


TGI_SERVES: Mapping[str, Served] = {
    "llama": Served(pads_heads=True),
    "mistral": Served(own_head_dim=True, needs_lm_head=True),
    "qwen2": Served(),
    "qwen3": Served(own_head_dim=True),
    "mixtral": Served(pads_heads=True, needs_lm_head=True),
    "phi3": Served(),
    "gemma3_text": Served(own_head_dim=True),
    "granite": Served(),
    "starcoder2": Served(),
    "cohere": Served(limit=1e-5),
    "deepseek_v2": Served(limit=1e-5, own_head_dim=True, needs_lm_head=True),
    "llama4_text": Served(limit=1e-5, own_head_dim=True),
}

_SLOW = "TGI falls back to its padding code for it: one GPU, no sharding, no paged attention"
TGI_REFUSES: Mapping[str, str] = {
    "qwen2_moe": _SLOW,
    "olmoe": _SLOW,
    "granitemoe": _SLOW,
    "jetmoe": _SLOW,
    "gpt2": _SLOW,
    "qwen3_moe": "its layers lose their arguments in transformers 4.51.0 and the server dies at warm-up",
    "phimoe": "TGI routes with softmax top-k where the model was trained with sparsemixer (33 % argmax agreement)",
    "deepseek_v3": "TGI never applies routed_scaling_factor and zeroes e_score_correction_bias",
    "gemma2": "the soft cap of attention differs between its attention kernels (93 % argmax agreement)",
    "dbrx": "its configuration as transformers 5 writes it is rejected, and it is obsolete",
    "gpt_oss": "TGI does not know this architecture",
}
# TGI applies these scalings to llama as trained; "linear" it ignores without a word, others were never compared.
TGI_ROPE = ("default", "llama3", "yarn", "dynamic")

GGUF_SERVES = ("llama", "mixtral")


def refuse(target: str, what: str, reason: str, nearest: str) -> ExportError:
    """The one form of a refusal: what, why, and where to go."""
    return ExportError(
        f"{target} cannot serve {what} faithfully: {reason}. Nearest target that can: {nearest}."
    )


def tgi_row(config: Mapping[str, Any]) -> Served:
    """How TGI serves this configuration. Raises ExportError when it does not, or not faithfully."""
    family = str(config.get("model_type"))
    row = TGI_SERVES.get(family)
    if row is None:
        reason = TGI_REFUSES.get(family, f"TGI {TGI_VERSION} is frozen and nobody compared its logits")
        raise refuse("tgi", family, reason, "vllm")
    return row


def gguf_row(config: Mapping[str, Any], target: str) -> str:
    """The architecture's name in GGUF. Raises ExportError for one that the writer does not cover."""
    family = str(config.get("model_type"))
    if family not in GGUF_SERVES:
        raise refuse(target, family, f"only {' and '.join(GGUF_SERVES)} are written to GGUF here", "vllm")
    return "llama"  # llama.cpp runs Mixtral as a llama with expert_count
