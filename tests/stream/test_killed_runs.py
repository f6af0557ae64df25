"""Runs of two ranks killed at random moments, also during a checkpoint, and continued on other numbers of ranks.

The first run and the one that changes its number of ranks are started by a launcher, as a person would; the ranks of
the ten kills are forked from processes that have imported everything, so that ten starts take a minute.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from training_ready.corpus.build import build_corpus
from training_ready.corpus.spec import load_spec
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore

from ..corpora import blocks_in, put_corpus, row, talk
from ..training.forked_runs import ForkedRuns

REPOSITORY = Path(__file__).parents[2]
CONVERSATIONS = REPOSITORY / "src/training_ready/corpus/quickstart"
STEPS, GLOBAL_BATCH, KILLS = 60, 4, 10
ROWS, BLOCKS = 9_000, 90  # of a corpus that takes longer to tokenise than its first steps to train
STAGES = 60  # about as many file operations as a save of one rank makes
MIXED = """
data: {corpus: final_dataset/quickstart/manifest.json}
stream:
  mixture:
    early: {stages: [stage1_foundation], weight: 2}
    later: {stages: [stage2_therapeutic_expertise, stage3_edge_stress_test, stage4_voice_persona], weight: 1}
"""
ALONE = "data: {corpus: final_dataset/numbers/manifest.json}"
RECIPE = """
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, max_position_embeddings: 1024}
  tokenizer: {vocab_size: 600}
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
def environment(
    store_server: EmbeddedStore, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    for file in CONVERSATIONS.glob("*.jsonl"):
        store.put_file(f"quickstart/{file.name}", file)
    build_corpus(load_spec(CONVERSATIONS / "corpus.yaml"), store)
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "1"
    )  # before torch is imported: sums in another order are other sums
    return {**store_server.environment(), "OVH_S3_BUCKET": store.bucket, "ACCELERATE_USE_CPU": "1"}


@pytest.fixture
def ranks(environment: dict[str, str]) -> Iterator[list[ForkedRuns]]:
    with ExitStack() as held:
        yield [held.enter_context(ForkedRuns()) for _ in range(2)]


class Run:
    """One run folder, trained by any number of processes in turn."""

    def __init__(self, folder: Path, environment: dict[str, str], data: str = MIXED) -> None:
        self.folder, self._environment = folder, environment
        self._recipe = folder.with_suffix(".yaml")
        text = f"output_dir: {folder}\nmax_steps: {STEPS}\n{data}\n{RECIPE}"
        self._recipe.write_text(text, encoding="utf-8")

    def launch(self, processes: int) -> subprocess.Popen[bytes]:
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        with (self.folder.with_suffix(".out")).open("ab") as out:
            return subprocess.Popen(
                [
                    *launcher,
                    str(REPOSITORY / "scripts/run_sft.py"),
                    str(self._recipe),
                    self._share(processes),
                ],
                env={**os.environ, **self._environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, processes: int) -> None:
        assert self.launch(processes).wait(timeout=300) == 0, self.output()

    def kill_launcher(self, processes: int, also: Callable[[], bool] = lambda: True) -> None:
        """Killed as soon as there is a checkpoint newer than those of earlier starts, and whatever is waited for
        ``also``. No rank may outlive it."""
        before = self.newest()
        launcher = self.launch(processes)
        while not (self.newest() > before and also()) and launcher.poll() is None:
            time.sleep(0.02)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(children) == (processes if processes > 1 else 0), self.output()
        launcher.kill()
        launcher.wait()
        deadline = time.monotonic() + 30
        while any(_alive(int(child)) for child in children):
            assert time.monotonic() < deadline, f"{children} outlived their launcher"
            time.sleep(0.02)

    def train(self, ranks: list[ForkedRuns], *, stage: int | None = None, after: float | None = None) -> None:
        """On two forked ranks: to the end, or until rank 0 dies at a file operation of a checkpoint (``stage``), or
        both so many seconds ``after`` the first new checkpoint."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        before, pids = self.newest(), []
        for number, rank in enumerate(ranks):
            place = {
                "RANK": number,
                "LOCAL_RANK": number,
                "WORLD_SIZE": 2,
                "LOCAL_WORLD_SIZE": 2,
                "MASTER_PORT": port,
            }
            variables = {
                **self._environment,
                **{k: str(v) for k, v in place.items()},
                "MASTER_ADDR": "127.0.0.1",
            }
            at = ("files", stage) if stage is not None and number == 0 else None
            log = self.folder.with_name(f"{self.folder.name}-{number}.out")
            pids.append(rank.start(log, self._recipe, self._share(2), stage=at, **variables))
        if after is not None:
            while self.newest() <= before and all(_alive(pid) for pid in pids):
                time.sleep(0.02)
            time.sleep(after)
        if after is not None:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        statuses = [ranks[0].wait()]
        if stage is not None:
            with suppress(ProcessLookupError):  # it may have noticed by itself, and said so
                os.kill(pids[1], signal.SIGKILL)  # as a launcher does that has lost a rank
        statuses.append(ranks[1].wait())
        expected = [(0, 0)] if stage is None and after is None else [(-signal.SIGKILL, -signal.SIGKILL)]
        if stage is not None:
            expected.append((-signal.SIGKILL, 1))
        assert tuple(statuses) in expected, self.output()

    def newest(self) -> int:
        complete = self.folder.glob("checkpoint-*/stream_state.json")
        return max((int(path.parent.name.removeprefix("checkpoint-")) for path in complete), default=0)

    def output(self) -> str:
        logs = sorted(self.folder.parent.glob(f"{self.folder.name}*.out"))
        return "\n".join(f"{log.name}: {log.read_text(encoding='utf-8')[-3000:]}" for log in logs)

    def weights(self) -> dict[str, Any]:
        return dict(load_file(self.folder / f"checkpoint-{STEPS}" / "model.safetensors"))

    def logged(self, *names: str) -> list[tuple[Any, ...]]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        names = ("step", *names)
        return [tuple(line.get(name) for name in names) for line in lines if "loss" in line]

    def sources(self) -> set[str]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return {name for line in lines for name in json.loads(line) if name.startswith("stream/tokens/")}

    @staticmethod
    def _share(processes: int) -> str:
        return f"per_device_train_batch_size={GLOBAL_BATCH // processes}"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def counts_of(run: Run) -> list[str]:
    return ["num_tokens", "stream/fill", "stream/epochs/early", "stream/epochs/later", *sorted(run.sources())]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_change_no_weight_and_other_world_sizes_no_row(
    environment: dict[str, str], ranks: list[ForkedRuns], tmp_path: Path
) -> None:
    whole = Run(tmp_path / "whole", environment)
    whole.finish(2)
    counts = counts_of(whole)
    assert [line[0] for line in whole.logged()] == list(range(1, STEPS + 1))

    killed, moments = Run(tmp_path / "killed", environment), random.Random(20)
    for number in range(KILLS):
        if number % 2:
            killed.train(ranks, stage=moments.randrange(STAGES))
        else:
            killed.train(ranks, after=moments.uniform(0, 0.3))
    killed.train(ranks)
    assert killed.logged("loss", "grad_norm", *counts) == whole.logged("loss", "grad_norm", *counts)
    expected, found = whole.weights(), killed.weights()
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)

    elastic = Run(tmp_path / "elastic", environment)
    elastic.kill_launcher(2)
    elastic.kill_launcher(1)
    elastic.finish(2)
    assert elastic.logged(*counts) == whole.logged(*counts)
    for (_, one), (_, two) in zip(elastic.logged("loss"), whole.logged("loss"), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_before_all_is_tokenised_change_no_row_and_no_weight(
    environment: dict[str, str], store: ObjectStore, tmp_path: Path
) -> None:
    """The first packs are trained before the last rows are tokenised, by ranks that make the tokens for each other."""
    rows = [row(talk(number)) for number in range(ROWS)]
    put_corpus(store, "numbers", {"train": rows}, ROWS // BLOCKS)

    def tokenised() -> int:
        return blocks_in(store, "numbers")

    killed = Run(tmp_path / "killed", environment, ALONE)
    seen = []
    for _ in range(2):
        killed.kill_launcher(2)
        seen.append((killed.newest(), tokenised()))
    assert seen[0][1] < BLOCKS, f"(step, blocks) {seen}: all was tokenised before the first kill"
    killed.finish(2)
    assert tokenised() == BLOCKS
    elastic = Run(tmp_path / "elastic", environment, ALONE)
    for info in list(store.list("final_dataset/numbers/tokens/")):
        store.delete(info.key)
    elastic.kill_launcher(2)
    elastic.kill_launcher(1)
    elastic.finish(2)
    whole = Run(tmp_path / "whole", environment, ALONE)
    whole.finish(2)
    counts = ["num_tokens", "stream/fill", *sorted(whole.sources())]
    assert killed.logged("loss", "grad_norm", *counts) == whole.logged("loss", "grad_norm", *counts)
    expected, found = whole.weights(), killed.weights()
    assert all((expected[name] == found[name]).all() for name in expected)
    assert elastic.logged(*counts) == whole.logged(*counts)
