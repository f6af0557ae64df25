"""Is this model card's metadata something a hub accepts? The YAML block at the top of a README.md."""

from __future__ import annotations

import json
from typing import Any

import yaml


def _split(text: str) -> tuple[str, str]:
    """(metadata, body) of a card; no metadata where it does not start with a closed `---` block."""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in [line.strip() for line in lines[1:]]:
        return "", text
    end = next(index for index, line in enumerate(lines[1:], start=1) if line.strip() == "---")
    return "\n".join(lines[1:end]), "\n".join(lines[end + 1 :])


def card_body(text: str) -> str:
    """The Markdown below the metadata."""
    return _split(text)[1]


def card_metadata(text: str) -> dict[str, Any]:
    """The YAML block at the top of a card as JSON has it (a date is text); {} when there is none.

    Raises ValueError when it is not valid.
    """
    block = _split(text)[0]
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(block)):
            raise ValueError("the metadata uses YAML aliases, which can grow without bound; write values out")
        metadata = yaml.safe_load(block)
    except (yaml.YAMLError, LookupError, AttributeError, RecursionError) as error:  # PyYAML raises any
        raise ValueError(f"the metadata is not YAML: {error}") from error
    if not isinstance(metadata, dict | None):
        raise ValueError(f"the metadata must be a mapping, not {type(metadata).__name__}")
    for key, kinds in _CARD_KEYS.items():
        value = (metadata or {}).get(key)
        if value is not None and not _fits(value, kinds):
            raise ValueError(f"{key!r} must be {' or '.join(kinds)}, not {type(value).__name__}")
    try:
        data = json.dumps(metadata or {}, default=str, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:  # an infinite number, a list as a key, half a character
        raise ValueError(f"the metadata cannot be said in JSON: {error}") from error
    said: dict[str, Any] = json.loads(data)
    return said


_CARD_KEYS = {
    "license": ("a text", "a list of texts"),
    "language": ("a text", "a list of texts"),
    "base_model": ("a text", "a list of texts"),
    "datasets": ("a text", "a list of texts"),
    "tags": ("a list of texts",),
    "library_name": ("a text",),
    "pipeline_tag": ("a text",),
    "model_name": ("a text",),
}


def _fits(value: object, kinds: tuple[str, ...]) -> bool:
    if isinstance(value, str):
        return "a text" in kinds
    return (
        "a list of texts" in kinds
        and isinstance(value, list)
        and all(isinstance(item, str) for item in value)
    )
