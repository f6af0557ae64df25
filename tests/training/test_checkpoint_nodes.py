"""Two machines with disks of their own, one of which is lost: the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training_ready.storage.objects import ObjectStore
from training_ready.training.checkpoint_bucket import BucketCheckpoints

from .conftest import TINY

_TRAIN = "import sys; from training_ready.training.main import main; sys.exit(main(sys.argv[1:]))"
Agents = list["subprocess.Popen[str]"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def start(
    corpus_environment: dict[str, str], store: ObjectStore, tmp_path: Path
) -> Iterator[Callable[..., Agents]]:
    """Starts a run on so many nodes, each in a folder of its own that the relative output_dir lies in."""
    script, recipe, started = tmp_path / "train.py", tmp_path / "tiny.yaml", Agents()
    script.write_text(_TRAIN, encoding="utf-8")
    model = TINY.replace("mixtral", "llama, attention_dropout: 0.1").replace(
        "num_local_experts: 4, num_experts_per_tok: 2, ", ""
    )
    recipe.write_text(f"output_dir: run\n{model}gradient_accumulation_steps: 2\n", encoding="utf-8")
    variables = {"OVH_S3_CHECKPOINT_BUCKET": store.bucket, "ACCELERATE_USE_CPU": "1"}

    def nodes(*places: Path, ranks: int, options: tuple[str, ...]) -> Agents:
        port, agents = free_port(), Agents()
        for node, place in enumerate(places):
            place.mkdir(exist_ok=True)
            agent = ["--nnodes", str(len(places)), "--nproc-per-node", str(ranks), "--node-rank", str(node)]
            agent += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
            agents.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *agent, script, recipe, *options],
                    cwd=place,
                    env={**os.environ, **corpus_environment, **variables},
                    stdout=(place / "log").open("a"),
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        started.extend(agents)
        return agents

    yield nodes
    for agent in started:
        agent.kill()
        agent.wait()


def finish(agents: Agents, *places: Path) -> None:
    assert [agent.wait(timeout=300) for agent in agents] == [0] * len(agents), [
        (place / "log").read_text()[-3000:] for place in places
    ]


@pytest.mark.slow
def test_a_lost_machine_of_two_changes_nothing(
    start: Callable[..., Agents], store: ObjectStore, tmp_path: Path
) -> None:
    options = ("max_steps=12", "save_steps=3", "per_device_train_batch_size=1")
    whole, first, second = tmp_path / "whole", tmp_path / "first", tmp_path / "second"
    finish(start(whole, ranks=2, options=options), whole)

    mirrored, bucket = (
        (*options, "checkpoint.mirror=true", "resume=auto"),
        BucketCheckpoints(store, "runs/run/", "run"),
    )
    agents = start(first, second, ranks=1, options=mirrored)
    while not bucket.survey()[0]:
        assert agents[0].poll() is None, (first / "log").read_text()
        time.sleep(0.05)
    for agent in agents:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
    time.sleep(1)  # the kernel ends the ranks with their agents
    assert not (first / "run" / "summary.json").exists()
    shutil.rmtree(second)

    finish(start(first, second, ranks=1, options=mirrored), first, second)
    assert "continuing from" in (first / "log").read_text()
    expected = load_file(whole / "run/checkpoint-12/model.safetensors")
    back = bucket.download(12, tmp_path / "back")
    for folder in (first / "run/checkpoint-12", back):
        found = load_file(folder / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (back / "rng_state_1.pth").exists()  # the second node's part, which the first never had
    assert not (first / "run/checkpoint-12/rng_state_1.pth").exists()
