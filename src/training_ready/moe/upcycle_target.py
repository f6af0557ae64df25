"""Which mixture of experts holds this dense model exactly, and under which names?

Mixtral is a Llama or Mistral layer whose feed-forward is routed; Qwen3-MoE is a Qwen3 layer with the same
change. Everything else has to be carried over unchanged, because the defaults differ: MistralConfig has an
``rms_norm_eps`` of 1e-6, MixtralConfig 1e-5. What a target cannot hold is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from training_ready.moe.families import MoEError

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_CARRIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_dropout",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
_PROJECTION = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate_proj|up_proj|down_proj)\.weight")
_DROPPED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Written by old versions of transformers, computed by every new one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Names of one mixture-of-experts checkpoint on disk, as serving engines read them."""

    model_type: str
    config_class: type[PreTrainedConfig]
    block: str
    projections: Mapping[str, str]
    """Dense projection to its name within an expert."""

    def router(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}.gate.weight"

    def expert(self, layer: int, expert: int, projection: str) -> str:
        name = self.projections[projection]
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{name}.weight"


MIXTRAL = Target(
    model_type="mixtral",
    config_class=MixtralConfig,
    block="block_sparse_moe",
    projections={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
)
QWEN3_MOE = Target(
    model_type="qwen3_moe",
    config_class=Qwen3MoeConfig,
    block="mlp",
    projections={name: name for name in PROJECTIONS},
)
TARGETS: Mapping[str, Target] = {"llama": MIXTRAL, "mistral": MIXTRAL, "qwen3": QWEN3_MOE}
"""Model type of the dense source to its target."""


def target_of(config: Any) -> Target:
    """The target that holds a dense model of this configuration exactly.

    Raises :class:`MoEError` with the reason when there is none.
    """
    model_type = str(getattr(config, "model_type", "") or "")
    target = TARGETS.get(model_type)
    if target is None:
        raise MoEError(
            f"model_type {model_type!r} cannot be upcycled: a target that holds it exactly is known for "
            f"{', '.join(sorted(TARGETS))} only."
        )
    reasons = _obstacles(config, target)
    if reasons:
        raise MoEError(f"this {model_type} does not fit into {target.model_type}: {'; '.join(reasons)}.")
    return target


def _obstacles(config: Any, target: Target) -> list[str]:
    found = []
    if getattr(config, "quantization_config", None):
        found.append("it is quantised, upcycle the unquantised weights")
    if target is MIXTRAL and getattr(config, "attention_bias", False):
        found.append("attention_bias=True, its attention has no biases")
    if getattr(config, "mlp_bias", False):
        found.append("mlp_bias=True, its experts have no biases")
    if target is QWEN3_MOE and "sliding_attention" in (getattr(config, "layer_types", None) or []):
        found.append("some layers attend to a sliding window, it knows one window for all layers or none")
    return found


def target_config(config: Any, *, experts: int, top_k: int) -> PreTrainedConfig:
    """The configuration of ``experts`` experts, ``top_k`` per token, that computes as the dense model does.

    Raises :class:`MoEError` for a source that does not fit and for a router that could not learn.
    """
    target = target_of(config)
    if not 2 <= top_k <= experts:
        reason = (
            "with one expert per token its weight, renormalised, is the constant 1: the router would get no "
            "gradient"
            if top_k == 1
            else f"2 <= top_k <= experts is needed, not top_k={top_k} of {experts}"
        )
        raise MoEError(f"{target.model_type} with top_k={top_k} of {experts} experts: {reason}.")
    values = {name: getattr(config, name, None) for name in _CARRIED}
    values |= {"num_experts_per_tok": top_k, "router_aux_loss_coef": 0.001}
    if target is MIXTRAL:
        values |= {"num_local_experts": experts, "sliding_window": getattr(config, "sliding_window", None)}
    else:
        values |= {
            "num_experts": experts,
            "norm_topk_prob": True,  # routed weights sum to one, or the copies would not add up to the source
            "moe_intermediate_size": config.intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "attention_bias": config.attention_bias,
        }
    built = target.config_class(**values)
    built.architectures = [
        {"mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[target.model_type]
    ]
    return built


def expected_names(config: Any) -> list[str]:
    """Every tensor of the dense checkpoint, the output head left out where it is tied.

    The configuration may be the dense model's or its target's.
    """
    attention = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    if getattr(config, "attention_bias", False):
        attention += [f"self_attn.{name}_proj.bias" for name in "qkvo"]
    if config.model_type in ("qwen3", "qwen3_moe"):
        attention += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    parts = [
        *attention,
        *(f"mlp.{name}.weight" for name in PROJECTIONS),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ]
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if config.tie_word_embeddings else ["lm_head.weight"]
    return names + [
        f"model.layers.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in parts
    ]


def check_names(config: Any, names: Iterable[str], where: str) -> None:
    """Raises :class:`MoEError` when a checkpoint lacks a tensor or holds one that would be lost."""
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    found = {name for name in names if not _DROPPED.fullmatch(name)} - tied
    expected = set(expected_names(config))
    for problem, unmatched in (("lacks", expected - found), ("also holds", found - expected)):
        if unmatched:
            raise MoEError(f"{where}: the checkpoint {problem} {_some(sorted(unmatched))}.")


def carried(name: str, config: Any) -> bool:
    """Does this tensor of the dense checkpoint go into the target unchanged?"""
    if _DROPPED.fullmatch(name) or (name == "lm_head.weight" and config.tie_word_embeddings):
        return False
    return dense_projection(name) is None


def dense_projection(name: str) -> tuple[int, str] | None:
    """(Layer, projection) of a feed-forward weight, None for every other tensor."""
    match = _PROJECTION.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
