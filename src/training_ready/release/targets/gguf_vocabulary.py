"""Do the same characters become the same tokens in llama.cpp? A byte-level BPE as GGUF describes it.

llama.cpp has the pre-tokenizer's regular expression in its own code and knows it by a name, so only expressions with
such a name can be written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training_ready.release.targets.table import refuse
from training_ready.release.targets.tokenizer_files import read_json, text

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NAMES = {
    _CONTRACTIONS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"|\p{N}" + _REST: "qwen2",
}


def add_vocabulary(writer: Any, release: Path, target: str) -> None:
    """Tokens, merges, kinds and special ids of `release` into a GGUF writer.

    Raises ExportError for a tokenizer that is not a byte-level BPE with a pre-tokenizer known to llama.cpp.
    """
    from gguf import TokenType
    from tokenizers import Tokenizer

    content = read_json(release / "tokenizer.json")
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or content.get("normalizer"):
        reason = "only byte-level BPE without a normalizer is written to GGUF here"
        raise refuse(target, f"a {model.get('type')} tokenizer", reason, "vllm")
    added = {token["id"]: token for token in content["added_tokens"]}
    size = read_json(release / "config.json")["vocab_size"]
    tokens = {number: name for name, number in model["vocab"].items()}
    tokens |= {number: token["content"] for number, token in added.items()}
    names, kinds = [], []
    for number in range(size):
        unused = number not in tokens
        names.append(f"[PAD{number}]" if unused else tokens[number])
        control = TokenType.CONTROL if added.get(number, {}).get("special") else TokenType.USER_DEFINED
        kinds.append(TokenType.UNUSED if unused else control if number in added else TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(content.get("pre_tokenizer"), target))
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    tokenizer = Tokenizer.from_file(str(release / "tokenizer.json"))
    plain, framed = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next((place for place in range(len(framed)) if framed[place : place + len(plain)] == plain), 0)
    writer.add_add_bos_token(at > 0)
    writer.add_add_eos_token(len(framed) > at + len(plain))
    _add_special_ids(writer, release, {str(token["content"]): number for number, token in added.items()})


def _add_special_ids(writer: Any, release: Path, numbers: Mapping[str, int]) -> None:
    settings = read_json(release / "tokenizer_config.json")
    ends = read_json(release / "generation_config.json")["eos_token_id"]
    writer.add_eos_token_id(ends[0])
    writer.add_eot_token_id(ends[0])
    for name in ("bos", "unk", "pad"):
        token = settings.get(f"{name}_token")
        number = numbers.get(text(token)) if token else None
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)


def _pre_tokenizer(content: Mapping[str, Any] | None, target: str) -> str:
    steps = list((content or {}).get("pretokenizers") or ([content] if content else []))
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name = _NAMES.get(steps[0]["pattern"].get("Regex", ""))
        if name:
            return name
    reason = f"llama.cpp has no name for the pre-tokenizer {json.dumps(content, ensure_ascii=False)[:120]}"
    raise refuse(target, "this tokenizer", reason, "vllm")
