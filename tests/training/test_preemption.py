"""Runs that are told to stop, killed, or run out of room: what they leave, and how they go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.training.checkpoint_bucket import BucketCheckpoints
from training_ready.training.checkpoints import INTERRUPTED_STATUS, STREAM_STATE, checkpoints_in

Launch = Callable[..., subprocess.Popen[str]]
_TRAIN = "import sys; from training_ready.training.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def launch(corpus_environment: dict[str, str], tmp_path: Path) -> Iterator[Launch]:
    """Starts a training process without the check before it, which every start here would repeat."""
    script, started = tmp_path / "train.py", []
    script.write_text(_TRAIN, encoding="utf-8")

    def start(recipe: Path, *overrides: str, processes: int = 1, **environment: str) -> subprocess.Popen[str]:
        distributed = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
        command = [
            sys.executable,
            *(distributed if processes > 1 else ()),
            str(script),
            str(recipe),
            *overrides,
        ]
        variables = {**os.environ, **corpus_environment, "ACCELERATE_USE_CPU": "1", **environment}
        started.append(
            subprocess.Popen(
                command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def dense(recipe: Path) -> Path:
    """Dropout draws random numbers and accumulation splits steps: both must survive a restart."""
    text = recipe.read_text(encoding="utf-8").replace("mixtral", "llama, attention_dropout: 0.1")
    text = text.replace("num_local_experts: 4, num_experts_per_tok: 2, ", "")
    recipe.write_text(text + "gradient_accumulation_steps: 2\n", encoding="utf-8")
    return recipe


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def losses(run: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["num_tokens"]) for line in metrics(run) if "loss" in line]


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def same_weights(one: Path, other: Path) -> bool:
    expected, found = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return expected.keys() == found.keys() and all(
        bool((expected[name] == found[name]).all()) for name in expected
    )


def ranks_of(launcher: subprocess.Popen[str]) -> list[int]:
    """The worker processes of a launcher, in the order of their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    environments = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in workers}
    return sorted(
        workers, key=lambda pid: next(word for word in environments[pid] if word.startswith(b"RANK="))
    )


# --------------------------------------------------------------------------- fast
def test_sigterm_saves_once_and_another_machine_goes_on(
    recipe: Path, launch: Launch, tmp_path: Path, store: ObjectStore
) -> None:
    here, there = tmp_path / "here" / "run", tmp_path / "there" / "run"
    options = ("checkpoint.mirror=true", "save_steps=100", "max_steps=30")
    place = {"OVH_S3_CHECKPOINT_BUCKET": store.bucket}
    process = launch(recipe, f"output_dir={here}", *options, **place)
    wait_for(process, lambda: len(losses(here)) >= 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED_STATUS, err
    stopped = re.search(
        r"stopped at step (\d+) of 30 by a signal\. Continue with .*resume_from_checkpoint=auto", err
    )
    assert stopped, err
    complete, incomplete = checkpoints_in(here)
    assert ([path.name for path in complete], incomplete) == ([f"checkpoint-{stopped[1]}"], [])
    bucket = BucketCheckpoints(store, "runs/run/", "run")
    assert bucket.survey() == ([int(stopped[1])], [])
    assert f"checkpoint-{stopped[1]} is in s3://{store.bucket}/runs/run/" in out

    process = launch(recipe, f"output_dir={there}", "resume=auto", *options, **place)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"continuing from {there}/checkpoint-{stopped[1]}" in out
    assert [step for step, *_ in losses(there)] == list(range(1, 31))
    tokens = [count for *_, count in losses(there)]
    assert tokens == sorted(set(tokens))
    assert (
        json.loads((there / "summary.json").read_text(encoding="utf-8"))["tokens"]["trained_tokens"]
        == tokens[-1]
    )
    assert bucket.survey() == ([int(stopped[1]), 30], [])


_WAITING = textwrap.dedent(
    """
    import threading
    from training_ready.training import preemption
    preemption._SECOND_AFTER_SECONDS = 0.5
    with preemption.StopSignals() as signals:
        print("ready", flush=True)
        threading.Lock().acquire() and threading.Event().wait()
    """
)


def test_a_second_signal_ends_at_once_but_not_an_echo_of_the_first() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # as a launcher passes on what the terminal has sent already
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.count("will save and stop") == err.count("SIGINT: will save and stop") == 1


# --------------------------------------------------------------------------- minutes
@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run that nothing happened to, once per set of options."""
    done: dict[tuple[str, ...], Path] = {}

    def run(recipe: Path, launch: Launch, *options: str, processes: int = 1) -> Path:
        key = (*options, str(processes))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("whole") / "run"
            process = launch(recipe, f"output_dir={done[key]}", *options, processes=processes)
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
        return done[key]

    return run


def finish(
    launch: Launch, recipe: Path, run: Path, *options: str, processes: int = 1, **environment: str
) -> str:
    process = launch(recipe, f"output_dir={run}", "resume=auto", *options, processes=processes, **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_at_one_rank_stops_all_after_the_same_step(
    dense: Path, launch: Launch, tmp_path: Path, uninterrupted: Callable[..., Path], rank: int
) -> None:
    options = ("max_steps=30", "save_steps=100", "per_device_train_batch_size=1")
    whole, run = uninterrupted(dense, launch, *options, processes=2), tmp_path / "run"
    process = launch(dense, f"output_dir={run}", *options, processes=2)
    wait_for(process, lambda: len(losses(run)) >= 3)
    os.kill(ranks_of(process)[rank], signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    stopped = re.search(r"stopped at step (\d+) of 30 by a signal", err)
    assert stopped, err
    assert [path.name for path in checkpoints_in(run)[0]] == [f"checkpoint-{stopped[1]}"]
    finish(launch, dense, run, *options, processes=2)
    assert same_weights(run / "checkpoint-30", whole / "checkpoint-30")
    assert losses(run) == losses(whole)


@pytest.mark.slow
def test_a_signal_to_the_launcher_is_enough(dense: Path, launch: Launch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(dense, "max_steps=300", "save_steps=1000", processes=2)
    wait_for(process, lambda: len(losses(run)) >= 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert "by a signal. Continue with" in err
    assert len(checkpoints_in(run)[0]) == 1


@pytest.mark.slow
def test_a_run_that_keeps_weights_only_does_not_say_that_it_can_go_on(
    dense: Path, launch: Launch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (f"output_dir={run}", "save_only_model=true", "save_steps=100", "max_steps=200")
    process = launch(dense, *options)
    wait_for(process, lambda: len(losses(run)) >= 1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    stopped = re.search(r"error: stopped at step (\d+) of 200 by a signal\. It cannot be continued", err)
    assert stopped, err
    process = launch(dense, "resume=auto", *options)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert f"checkpoint-{stopped[1]} holds weights only" in err
    assert f"step {stopped[1]} of 200 cannot be continued" in err
    assert not (run / "summary.json").exists()


@pytest.mark.slow
def test_a_step_in_progress_is_given_up_and_done_again(
    dense: Path, launch: Launch, tmp_path: Path, uninterrupted: Callable[..., Path]
) -> None:
    options = ("gradient_accumulation_steps=64", "max_steps=3", "save_steps=100")
    whole, run = uninterrupted(dense, launch, *options), tmp_path / "run"
    process = launch(dense, f"output_dir={run}", *options)
    wait_for(process, lambda: len(losses(run)) == 1)
    time.sleep(0.3)  # somewhere inside the second step
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED_STATUS, err
    assert "stopped at step 1 of 3" in err
    finish(launch, dense, run, *options)
    assert same_weights(run / "checkpoint-3", whole / "checkpoint-3")


@pytest.mark.slow
def test_tokens_of_a_step_that_is_given_up_are_counted_once(
    recipe: Path, launch: Launch, tmp_path: Path, uninterrupted: Callable[..., Path]
) -> None:
    """In the experts' load of a checkpoint that a signal inside the second step leaves."""
    options = ("gradient_accumulation_steps=64", "max_steps=2", "save_steps=1", "moe.balance_coefficient=0")
    whole, run = uninterrupted(recipe, launch, *options), tmp_path / "run"
    process = launch(recipe, f"output_dir={run}", *options, "save_steps=100")
    wait_for(process, lambda: len(losses(run)) == 1)
    time.sleep(0.3)  # somewhere inside the second step
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert "stopped at step 1 of 2" in err
    expected, found = (load_file(one / "checkpoint-1" / "expert_load.safetensors") for one in (whole, run))
    assert int(expected["counted"].sum()) > 0
    assert expected["counted"].tolist() == found["counted"].tolist()


@pytest.mark.slow
def test_an_evaluation_is_left_and_the_step_before_it_is_saved(
    dense: Path, launch: Launch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (
        "data.train_split=val",
        "data.eval_split=train",  # the larger one: time enough for a signal
        "eval_strategy=steps",
        "eval_steps=2",
        "save_steps=100",
        "per_device_eval_batch_size=1",
        "max_steps=4",
    )
    process = launch(dense, *options)
    wait_for(process, lambda: len(losses(run)) == 2)  # logged, then evaluated
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED_STATUS, err
    assert "stopped at step 2 of 4" in err
    assert not [line for line in metrics(run) if "eval_loss" in line]
    finish(launch, dense, run, *options)
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["loss"]["eval"] > 0


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_spares_what_is_complete(
    dense: Path, launch: Launch, small_disk: Path, uninterrupted: Callable[..., Path]
) -> None:
    options = ("max_steps=12", "save_steps=1")
    whole, run = uninterrupted(dense, launch, *options), small_disk / "run"
    process = launch(dense, f"output_dir={run}", *options)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert re.search(
        r"error: step \d+ could not be saved to .*is complete and untouched\. Make room", err, re.DOTALL
    )
    complete, incomplete = checkpoints_in(run)
    assert incomplete == []  # what did not fit is gone again
    step = complete[-1].name
    assert same_weights(complete[-1], whole / step)

    # With a limit the same disk is large enough, for this run and to its end.
    finish(launch, dense, run, *options, "save_total_limit=1")
    assert same_weights(run / "checkpoint-12", whole / "checkpoint-12")


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_is_not_in_the_bucket_has_not_ended_well(
    dense: Path,
    launch: Launch,
    tmp_path: Path,
    corpus_environment: dict[str, str],
    store_server: EmbeddedStore,
) -> None:
    run = tmp_path / "run"
    with EmbeddedStore(tmp_path / "buckets") as server:
        port = int(server.endpoint_url.rpartition(":")[2])
        store = ObjectStore(server.settings("other"))
        store.create_bucket_if_missing()
        # The corpus lies in the same store as the checkpoints: copy it over, then stop that store in mid-run.
        elsewhere = ObjectStore(store_server.settings(corpus_environment["OVH_S3_BUCKET"]))
        for info in elsewhere.list():
            store.put_bytes(info.key, elsewhere.get_bytes(info.key))
        environment = {**server.environment(), "OVH_S3_BUCKET": "other", "OVH_S3_CHECKPOINT_BUCKET": "other"}
        # Not early: the one group of this corpus is in memory at the first step, so only the upload misses the store.
        options = ("checkpoint.mirror=true", "checkpoint.patience_minutes=0.02", "stream.early_start=false")
        options = (*options, "max_steps=8")
        process = launch(dense, *options, **environment)
        wait_for(process, lambda: len(losses(run)) >= 1)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "checkpoint-8 is not in s3://other/runs/run/" in err
    assert not (run / "summary.json").exists()
    assert (run / "checkpoint-8" / STREAM_STATE).exists()
    with EmbeddedStore(tmp_path / "buckets", port) as server:
        out = finish(launch, dense, run, *options, **environment)
        assert "checkpoint-8 is in s3://other/runs/run/step-8" in out
    assert (run / "summary.json").exists()
