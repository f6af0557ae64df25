"""A run that meets every fault at every moment: it ends with the very weights of the run that met none."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.training.checkpoint_bucket import BucketCheckpoints
from training_ready.training.checkpoints import checkpoints_in, step_of

from ..faulty_network import FaultyProxy
from .conftest import TINY
from .forked_runs import ForkedRuns

STEPS = 60
SEEDS = 20
KILLS = 10


@pytest.fixture(scope="module")
def runs() -> Iterator[ForkedRuns]:
    with ForkedRuns() as process:
        yield process


@dataclass
class World:
    """One run folder, one place in the bucket, and what the run that met no fault computed at every step."""

    runs: ForkedRuns
    recipe: Path
    place: Path
    environment: dict[str, str]
    store: ObjectStore
    expected: Path
    disk: Path | None = None

    @property
    def run(self) -> Path:
        return (self.disk or self.place) / "run"

    @property
    def log(self) -> Path:
        return self.place / "run.log"

    @property
    def bucket(self) -> BucketCheckpoints:
        return BucketCheckpoints(self.store, "runs/run/", "run")

    def start(self, *options: str, stage: tuple[str, int] | None = None, **environment: str) -> int:
        """Start the run, or continue it; it is mirrored and keeps two checkpoints in each place."""
        mirrored = ("checkpoint.mirror=true", "checkpoint.keep_remote=2", "save_total_limit=2")
        variables = {**self.environment, "OVH_S3_CHECKPOINT_BUCKET": self.store.bucket, **environment}
        folder = f"output_dir={self.run}"
        return self.runs.start(
            self.log, self.recipe, folder, "resume=auto", *mirrored, *options, stage=stage, **variables
        )

    def end(self, *options: str, stage: tuple[str, int] | None = None, **environment: str) -> int:
        """The same, and its exit status."""
        self.start(*options, stage=stage, **environment)
        return self.runs.wait()

    def look(self) -> tuple[int, int]:
        """The newest checkpoint here and in the bucket, when everything that counts as complete is whole."""
        here = checkpoints_in(self.run)[0]
        for folder in here:
            self.compare(folder)
        there, _ = self.bucket.survey()
        back = self.place / "back"
        for step in there:
            self.compare(self.bucket.download(step, back))
        shutil.rmtree(back, ignore_errors=True)
        return max(map(step_of, here), default=0), max(there, default=0)

    def compare(self, folder: Path) -> None:
        """Weights and optimizer are those of the run that met no fault, and the rest can be read."""
        expected = self.expected / folder.name
        wanted, found = (load_file(path / "model.safetensors") for path in (expected, folder))
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted), folder
        wanted, found = (torch.load(path / "optimizer.pt") for path in (expected, folder))
        for number, state in wanted["state"].items():
            assert all(torch.equal(state[name], found["state"][number][name]) for name in state), folder
        assert json.loads((folder / "trainer_state.json").read_bytes())["global_step"] == step_of(folder)

    def steps_since(self, moment: float) -> int:
        """Steps that were logged after this time."""
        return sum(line["time"] > moment for line in metrics(self.run) if "loss" in line)

    def ended_alike(self) -> None:
        """The last step is the same, here and in the bucket, and so is everything that was logged."""
        assert (self.run / "summary.json").exists()
        assert self.look() == (STEPS, STEPS)
        assert losses(self.run) == losses(self.expected)


@pytest.fixture(scope="module")
def expected(
    runs: ForkedRuns, corpus_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The recipe, with dropout and accumulation, and the run that nothing happened to; it keeps every step."""
    place = tmp_path_factory.mktemp("expected")
    recipe, run = place / "tiny.yaml", place / "run"
    model = TINY.replace("mixtral", "llama, attention_dropout: 0.1").replace(
        "num_local_experts: 4, num_experts_per_tok: 2, ", ""
    )
    for key, value in {"max_steps": STEPS, "save_steps": 2, "per_device_train_batch_size": 1}.items():
        model = "\n".join(line for line in model.splitlines() if not line.startswith(f"{key}:"))
        model += f"\n{key}: {value}\n"
    recipe.write_text(f"output_dir: {run}\n{model}gradient_accumulation_steps: 2\n", encoding="utf-8")
    runs.start(place / "run.log", recipe, **corpus_environment)
    assert runs.wait() == 0, (place / "run.log").read_text()
    return recipe, run


@pytest.fixture
def world(
    runs: ForkedRuns,
    expected: tuple[Path, Path],
    corpus_environment: dict[str, str],
    store: ObjectStore,
    tmp_path: Path,
) -> Iterator[World]:
    yield World(runs, expected[0], tmp_path, corpus_environment, store, expected[1])
    runs.stop()


@pytest.fixture
def networked(world: World, proxy: FaultyProxy) -> World:
    """The same, behind a network that can fail."""
    return replace(world, environment={**world.environment, "OVH_S3_ENDPOINT": proxy.url})


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(run) if "loss" in line]


def until(condition: Callable[[], bool], what: World) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what.log.read_text()
        time.sleep(0.01)


# --------------------------------------------------------------------------- kill -9
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["files", "requests"])
def test_killed_at_every_stage_of_a_resume_a_save_and_an_upload(world: World, kind: str) -> None:
    """Every start dies one stage later than the one before it, until one reaches the end of the run."""
    stage, here, there = 0, 0, 0
    while (status := world.end(stage=(kind, stage))) == -signal.SIGKILL:
        was_here, was_there = here, there
        here, there = world.look()
        assert here >= was_here
        assert there >= was_there
        stage += 1
    assert status == 0, world.log.read_text()
    assert stage > 50  # a whole save, or a whole upload, lies between the first and the last
    world.ended_alike()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
def test_ten_kills_and_a_bad_network_end_with_the_same_weights(
    networked: World, proxy: FaultyProxy, seed: int
) -> None:
    """At every other kill the folder is thrown away, as if the machine were gone: then the bucket has to do."""
    chance, there = random.Random(seed), 0
    for kill in range(KILLS):
        began = time.time()
        pid = networked.start()
        steps = chance.randrange(5)
        until(lambda since=began, wanted=steps: networked.steps_since(since) >= wanted, networked)
        fault = chance.choice(("none", "none", "down", "reset"))
        if fault == "down":
            proxy.down = True
        elif fault == "reset":
            proxy.faults += ["reset", "cut", "busy"]
        time.sleep(chance.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert networked.runs.wait() == -signal.SIGKILL
        proxy.down = False
        _, now = networked.look()
        assert now >= there
        there = now
        if kill % 2:
            shutil.rmtree(networked.run, ignore_errors=True)
    assert networked.end() == 0, networked.log.read_text()
    networked.ended_alike()


# --------------------------------------------------------------------------- the network, while nobody kills
def uploads(proxy: FaultyProxy) -> int:
    """Requests that brought something of a checkpoint so far."""
    return sum(seen.method == "PUT" and "/step-" in seen.path for seen in proxy.seen)


@pytest.mark.slow
def test_an_outage_in_the_middle_of_an_upload_costs_nothing(networked: World, proxy: FaultyProxy) -> None:
    networked.start()
    until(lambda: uploads(proxy) > 20, networked)
    proxy.down = True
    time.sleep(5)
    assert uploads(proxy) > 20
    proxy.down = False
    assert networked.runs.wait() == 0, networked.log.read_text()
    networked.ended_alike()


@pytest.mark.slow
def test_a_store_that_is_gone_for_a_minute(
    world: World, store_server: EmbeddedStore, corpus_environment: dict[str, str]
) -> None:
    with EmbeddedStore(world.place / "buckets") as server:
        port, store = int(server.endpoint_url.rpartition(":")[2]), ObjectStore(server.settings("gone"))
        store.create_bucket_if_missing()
        corpus = ObjectStore(store_server.settings(corpus_environment["OVH_S3_BUCKET"]))
        for info in corpus.list():
            store.put_bytes(info.key, corpus.get_bytes(info.key))
        elsewhere = {**server.environment(), "OVH_S3_BUCKET": "gone"}
        world = replace(world, environment=elsewhere, store=store)
        world.start()
        until(lambda: bool(losses(world.run)) and bool(world.bucket.survey()[0]), world)
    time.sleep(60)  # training goes on to its end, and waits there for its last checkpoint
    assert not (world.run / "summary.json").exists()
    with EmbeddedStore(world.place / "buckets", port):
        assert world.runs.wait() == 0, world.log.read_text()
        world.ended_alike()


@pytest.mark.slow
def test_a_part_that_the_store_welcomed_and_lost(networked: World, proxy: FaultyProxy) -> None:
    proxy.lost_parts = 2
    larger = (
        "model.config={model_type: llama, hidden_size: 512, intermediate_size: 1024, num_hidden_layers: 2,"
    )
    larger += "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512}"
    assert networked.end(larger, "max_steps=2") == 0, networked.log.read_text()
    assert proxy.lost_parts == 0
    there = networked.bucket.download(2, networked.place / "back")
    for path in (networked.run / "checkpoint-2").iterdir():
        assert (there / path.name).read_bytes() == path.read_bytes()
    assert (there / "optimizer.pt").stat().st_size > 2 * (16 << 20)  # three parts


@pytest.mark.slow
@pytest.mark.parametrize("renewed", [True, False])
def test_credentials_that_expire_during_an_upload(
    networked: World, proxy: FaultyProxy, renewed: bool
) -> None:
    """Those in the .env file are read again; a run that never gets new ones says what to do, and that works."""
    given = networked.environment
    file = networked.place / ".env"

    def write(token: str) -> None:
        keys = {
            "AWS_ACCESS_KEY_ID": given["OVH_S3_ACCESS_KEY"],
            "AWS_SECRET_ACCESS_KEY": given["OVH_S3_SECRET_KEY"],
            "AWS_SESSION_TOKEN": token,
        }
        file.write_text("".join(f"{name}={value}\n" for name, value in keys.items()), encoding="utf-8")

    write("old")
    others = {name: value for name, value in given.items() if not name.endswith("_KEY")}
    world = replace(networked, environment=others)
    impatient = () if renewed else ("checkpoint.patience_minutes=0.05",)
    world.start(*impatient)
    until(lambda: uploads(proxy) > 20, world)
    proxy.expired_token = "old"
    if renewed:
        time.sleep(2)
        write("new")
    else:
        assert world.runs.wait() == 1
        told = world.log.read_text()
        assert f"checkpoint-{STEPS} is not in s3://{world.store.bucket}/runs/run/" in told
        assert "expired" in told
        assert "resume_from_checkpoint=auto: it uploads what is missing" in told
        assert not (world.run / "summary.json").exists()
        world.compare(world.run / f"checkpoint-{STEPS}")
        write("new")
        world.start(*impatient)
    assert world.runs.wait() == 0, world.log.read_text()
    world.ended_alike()


# --------------------------------------------------------------------------- the disk
@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 300_000])
def test_a_disk_that_somebody_else_fills(small_disk: Path, world: World, left: int) -> None:
    """Nothing is left for a line of metrics, or too little for a checkpoint; after it was cleared the run goes on."""
    world = replace(world, disk=small_disk)
    world.start()
    until(lambda: len(losses(world.run)) >= 7, world)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        while (free := shutil.disk_usage(small_disk).free) > left:
            file.write(bytes(min(free - left, 65536)))
            file.flush()
    assert world.runs.wait() == 1
    told = world.log.read_text()
    assert "Traceback" not in told
    assert re.search(r"[\d,]+ bytes are free there", told)
    assert "resume_from_checkpoint=auto" in told
    here, _ = world.look()
    assert here >= 6
    filler.unlink()
    assert world.end() == 0, world.log.read_text()
    world.ended_alike()
