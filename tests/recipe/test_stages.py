"""The recipe names the stages of a corpus by itself, as it imports nothing of ours: they must be the same."""

from __future__ import annotations

from typing import get_args

from training_ready.corpus import record
from training_ready.recipe import sections


def test_the_stages_of_a_recipe_are_those_of_a_corpus() -> None:
    assert get_args(sections.Stage) == get_args(record.Stage) == record.STAGES
