"""Do the same characters become the same tokens? tokenizer_config.json in the words of transformers 4.51.0.

tokenizer.json is the tokenizer and stays byte for byte; the named classes (LlamaTokenizer, GemmaTokenizer) would add
a BOS of their own in 4.51.0, so the file is always read by the class that adds nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training_ready.release.export import ExportError
from training_ready.release.targets.chat_template import normalise, taking_text

# As transformers 5 writes it.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KEPT = ("model_max_length", "padding_side", "truncation_side", "model_input_names")


def tgi_tokenizer(release: Path) -> dict[str, Any]:
    """tokenizer_config.json for TGI, chat template included. Rows 1 to 6.

    `eos_token` becomes the token that ends a turn, because two of TGI's three engines stop at nothing else; where the
    template writes `eos_token` it keeps what it was.

    Raises ExportError when a file is missing, when there is no chat template, or when it is not Jinja.
    """
    settings = read_json(release / "tokenizer_config.json")
    tokens = {token["id"]: token for token in read_json(release / "tokenizer.json")["added_tokens"]}
    special = {name: text(settings[name]) for name in SPECIAL if settings.get(name)}
    ends = read_json(release / "generation_config.json").get("eos_token_id")
    if not isinstance(ends, list) or not ends or ends[0] not in tokens:
        raise ExportError(
            f"{release / 'generation_config.json'}: eos_token_id is {ends}, and must be a list of special tokens whose "
            "first ends a turn; build the release again (training-ready release build)"
        )
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    names = list(extra.values()) if isinstance(extra, Mapping) else list(extra)
    return {
        **{key: settings[key] for key in _KEPT if key in settings},
        **special,
        "eos_token": tokens[ends[0]]["content"],
        "additional_special_tokens": [text(token) for token in names],
        "added_tokens_decoder": {
            str(number): {key: token[key] for key in token if key != "id"}
            for number, token in sorted(tokens.items())
        },
        "clean_up_tokenization_spaces": settings.get("clean_up_tokenization_spaces", False),
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": normalise(taking_text(chat_template(release), special), template_constants(special)),
    }


def template_constants(special: Mapping[str, str]) -> dict[str, str | None]:
    """Names that transformers gives to a template and TGI does not, or differently. A missing one prints nothing."""
    return {name: special.get(name) for name in SPECIAL if name != "bos_token" or name not in special}


def special_tokens_map(settings: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json, as transformers 4 wrote it beside tokenizer_config.json."""
    return {name: settings[name] for name in (*SPECIAL, "additional_special_tokens") if settings.get(name)}


def chat_template(release: Path) -> str:
    """The template of a release: chat_template.jinja, or the one in tokenizer_config.json."""
    path = release / "chat_template.jinja"
    template = (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else read_json(release / "tokenizer_config.json").get("chat_template")
    )
    if not isinstance(template, str) or not template:
        raise ExportError(
            f"{release} has no chat template; the one used in training must be released with the model"
        )
    return template


def text(token: Any) -> str:
    """The characters of a special token, which is a string or an object with `content`."""
    return str(token["content"] if isinstance(token, Mapping) else token)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ExportError when the file is missing or not a JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ExportError(f"{path} does not exist: {path.parent} is not a release") from error
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} holds no JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
