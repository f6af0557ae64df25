"""What is committed is what is generated: TRL's keys, the page of documentation, the schema for editors."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from training_ready.recipe import docs_page
from training_ready.recipe.json_schema import json_schema, schema_text
from training_ready.recipe.kinds import Mismatch, coerce
from training_ready.recipe.load import load_recipe
from training_ready.recipe.trl_keys import RANGES, SCHEMA_FILE, trl_keys
from training_ready.recipe.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def test_the_committed_keys_are_those_of_the_installed_trl() -> None:
    code = (
        "from training_ready.recipe.generate_schema import *; print(schema_text(generate_schema()), end='')"
    )
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    committed = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["fields"]
    old, new = (
        json.dumps(fields, indent=1).splitlines() for fields in (committed, json.loads(fresh)["fields"])
    )
    difference = "\n".join(difflib.unified_diff(old, new, "committed", "installed TRL", lineterm=""))
    assert not difference, f"run `python -m training_ready.recipe.generate_schema`:\n{difference}"


def test_every_default_of_trl_is_of_its_own_kind_and_range() -> None:
    for name, key in trl_keys().items():
        if key.default is None:
            assert key.kind.nullable, name
            continue
        tree, _ = read_yaml(json.dumps({"value": key.default}), "default")
        try:
            value = coerce(tree.entries["value"], key.kind)
        except Mismatch as mismatch:
            pytest.fail(f"{name}: {key.default!r} {mismatch.message}")
        assert value == key.default, name
        if name in RANGES and isinstance(value, int | float):
            assert RANGES[name].holds(key.default), name


def test_every_range_is_of_a_key() -> None:
    assert RANGES.keys() <= trl_keys().keys()


def test_the_page_is_generated_from_the_schema() -> None:
    committed = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    difference = "\n".join(
        difflib.unified_diff(
            committed.splitlines(), docs_page.page().splitlines(), "committed", "schema", lineterm=""
        )
    )
    assert not difference, f"run `python -m training_ready.recipe.docs_page > docs/recipes.md`:\n{difference}"


def test_the_schema_beside_the_recipes_is_the_generated_one() -> None:
    committed = (ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run `training-ready recipe schema > recipes/recipe.schema.json`"


def test_every_command_of_the_page_works(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text("model_name_or_path: m\ndataset_name: s\ntorch_dtype: auto\n")
    program = shutil.which("training-ready", path=str(Path(sys.executable).parent))
    assert program, "the package is not installed beside this Python"
    blocks = re.findall(r"```sh\n(.*?)```", docs_page.page(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line]
    assert len(commands) >= 5
    for command in commands:
        line = command.replace("training-ready", program, 1)
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    assert load_recipe(tmp_path / "my-run.yaml").name == "my-run"


# --------------------------------------------------------------------------- the schema for editors
@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_shipped_recipe_fits_it(validator: Any, path: Path) -> None:
    errors = list(validator.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8"))))
    assert not errors


@pytest.mark.parametrize(
    "document",
    [
        {"learning_rte": 1},
        {"data": {"corpsu": "x"}},
        {"packing_strategy": "ffd"},
        {"max_length": "long"},
        {"num_train_epochs": -1},
        {"launch": {"ovh": {"gpus": 0}}},
        {"env": {"A": [1]}},
        {"dataset_name": "x"},
        {"hub_token": "x"},
    ],
)
def test_mistakes_do_not_fit_it(validator: Any, document: dict[str, Any]) -> None:
    assert list(validator.iter_errors(document))


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"extends": ["a.yaml"], "max_steps": "${STEPS}", "budget": {"max_hours": "${HOURS}"}},
        {"lora_target_modules": "all-linear", "max_length": None, "run_name": 7},
        {"launch": {"ovh": None}},
    ],
)
def test_what_is_allowed_fits_it(validator: Any, document: dict[str, Any]) -> None:
    assert not list(validator.iter_errors(document))


def test_every_key_has_help(validator: Any) -> None:
    schema = validator.schema["properties"]
    assert all(schema[name].get("description") for name in schema if name not in ("debug",)), schema
