"""The recipe language as a JSON Schema, so that an editor completes keys, shows help and marks mistakes."""

from __future__ import annotations

import json
from typing import Any

from training_ready.recipe.confidential import is_secret_name
from training_ready.recipe.kinds import Kind
from training_ready.recipe.sections import SECTIONS
from training_ready.recipe.trl_keys import CORPUS_INSTEAD, RANGES, Range, TrlKey, trl_keys

_REFERENCE = {"type": "string", "pattern": r"\$\{"}
_TYPES: dict[str, dict[str, Any]] = {
    "str": {
        "type": ["string", "number", "boolean"]
    },  # plain YAML text is read as a number or boolean by editors
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "mapping": {"type": "object"},
    "list": {"type": "array"},
}


def json_schema() -> dict[str, Any]:
    """The schema of a recipe file: TRL's keys, our sections, ``env`` and ``extends``."""
    properties: dict[str, Any] = {
        "extends": {
            "description": "A recipe, or a list of recipes, that this one changes; relative to this file.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        "env": {
            "description": "Environment variables of the run; never secrets.",
            "type": "object",
            "additionalProperties": {"type": ["string", "number", "boolean"]},
        },
    }
    for name, model in SECTIONS.items():
        section = model.model_json_schema()
        definitions = section.pop("$defs", {})
        properties[name] = _relaxed(_inlined(section, definitions))
    for name, key in trl_keys().items():
        if name not in CORPUS_INSTEAD and not is_secret_name(name):
            properties[name] = _trl_property(key)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Training Ready recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def schema_text() -> str:
    """The schema as a file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _trl_property(key: TrlKey) -> dict[str, Any]:
    alternatives = _alternatives(key.kind, RANGES.get(key.name))
    found: dict[str, Any] = {"description": f"{key.help} ({key.group})".strip(), "anyOf": alternatives}
    if key.default is not None:
        found["default"] = key.default
    return found


def _alternatives(kind: Kind, bounds: Range | None) -> list[dict[str, Any]]:
    if kind.choices is not None:
        found: list[dict[str, Any]] = [{"enum": list(kind.choices)}]
    else:
        found = [_bounded(dict(_TYPES[name]), kind, bounds) for name in kind.types if name in _TYPES] or [{}]
    if kind.types == ("list",):
        found.append({"type": "string"})  # one word stands for a list of one
    if kind.nullable:
        found.append({"type": "null"})
    return [*found, _REFERENCE]


def _bounded(schema: dict[str, Any], kind: Kind, bounds: Range | None) -> dict[str, Any]:
    if schema["type"] == "array" and kind.items is not None:
        schema["items"] = {"anyOf": _alternatives(kind.items, None)}
    if bounds is not None and schema["type"] in ("integer", "number") and not bounds.also:
        names = {"minimum": bounds.least, "exclusiveMinimum": bounds.above}
        names |= {"maximum": bounds.most, "exclusiveMaximum": bounds.below}
        schema |= {name: bound for name, bound in names.items() if bound is not None}
    return schema


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with every ``$ref`` replaced by what it names."""
    if isinstance(schema, list):
        return [_inlined(child, definitions) for child in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        rest = {name: child for name, child in schema.items() if name != "$ref"}
        return {**_inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions), **rest}
    return {name: _inlined(child, definitions) for name, child in schema.items()}


def _relaxed(schema: Any) -> Any:
    """Without titles and required keys (a base may give them), and with ``${NAME}`` allowed for every value."""
    if isinstance(schema, list):
        return [_relaxed(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: _relaxed(child) for name, child in schema.items() if name not in ("title", "required")}
    if found.get("type") in ("integer", "number", "boolean") or "enum" in found:
        kept = {name: found.pop(name) for name in ("description", "default") if name in found}
        return {**kept, "anyOf": [found, _REFERENCE]}
    return found
