"""A corpus of the shipped conversations in a real bucket, and a tiny Mixtral recipe to train on it."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from training_ready.corpus.build import build_corpus
from training_ready.corpus.spec import load_spec
from training_ready.recipe.load import load_recipe
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore

REPOSITORY = Path(__file__).parents[2]
CONVERSATIONS = REPOSITORY / "src/training_ready/corpus/quickstart"

TINY = """
data: {corpus: final_dataset/quickstart/manifest.json}
stream: {max_truncated: 1.0}
model:
  config: {model_type: mixtral, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, num_local_experts: 4, num_experts_per_tok: 2, max_position_embeddings: 512}
  tokenizer: {vocab_size: 600}
attn_implementation: sdpa
dtype: float32
bf16: false
use_cpu: true
activation_checkpointing: false
max_length: 256
packing: true
max_steps: 12
per_device_train_batch_size: 2
learning_rate: 5.0e-3
logging_steps: 1
save_steps: 4
seed: 7
"""


@pytest.fixture(scope="session")
def corpus_environment(store_server: EmbeddedStore) -> dict[str, str]:
    """Environment of a process that finds the built quickstart corpus in its bucket."""
    bucket = f"training-{uuid.uuid4().hex}"
    store = ObjectStore(store_server.settings(bucket))
    store.create_bucket_if_missing()
    for file in CONVERSATIONS.glob("*.jsonl"):
        store.put_file(f"quickstart/{file.name}", file)
    build_corpus(load_spec(CONVERSATIONS / "corpus.yaml"), store)
    return {**store_server.environment(), "OVH_S3_BUCKET": bucket, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(f"output_dir: {tmp_path / 'run'}\n{TINY}", encoding="utf-8")
    return path


Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(corpus_environment: dict[str, str]) -> Launch:
    """Starts ``scripts/run_sft.py`` as a user would, on one or several processes."""

    def start(recipe: Path, *overrides: str, processes: int = 1, **environment: str) -> subprocess.Popen[str]:
        launcher = [sys.executable]
        if processes > 1:
            # `accelerate launch --cpu --num_processes 2` starts one process without a word.
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={processes}",
            ]
        return subprocess.Popen(
            [*launcher, str(REPOSITORY / "scripts/run_sft.py"), str(recipe), *overrides],
            env={**os.environ, **corpus_environment, "ACCELERATE_USE_CPU": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def train(launch: Launch) -> Callable[..., str]:
    """Trains to the end and returns the output; fails the test when the run does."""

    def run(recipe: Path, *overrides: str, processes: int = 1) -> str:
        process = launch(recipe, *overrides, processes=processes)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out

    return run


@pytest.fixture
def refused(launch: Launch) -> Callable[..., str]:
    """Expects a run to be refused, and returns its one message."""

    def run(recipe: Path, *overrides: str, **environment: str) -> str:
        process = launch(recipe, *overrides, **environment)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1, err
        assert "Traceback" not in err
        assert err.count("error: ") == 1
        return err

    return run


@pytest.fixture
def run_here(
    corpus_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs a recipe's text in this process and returns the trainer of experts that ran, with its model."""
    from training_ready.training import run
    from training_ready.training.moe_trainer import MoETrainer

    kept: list[MoETrainer] = []

    class Kept(MoETrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            kept.append(self)

    for name, value in corpus_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run, "MoETrainer", Kept)

    def start(text: str, *overrides: str) -> MoETrainer:
        path = tmp_path / "here.yaml"
        path.write_text(text, encoding="utf-8")
        run.run_sft(load_recipe(path, overrides), Console(quiet=True))
        return kept[-1]

    return start


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of the parameter's size or with room for three checkpoints of the tiny model; nobody
    has it open at the end."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={getattr(request, 'param', '4m')}", "none", str(place)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode != 0:
        pytest.skip("a file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)
