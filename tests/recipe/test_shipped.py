"""The shipped recipes: all correct, listed, copied, and carried by a wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from training_ready import cli
from training_ready.recipe.faults import RecipeError
from training_ready.recipe.load import load_recipe
from training_ready.recipe.shipped import NotShipped, accelerate_config, copy_recipe, find_shipped, shipped

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_shipped_recipe_is_correct(path: Path) -> None:
    recipe = load_recipe(path, environment={})
    again = path.with_name(path.name)
    assert recipe == load_recipe(again, environment={})
    assert recipe.name
    if recipe.launch.accelerate_config is not None:
        assert accelerate_config(recipe.launch.accelerate_config).is_file()


def test_every_shipped_recipe_is_listed_with_a_line() -> None:
    listed = shipped()
    assert [one.path for one in listed] == RECIPES
    assert all(one.description for one in listed)


def test_ls_and_show_speak_to_machines() -> None:
    listed = json.loads(CliRunner().invoke(cli.app, ["recipe", "ls", "--json"]).stdout)
    assert [entry["name"] for entry in listed] == [path.stem for path in RECIPES]
    shown = CliRunner().invoke(cli.app, ["recipe", "show", str(RECIPES[0]), "max_steps=3", "--json"])
    found = json.loads(shown.stdout)
    recipe = load_recipe(RECIPES[0], ["max_steps=3"])
    assert found["sha256"] == recipe.sha256
    rows = {row["key"]: row for row in found["values"]}
    assert rows["max_steps"] == {"key": "max_steps", "value": 3, "origin": "command line"}
    assert rows["data.corpus"]["origin"].startswith(f"{RECIPES[0]}:")
    assert rows["output_dir"]["value"] == str(recipe.output_dir)


def test_show_prints_every_value_and_its_origin() -> None:
    shown = CliRunner().invoke(cli.app, ["recipe", "show", str(RECIPES[0]), "--all"]).stdout
    assert f"{RECIPES[0]}:" in shown
    assert "lr_scheduler_type" in shown
    assert "default" in shown


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_what_show_prints_reproduces_the_run_by_itself(path: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(f"extends: {path}\nenv: {{A: '${{HOME_OF_A:-x}}'}}\n")
    chosen = ["seed=5", "--learning_rate", "3e-5", "stream.lanes=1"]
    wanted = load_recipe(tmp_path / "base.yaml", chosen)
    shown = CliRunner().invoke(cli.app, ["recipe", "show", str(tmp_path / "base.yaml"), *chosen, "--yaml"])
    (tmp_path / "alone" / "other-name.yaml").parent.mkdir()
    (tmp_path / "alone" / "other-name.yaml").write_text(shown.stdout)
    alone = load_recipe(tmp_path / "alone" / "other-name.yaml")
    assert alone == wanted
    assert (alone.sha256, alone.output_dir, alone.env) == (wanted.sha256, wanted.output_dir, {"A": "x"})
    assert alone.resolved() == wanted.resolved()


def test_a_copy_is_a_correct_recipe_and_overwrites_nothing(tmp_path: Path) -> None:
    name = RECIPES[0].stem
    (written,) = copy_recipe(name, tmp_path)
    assert written == tmp_path / f"{name}.yaml"
    assert written.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert load_recipe(written).trl == load_recipe(RECIPES[0]).trl
    with pytest.raises(NotShipped, match="exists"):
        copy_recipe(name, tmp_path)


def test_names_that_are_not_shipped() -> None:
    with pytest.raises(NotShipped, match=f"did you mean `{RECIPES[0].stem}`"):
        find_shipped(RECIPES[0].stem + "x")
    with pytest.raises(NotShipped, match="there is no file"):
        accelerate_config("nowhere/fsdp2.yaml")


def test_a_topology_by_name_or_by_path(tmp_path: Path) -> None:
    by_name = accelerate_config("cpu")
    assert by_name == ROOT / "accelerate_configs" / "cpu.yaml"
    assert accelerate_config(str(by_name)) == by_name


def test_a_wheel_carries_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("recipes", "accelerate_configs", "deepspeed_configs"):
        shutil.copytree(ROOT / name, source / name)
    shutil.copytree(
        ROOT / "src" / "training_ready",
        source / "src" / "training_ready",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    build = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import training_ready; from training_ready.recipe.shipped import shipped, accelerate_config;"
        "from training_ready.recipe.load import load_recipe;"
        "print(training_ready.__file__); print([load_recipe(one.path).name for one in shipped()]);"
        "print(accelerate_config('zero3').name, [one.name for one in shipped('deepspeed_configs')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, recipes, launch = done.stdout.splitlines()
    assert where.startswith(str(site))
    assert recipes == str([path.stem for path in RECIPES])
    assert launch.startswith("zero3.yaml")
    assert "zero3_moe" in launch


def test_an_incomplete_copy_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("extends: not-copied.yaml\n")
    with pytest.raises(RecipeError, match=r"not-copied.yaml: no such file"):
        load_recipe(path)
