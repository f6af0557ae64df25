"""What a newcomer gets wrong is refused with one clear message and a non-zero exit."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CONVERSATIONS = "src/training_ready/corpus/quickstart"
SPEC = """
name: {name}
allowed_licenses: [MIT]
sources:
  - {{name: letters, path: {path}, license: MIT, stage: stage1_foundation, target_role: assistant,
     columns: {{user: question, assistant: answer}}}}
"""

Refused = Callable[..., str]


@pytest.fixture
def refused(command: Callable[..., subprocess.CompletedProcess[str]]) -> Refused:
    def run(*words: str | Path, **changes: str) -> str:
        result = command(*words, **changes)
        assert result.returncode == 1, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        assert result.stderr.count("error: ") == 1
        return result.stderr

    return run


def test_no_bucket(refused: Refused) -> None:
    message = refused("training-ready", "data", "verify", OVH_S3_BUCKET="nobody-made-this")
    assert "nobody-made-this" in message


def test_wrong_key(refused: Refused) -> None:
    message = refused("training-ready", "data", "verify", OVH_S3_SECRET_KEY="wrong")
    assert "not proven" in message


def test_no_credentials(refused: Refused) -> None:
    message = refused(
        "training-ready",
        "data",
        "build",
        f"{CONVERSATIONS}/corpus.yaml",
        OVH_S3_ACCESS_KEY="",
        OVH_S3_SECRET_KEY="",
    )
    for variable in ("OVH_S3_ACCESS_KEY", "OVH_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert variable in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("question,reply\nHow?,So.\n", ["'answer'", "'question', 'reply'"]),
        ("question,answer\n", ["letters"]),
    ],
    ids=["missing column", "empty source"],
)
def test_a_source_that_cannot_be_used(
    done: Callable[..., str], refused: Refused, tmp_path: Path, content: str, expected: list[str]
) -> None:
    csv = tmp_path / "letters.csv"
    csv.write_text(content, encoding="utf-8")
    done("training-ready", "data", "upload", csv, "--to", f"acquired/{tmp_path.name}")
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        SPEC.format(name=tmp_path.name, path=f"acquired/{tmp_path.name}/letters.csv"), encoding="utf-8"
    )
    message = refused("training-ready", "data", "build", spec)
    for word in expected:
        assert word in message


def test_a_source_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.format(name="gone", path="acquired/gone.csv"), encoding="utf-8")
    assert "acquired/gone.csv" in refused("training-ready", "data", "build", spec)


def test_an_unknown_recipe_key(refused: Refused, tmp_path: Path) -> None:
    recipe = tmp_path / "typo.yaml"
    recipe.write_text(Path("recipes/quickstart.yaml").read_text(encoding="utf-8") + "lerning_rate: 1.0e-3\n")
    message = refused("training-ready", "recipe", "show", recipe)
    assert f"{recipe}:" in message
    assert "learning_rate" in message


def test_a_hub_that_is_down(refused: Refused, tmp_path: Path) -> None:
    release = tmp_path / "release"
    release.mkdir()
    message = refused(
        "training-ready", "release", "publish", release, "me/model", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert str(release) in message or "127.0.0.1:9" in message


def test_a_run_that_never_finished_is_not_released(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "recipe.yaml" in refused(
        "training-ready", "release", "build", tmp_path / "run", tmp_path / "release"
    )
