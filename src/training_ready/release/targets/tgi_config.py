"""What does TGI 3.3.7 read in config.json? The configuration of transformers 5 in the words of 4.51.0.

The numbers in the comments are the rows of the table in docs/release_targets.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training_ready.release.targets.table import TGI_ROPE, Served, refuse, tgi_row
from training_ready.release.targets.weights import (
    Change,
    expert_by_expert,
    padded_theta,
    untied,
    zero_padded_heads,
)


def tgi_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[Change]]:
    """The configuration for TGI and what has to happen to the weights for it.

    Raises ExportError naming what TGI would get wrong, silently or not.
    """
    row = tgi_row(config)
    written = {key: value for key, value in config.items() if key != "dtype"}
    if "dtype" in config:
        written["torch_dtype"] = config["dtype"]  # 8
    _flatten_rope(written)
    _sliding_layers(written)
    if written["model_type"] == "deepseek_v2":
        _deepseek(written)
    if written["model_type"] == "starcoder2":  # 12
        written.setdefault("mlp_type", "default")
        written.setdefault("norm_type", "layer_norm")
    changes = [expert_by_expert(written["model_type"])]
    if row.needs_lm_head and config.get("tie_word_embeddings"):  # 16
        written["tie_word_embeddings"] = False
        changes.append(untied)
    return written, [*changes, *_head_dim(written, row)]


def _head_dim(config: dict[str, Any], row: Served) -> list[Change]:
    """TGI takes hidden/heads as the size of a head for most architectures: widen narrower heads, or refuse. (11, 17)"""
    old = config.get("head_dim")
    if not old:
        config.pop("head_dim", None)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if row.own_head_dim or not old or not heads or not hidden or old * heads == hidden:
        return []
    new, rest = divmod(hidden, heads)
    fits = row.pads_heads and not rest and old < new and old % 2 == new % 2 == 0
    scaling = (config.get("rope_scaling") or {}).get("type", "default")
    if not fits or scaling not in ("default", "llama3") or config.get("attention_bias"):
        raise refuse(
            "tgi",
            f"{config['model_type']} with head_dim {old}",
            f"TGI computes with hidden/heads = {hidden}/{heads} = {hidden / heads:g}, and only narrower heads of llama "
            "and mixtral, without bias and with rope_type default or llama3, can be widened exactly",
            "vllm",
        )
    del config["head_dim"]
    config["rope_theta"] = padded_theta(config["rope_theta"], old=old, new=new)
    key_value_heads = config.get("num_key_value_heads") or heads
    return [zero_padded_heads(heads=heads, key_value_heads=key_value_heads, old=old, new=new)]


def _flatten_rope(config: dict[str, Any]) -> None:
    """`rope_parameters` as `rope_theta` and `rope_scaling`; Gemma's two kinds of layers as two thetas. (7, 18)"""
    rope = config.pop("rope_parameters", None)
    if rope is None:
        return
    family = config["model_type"]
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or rope["full_attention"]
        if _kind(local) != "default":
            raise _refused_rope(family, f"{_kind(local)} on its sliding layers")
        config["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    if _kind(rope) not in TGI_ROPE:
        raise _refused_rope(family, _kind(rope))
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    config["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    config["rope_scaling"] = None if _kind(rope) == "default" else {**rest, "type": _kind(rope)}


def _sliding_layers(config: dict[str, Any]) -> None:
    """`layer_types` in the words of 4.51.0: Gemma counts to its next full layer, others slide everywhere or nowhere."""
    kinds = config.get("layer_types")
    if not kinds or "chunked_attention" in kinds:
        return
    family, sliding = config["model_type"], [kind == "sliding_attention" for kind in kinds]
    if family == "gemma3_text":
        pattern = sliding.index(False) + 1 if False in sliding else len(sliding) + 1
        config["sliding_window_pattern"] = pattern
        if sliding == [bool(layer % pattern) for layer in range(1, len(sliding) + 1)]:
            return
    elif not any(sliding):
        return
    raise refuse(
        "tgi", f"{family} with these layer_types", "TGI has no words for which of them slide", "vllm"
    )


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", "default"))


def _refused_rope(family: str, kind: str) -> Exception:
    reason = "TGI ignores it without a word" if kind == "linear" else "nobody compared TGI's logits with it"
    return refuse("tgi", f"{family} with rope_type {kind}", reason, "vllm")


def _deepseek(config: dict[str, Any]) -> None:
    if config.get("rope_scaling") is None:  # 13
        length = config["max_position_embeddings"]
        identity = {
            "factor": 1.0,
            "original_max_position_embeddings": length,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
        config["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **identity}
    config["qk_nope_dim"], config["qk_rope_dim"] = (
        config["qk_nope_head_dim"],
        config["qk_rope_head_dim"],
    )  # 14
