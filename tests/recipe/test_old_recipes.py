"""Every published recipe of alignment-handbook and open-r1 migrates, nothing lost, or is refused for its own keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from training_ready.recipe.faults import RecipeError
from training_ready.recipe.legacy import NOT_READ
from training_ready.recipe.legacy_rules import SPECIAL
from training_ready.recipe.load import load_recipe
from training_ready.recipe.migrate import Migration, migrate
from training_ready.training.elsewhere import ELSEWHERE, unread

from .old_recipes import RECIPES

CORPUS = "final_dataset/x/manifest.json"
MIGRATES = [name for name, (_, refused) in RECIPES.items() if not refused]
REFUSED = [name for name, (_, refused) in RECIPES.items() if refused]

# What TRL 1.16 calls it, where that is not its old name.
NOW = {
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "use_liger": "use_liger_kernel",
}


def run(folder: Path, name: str) -> Migration:
    path = folder / "old.yaml"
    path.write_text(RECIPES[name][0], encoding="utf-8")
    return migrate(path, corpus=CORPUS, output=folder / "new.yaml")


def means(key: str, value: Any, trl: Mapping[str, Any]) -> bool:
    """Whether the new recipe says of the old key what it said."""
    if key == "learning_rate":
        value = float(value)
    return bool(trl.get(NOW.get(key, key)) == value)


def test_there_are_all_of_them() -> None:
    assert len(RECIPES) >= 25
    assert len({text for text, _ in RECIPES.values()}) >= 25


@pytest.mark.parametrize("name", MIGRATES)
def test_a_recipe_migrates_and_means_the_same(tmp_path: Path, name: str) -> None:
    done = run(tmp_path, name)
    listed = {(change.old.partition(":")[0], change.new) for change in done.changes}
    old = yaml.safe_load(RECIPES[name][0])
    for key, value in old.items():
        kept = means(key, value, done.recipe.trl)
        assert kept or key in {old for old, _ in listed}, f"{key} is lost"
        if kept and key in NOW:
            assert (key, NOW[key]) in listed
    assert done.recipe.data.corpus == CORPUS
    assert done.recipe.release.repo_id == "a-model"
    assert list(unread(done.recipe)) == []
    assert (done.recipe.data.eval_split == "val") == bool(old["do_eval"])
    assert "target_role: assistant" in done.text()
    assert any("every token was learned" in change.meaning for change in done.changes)
    (written, *template) = done.write(tmp_path / "new.yaml")
    assert load_recipe(written) == done.recipe
    assert bool(template) == ("chat_template" in old)
    if template:
        assert template[0].read_text(encoding="utf-8") == old["chat_template"]


@pytest.mark.parametrize("name", MIGRATES)
def test_evaluations_and_checkpoints_come_when_the_stream_can_have_them(tmp_path: Path, name: str) -> None:
    new, old = run(tmp_path, name).recipe.trl, yaml.safe_load(RECIPES[name][0])
    assert new.get("save_strategy", "steps") == "steps"
    assert new.get("eval_strategy", "no") in ("no", "steps")
    if old.get("save_strategy") == "epoch":
        epochs = old.get("num_train_epochs", 3)
        assert new["save_steps"] == pytest.approx(1 / epochs if epochs > 1 else 0.5, abs=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_is_refused_for_its_own_keys(tmp_path: Path, name: str) -> None:
    text, keys = RECIPES[name]
    with pytest.raises(RecipeError) as caught:
        run(tmp_path, name)
    assert {fault.key for fault in caught.value.faults} == keys
    lines = text.splitlines()
    for fault in caught.value.faults:
        assert lines[(fault.origin.line or 0) - 1].startswith(f"{fault.key}:")
        assert len(fault.message) > 30


@pytest.mark.parametrize("name", RECIPES)
def test_none_is_taken_for_a_recipe_of_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "old.yaml").write_text(RECIPES[name][0], encoding="utf-8")
    with pytest.raises(RecipeError, match="run: training-ready recipe migrate"):
        load_recipe(tmp_path / "old.yaml")


def test_what_the_trainer_does_not_read_is_never_carried_over() -> None:
    assert ELSEWHERE.keys() <= NOT_READ.keys() | SPECIAL.keys()
