"""Write ``trl_schema.json`` from the fields of TRL's own dataclasses.

Run ``python -m training_ready.recipe.generate_schema`` after an upgrade of TRL or transformers; a test regenerates
the schema and fails with the difference. The only module of this room that imports trl.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import typing
from pathlib import Path
from typing import Any

from training_ready.recipe.kinds import Kind, kind_of

SCHEMA_FILE = Path(__file__).with_name("trl_schema.json")


def generate_schema() -> dict[str, Any]:
    """Every field of the four dataclasses that ``trl sft`` parses: group, types, choices, default, help."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    fields: dict[str, Any] = {}
    for group in (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig):
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.name in fields:
                raise ValueError(
                    f"{field.name} is a field of {fields[field.name]['group']} and of {group.__name__}"
                )
            fields[field.name] = {"group": group.__name__, **_describe(field, hints[field.name])}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers")}
    return {"generated_from": versions, "fields": fields}


def _describe(field: dataclasses.Field[Any], annotation: Any) -> dict[str, Any]:
    kind = kind_of(annotation)
    if field.metadata.get("choices"):
        kind = dataclasses.replace(kind, choices=tuple(field.metadata["choices"]))
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if default is dataclasses.MISSING:
        raise ValueError(f"{field.name} has no default; the recipe language expects one for every key of TRL")
    text = " ".join(str(field.metadata.get("help") or "").replace("%%", "%").split())
    return {**_plain(kind), "default": default, "help": text}


def _plain(kind: Kind) -> dict[str, Any]:
    found: dict[str, Any] = {"types": list(kind.types), "nullable": kind.nullable}
    if kind.choices is not None:
        found["choices"] = list(kind.choices)
    if kind.items is not None:
        found["items"] = _plain(kind.items)
    return found


def schema_text(schema: dict[str, Any]) -> str:
    """The schema as it is committed: two-space JSON, one final newline."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(generate_schema()), encoding="utf-8")
    print(f"wrote {SCHEMA_FILE}")
