"""``launch ovh`` as a person types it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from training_ready.platforms.commands import launch_ovh
from training_ready.platforms.ovh import PlatformError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("ovh")(launch_ovh)
    app.callback()(lambda: None)
    return app


def test_print_is_valid_yaml_and_carries_the_overrides(app: typer.Typer, checkout: Path) -> None:
    result = CliRunner().invoke(app, ["ovh", "recipes/two.yaml", "seed=7", "learning_rate=1e-5", "--print"])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout)["command"][-2:] == ["seed=7", "learning_rate=1e-5"]
    assert result.stdout.splitlines()[-1].startswith("# ovhai job run ")


def test_json_holds_spec_endpoint_and_line(app: typer.Typer, checkout: Path) -> None:
    result = CliRunner().invoke(app, ["ovh", "recipes/two.yaml", "--print", "--json"])
    found = json.loads(result.stdout)
    assert set(found) == {"spec", "endpoint", "command_line"}
    assert found["spec"]["resources"] == {"gpu": 2, "flavor": "l40s-1-gpu"}


def test_without_print_nothing_is_started(app: typer.Typer, checkout: Path) -> None:
    result = CliRunner().invoke(app, ["ovh", "recipes/two.yaml"])
    assert result.exit_code == 1
    assert isinstance(result.exception, PlatformError)
    assert "launching is not built yet" in str(result.exception)
    assert "--print" in str(result.exception)
    assert result.stdout == ""


PRINTED = [
    (file, line)
    for file in ("docs/launch.md", "recipes/sft.yaml", "recipes/moe.yaml")
    for line in re.findall(
        r"training-ready launch (ovh .*)$", (REPOSITORY / file).read_text("utf-8"), re.MULTILINE
    )
]


def test_the_page_and_both_recipes_print_commands() -> None:
    assert {file for file, _ in PRINTED} == {"docs/launch.md", "recipes/sft.yaml", "recipes/moe.yaml"}


@pytest.mark.parametrize(("file", "line"), PRINTED)
def test_printed_commands_render(
    app: typer.Typer, file: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(line)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = yaml.safe_load(result.stdout)  # JSON is YAML too
    spec = found["spec"] if "--json" in words else found
    gpus = spec["command"][spec["command"].index("--num_processes") + 1]
    assert spec["resources"] == {"gpu": int(gpus), "flavor": "h100-1-gpu"}
