"""Write ``docs/recipes.md`` from the schema: ``python -m training_ready.recipe.docs_page > docs/recipes.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from training_ready.recipe.confidential import is_secret_name
from training_ready.recipe.kinds import kind_of
from training_ready.recipe.sections import SECTIONS
from training_ready.recipe.trl_keys import CORPUS_INSTEAD, RANGES, trl_keys
from training_ready.recipe.typed import nested_section

_INTRODUCTION = """\
# Recipes

A recipe is one YAML file and describes one run. TRL's own keys stand at the top level with TRL's names and meaning;
our sections stand beside them. Reading a recipe needs no GPU, no torch and no network, and reports every mistake at
once with its file and line.

This page is generated: `python -m training_ready.recipe.docs_page > docs/recipes.md`.

## First steps

```sh
training-ready recipe ls
training-ready recipe cp sft my-run.yaml
training-ready recipe show my-run.yaml max_steps=10
training-ready recipe schema > recipe.schema.json
```

`recipe cp` also writes the schema beside the copy, and the copy names it in its first line: an editor with a YAML
language server then completes keys and shows the help below.

## The language

**Base recipes.** `extends: base.yaml`, or a list in which later files win. Paths are relative to the file that names
them. Mappings merge key by key; lists and values are replaced. `null` over an inherited value returns the key to its
default.

**Command line.** `key=value`, `section.key=value`, `release.tags[0]=value`, `--key value`, `--key=value`, or `--flag`
for true; lists and mappings as YAML: `report_to='[tensorboard]'`. The command line wins over every file.

**Environment.** `${NAME}` and `${NAME:-otherwise}` read the environment of the command; `$${` stands for the two
characters. The section `env:` names variables that are set for the run.

**Values.** The type of the key decides what a value is: `eval_strategy: no` is the word, `packing: no` the boolean;
`2e-5` and `1_000` are numbers. Inside free mappings (`model.config`, `model_init_kwargs`) there is no type to decide,
so `yes`, `no`, `on` and `off` need quotes or `true`/`false`. A key twice, a YAML tag or a merge key is a mistake.

**Secrets.** A recipe is saved beside every checkpoint and printed in the model card. A key named like a secret, or a
value that looks like one, is refused; tokens and passwords come from the environment.

**The name.** A run is called `run_name`, else the last part of `output_dir`, else like its file. `output_dir` is
`runs/<name>` unless set. Every other default is TRL's.

**The resolved recipe.** `training-ready recipe show RECIPE --yaml` prints what a run saves beside its checkpoints: one
file without bases, references or command line, which alone describes the same run.

## Older recipes

```sh
training-ready recipe migrate old.yaml --corpus final_dataset/therapeutic/manifest.json
```

translates recipes of alignment-handbook, open-r1 and older TRL, lists every change with its meaning, and refuses what
it cannot keep exactly; `--drop KEY` leaves a key out on purpose. Datasets are not translated: a built corpus takes
their place, and the list of changes says what it has to hold. `push_to_hub` and `hub_model_id` become
`release.repo_id`, where `training-ready release publish` pushes to after the run. Without `assistant_only_loss: true`
TRL learned every token; here only the turns of `data.target_role` are learned, and the list says so.
"""


def page() -> str:
    """The whole page."""
    parts = [_INTRODUCTION, "## Our sections\n"]
    for name, model in SECTIONS.items():
        required = ": required" if name == "data" else ""
        parts.append(f"### `{name}`{required}\n\n{model.__doc__}\n")
        parts.append(_table(("key", "value", "default", "meaning"), _section_rows(name, model)))
    parts.append("## TRL's keys\n")
    versions = "Names, values and defaults are those of TRL's dataclasses; their help is in the schema."
    instead = ", ".join(f"`{name}`" for name in trl_keys() if name in CORPUS_INSTEAD)
    parts.append(f"{versions} Not supported, because `data.corpus` takes their place: {instead}.\n")
    for group in dict.fromkeys(key.group for key in trl_keys().values()):
        rows = list(_trl_rows(group))
        if rows:
            parts += [f"### {group}\n", _table(("key", "value", "default"), rows)]
    return "\n".join(parts)


def _section_rows(path: str, model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        nested = nested_section(field.annotation)
        default = "required" if field.default is PydanticUndefined else _value(field.default)
        kind = kind_of(field.annotation)
        bounds = [f"{_SIGNS[key]} {value:g}" for item in field.metadata for key, value in _bounds(item)]
        words = " ".join([replace(kind, nullable=False).describe(), *bounds]) + (
            " or null" if kind.nullable else ""
        )
        yield f"`{path}.{name}`", words, default, field.description or ""
        if nested is not None:
            yield from _section_rows(f"{path}.{name}", nested)


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _bounds(item: Any) -> Iterator[tuple[str, float]]:
    for key in _SIGNS:
        if hasattr(item, key):
            yield key, getattr(item, key)


def _trl_rows(group: str) -> Iterator[tuple[str, ...]]:
    for name, key in trl_keys().items():
        if key.group != group or name in CORPUS_INSTEAD or is_secret_name(name):
            continue
        bounds = f" ({RANGES[name].describe()})" if name in RANGES else ""
        yield f"`{name}`", key.kind.describe() + bounds, _value(key.default)


def _value(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _table(headings: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(headings) + " |", "| " + " | ".join("---" for _ in headings) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
