"""Runs killed at random moments, also during a checkpoint, and continued on other numbers of processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from training_ready.corpus.build import build_corpus
from training_ready.corpus.spec import load_spec
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore

REPOSITORY = Path(__file__).parents[2]
CONVERSATIONS = REPOSITORY / "src/training_ready/corpus/quickstart"
STEPS, GLOBAL_BATCH, KILLS = 60, 4, 10
RECIPE = """
data: {corpus: final_dataset/quickstart/manifest.json}
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, max_position_embeddings: 1024}
  tokenizer: {vocab_size: 600}
stream:
  mixture:
    early: {stages: [stage1_foundation], weight: 2}
    later: {stages: [stage2_therapeutic_expertise, stage3_edge_stress_test, stage4_voice_persona], weight: 1}
attn_implementation: sdpa
dtype: float32
bf16: false
use_cpu: true
activation_checkpointing: false
max_length: 1024
packing: true
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 2
save_total_limit: 3
resume_from_checkpoint: auto
seed: 7
"""


@pytest.fixture
def environment(store_server: EmbeddedStore, store: ObjectStore) -> dict[str, str]:
    for file in CONVERSATIONS.glob("*.jsonl"):
        store.put_file(f"quickstart/{file.name}", file)
    build_corpus(load_spec(CONVERSATIONS / "corpus.yaml"), store)
    return {
        **os.environ,
        **store_server.environment(),
        "OVH_S3_BUCKET": store.bucket,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }


class Run:
    """One run folder, trained by any number of processes in turn."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self._environment = folder, environment
        self._recipe = folder.with_suffix(".yaml")
        self._recipe.write_text(f"output_dir: {folder}\nmax_steps: {STEPS}\n{RECIPE}", encoding="utf-8")

    def start(self, processes: int) -> subprocess.Popen[str]:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        each = f"per_device_train_batch_size={GLOBAL_BATCH // processes}"
        with (self.folder.with_suffix(".out")).open("a", encoding="utf-8") as out:
            return subprocess.Popen(
                [*launcher, str(REPOSITORY / "scripts/run_sft.py"), str(self._recipe), each],
                env=self._environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def finish(self, processes: int) -> None:
        process = self.start(processes)
        assert process.wait(timeout=300) == 0, self.output()

    def kill_after(self, processes: int, seconds: float) -> None:
        """Killed so long after the first checkpoint that is newer than those of earlier starts."""
        before = self.newest()
        process = self.start(processes)
        while self.newest() <= before and process.poll() is None:
            time.sleep(0.02)
        time.sleep(seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode in (0, -signal.SIGKILL), self.output()

    def newest(self) -> int:
        complete = self.folder.glob("checkpoint-*/stream_state.json")
        return max((int(path.parent.name.removeprefix("checkpoint-")) for path in complete), default=0)

    def output(self) -> str:
        return self.folder.with_suffix(".out").read_text(encoding="utf-8")[-4000:]

    def weights(self) -> dict[str, Any]:
        return dict(load_file(self.folder / f"checkpoint-{STEPS}" / "model.safetensors"))

    def logged(self, *names: str) -> list[tuple[Any, ...]]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        names = ("step", *names)
        return [tuple(line.get(name) for name in names) for line in lines if "loss" in line]

    def sources(self) -> set[str]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return {name for line in lines for name in json.loads(line) if name.startswith("stream/tokens/")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_change_no_weight_and_other_world_sizes_no_row(
    environment: dict[str, str], tmp_path: Path
) -> None:
    whole = Run(tmp_path / "whole", environment)
    whole.finish(2)
    counts = (
        "num_tokens",
        "stream/fill",
        "stream/epochs/early",
        "stream/epochs/later",
        *sorted(whole.sources()),
    )
    assert [line[0] for line in whole.logged()] == list(range(1, STEPS + 1))

    killed, moments = Run(tmp_path / "killed", environment), random.Random(20)
    for _ in range(KILLS):
        killed.kill_after(2, moments.uniform(0, 0.6))
    killed.finish(2)
    assert killed.logged("loss", "grad_norm", *counts) == whole.logged("loss", "grad_norm", *counts)
    expected, found = whole.weights(), killed.weights()
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)

    elastic = Run(tmp_path / "elastic", environment)
    elastic.kill_after(2, moments.uniform(0, 0.6))
    elastic.kill_after(1, moments.uniform(0, 0.6))
    elastic.finish(2)
    assert elastic.logged(*counts) == whole.logged(*counts)
    for (_, one), (_, two) in zip(elastic.logged("loss"), whole.logged("loss"), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
