"""The house rules that a machine can check: who may enter which room, what a light import may pull in, file sizes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "training_ready"
MAY_IMPORT: dict[str, set[str]] = {
    "recipe": set(),
    "storage": set(),
    "corpus": {"storage"},
    "stream": {"storage", "corpus"},
    "moe": set(),
    "training": {"recipe", "stream", "moe", "storage", "corpus"},
    "release": {"storage", "moe", "recipe"},
    "serving": {"release", "corpus"},
    "platforms": {"recipe", "storage"},
}
LIGHT = [
    "training_ready",
    "training_ready.cli",
    "training_ready.recipe.load",
    "training_ready.storage.objects",
]
LIGHT += ["training_ready.corpus.build", "training_ready.corpus.manifest", "training_ready.platforms.ovh"]


def rooms_imported_by(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        rooms |= {name.split(".")[1] for name in names if name.startswith("training_ready.")}
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_arrow_runs_backwards(room: str) -> None:
    files = [*(PACKAGE / room).rglob("*.py")]
    assert files
    for file in files:
        strangers = rooms_imported_by(file) - MAY_IMPORT[room] - {room}
        # A command may read the recipe that its user names.
        if file.name == "commands.py":
            strangers -= {"recipe"}
        assert not strangers, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(strangers))}"


def test_only_the_front_door_and_scripts_enter_check() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "check" and file.name != "cli.py":
            assert "check" not in rooms_imported_by(file), file


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_import_stays_light(module: str) -> None:
    heavy = ("torch", "transformers", "trl", "datasets", "matplotlib")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_no_file_answers_everything() -> None:
    long = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {str(file): lines for file, lines in long.items() if lines > 400} == {}


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "manager"])
def test_no_file_without_a_question(name: str) -> None:
    assert not [file for file in PACKAGE.rglob("*.py") if name in file.stem or file.stem.startswith("base_")]
