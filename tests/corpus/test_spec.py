"""The specification: every fault at once, each with its line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from training_ready.corpus.spec import CorpusSpec, SpecError, load_spec

GOOD = """\
name: small
allowed_licenses: [MIT]
sources:
  - name: one
    path: raw/one.csv
    columns: {user: question, assistant: [answer, remark]}
    stage: stage1_foundation
    target_role: assistant
    license: MIT
"""


def load(tmp_path: Path, text: str) -> CorpusSpec:
    path = tmp_path / "corpus.yaml"
    path.write_text(text)
    return load_spec(path)


def test_defaults_and_short_forms(tmp_path: Path) -> None:
    spec = load(tmp_path, GOOD)
    assert spec.splits == {"train": 0.9, "val": 0.05, "test": 0.05}
    assert spec.sources[0].path == ["raw/one.csv"]
    assert spec.sources[0].columns == {"user": ["question"], "assistant": ["answer", "remark"]}
    assert spec.sources[0].pii_status == "requires_review"
    assert spec.sources[0].source_family == "one"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: small\n", "", "corpus.yaml:1: name: Field required"),
        ("name: small", "name: ../escape", "corpus.yaml:1: name: "),
        ("stage: stage1_foundation", "stage: stage9", "corpus.yaml:7: sources.0.stage: "),
        ("license: MIT", "licence: MIT", "corpus.yaml:9: sources.0.licence: unknown key"),
        ("    stage: stage1_foundation\n", "", "stage is missing: give it, or list it in row_fields"),
        ("    license: MIT\n", "", "license is missing"),
        (
            "assistant: [answer, remark]",
            "system: answer",
            "corpus.yaml:4: sources.0: columns needs at least one column for user",
        ),
        ("path: raw/one.csv", "path: []", "corpus.yaml:5: sources.0.path: "),
        ("name: small", "name: small\nname: again", "corpus.yaml:2: name is written twice"),
        ("name: small", "name: [", "corpus.yaml:"),
        ("name: small", "name: small\nsplits: {train: 0.9, val: 0.2}", "0.9 + val 0.2 = 1.1"),
        (
            "    license: MIT",
            "    license: MIT\n    withhold: {who: '('}",
            "the expression for 'who' is not one",
        ),
        (
            "    license: MIT",
            "    license: MIT\n  - {name: one, path: b.csv, stage: stage1_foundation, target_role: user, license: MIT}",
            "two sources are called one",
        ),
    ],
)
def test_faults_are_named_with_their_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError) as refused:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(refused.value)


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(SpecError) as refused:
        load(tmp_path, GOOD.replace("stage1_foundation", "x").replace("role: assistant", "role: y"))
    assert "sources.0.stage" in str(refused.value)
    assert "sources.0.target_role" in str(refused.value)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text"])
def test_something_else_than_a_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match="is a mapping"):
        load(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"nothing\.yaml"):
        load_spec(tmp_path / "nothing.yaml")


def test_the_example_of_the_page_is_the_specification_that_real_data_is_tested_with() -> None:
    page = (Path(__file__).parents[2] / "docs" / "corpus.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert example is not None
    tested = load_spec(Path(__file__).with_name("counsel_chat.yaml"))
    assert CorpusSpec.model_validate(yaml.safe_load(example.group(1))) == tested
