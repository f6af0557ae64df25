"""Uploads that meet what buckets and machines do: outages, lost parts, old credentials, kill -9."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.training.checkpoint_bucket import BucketCheckpoints
from training_ready.training.checkpoint_mirror import CheckpointMirror, MirrorError, MirrorPart
from training_ready.training.checkpoint_upload import upload_file
from training_ready.training.checkpoints import STREAM_STATE

PART = MirrorPart(attempt="one")
MIB = 1 << 20


def checkpoint(run: Path, step: int, *, size: int = 1000) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(size))
    (folder / "optimizer.pt").write_bytes(os.urandom(size))
    (folder / STREAM_STATE).write_text("{}", encoding="utf-8")
    return folder


def tiny(store: ObjectStore) -> BucketCheckpoints:
    return BucketCheckpoints(store, "runs/tiny/", "tiny")


def intact(bucket: BucketCheckpoints, where: Path) -> list[int]:
    """Every complete step of the bucket, after it was downloaded and compared with its manifest."""
    found, _ = bucket.survey()
    for step in found:
        bucket.download(step, where)
    return found


# --------------------------------------------------------------------------- outages
def test_an_outage_is_waited_out(
    tmp_path: Path, proxy: Any, proxied: ObjectStore, store: ObjectStore
) -> None:
    folder = checkpoint(tmp_path, 4, size=17 * MIB)
    proxy.down = True
    threading.Timer(1.5, lambda: setattr(proxy, "down", False)).start()
    with CheckpointMirror(tiny(proxied), PART, patience=60) as mirror:
        mirror.add(folder)
    assert intact(tiny(store), tmp_path / "back") == [4]


def test_a_bucket_that_stays_away_is_reported_and_costs_nothing_but_the_mirror(
    tmp_path: Path, proxy: Any, proxied: ObjectStore, store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    proxy.always = None
    with CheckpointMirror(tiny(proxied), PART, patience=0.3) as mirror:
        proxy.down = True
        mirror.add(first)
        while mirror.pending:
            time.sleep(0.02)
        mirror.add(second)  # training has gone on
        assert "still only on this disk" in caplog.text
        with pytest.raises(
            MirrorError, match=r"checkpoint-8 is not in s3://.*(?s:.*)resume_from_checkpoint=auto"
        ):
            mirror.finish()
        proxy.down = False  # at the end it is tried once more
    assert intact(tiny(store), tmp_path / "back") == [8]
    assert before == {path: path.read_bytes() for path in before}


def test_a_store_that_is_restarted_and_forgets_its_uploads(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "run", 4, size=70 * MIB)
    with EmbeddedStore(tmp_path / "buckets") as server:
        port = int(server.endpoint_url.rpartition(":")[2])
        store = ObjectStore(server.settings("gone"))
        store.create_bucket_if_missing()
        mirror = CheckpointMirror(tiny(store), PART, patience=60)
        mirror.add(folder)
        time.sleep(0.3)  # parts are under way
    time.sleep(0.5)  # nobody listens
    with EmbeddedStore(tmp_path / "buckets", port) as server, mirror:
        mirror.finish()
        assert intact(tiny(ObjectStore(server.settings("gone"))), tmp_path / "back") == [4]


def test_a_bucket_that_is_removed_and_comes_back(tmp_path: Path, moto_store: ObjectStore) -> None:
    bucket = moto_store.bucket
    moto_store.attempt(lambda client: client.delete_bucket(Bucket=bucket))
    threading.Timer(1.0, lambda: ObjectStore(moto_store.settings).create_bucket_if_missing()).start()
    with CheckpointMirror(tiny(moto_store), PART, patience=60) as mirror:
        mirror.add(checkpoint(tmp_path, 4))
    assert intact(tiny(moto_store), tmp_path / "back") == [4]


def test_an_expired_token_is_renewed_from_the_environment(
    tmp_path: Path, proxy: Any, proxied: ObjectStore, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, keys = checkpoint(tmp_path, 4), proxied.settings
    monkeypatch.chdir(tmp_path)
    for name in ("OVH_S3_ACCESS_KEY", "OVH_ACCESS_KEY", "OVH_S3_SECRET_KEY", "OVH_SECRET_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("ACCESS_KEY_ID", keys.access_key_id), ("SECRET_ACCESS_KEY", keys.secret_access_key)):
        monkeypatch.setenv(f"AWS_{name}", str(value))
    monkeypatch.setenv("AWS_SESSION_TOKEN", "old")
    settings = replace(keys, session_token="old", sources={"access_key_id": "AWS_ACCESS_KEY_ID"})
    proxy.expired_token = "old"
    threading.Timer(1.0, lambda: os.environ.__setitem__("AWS_SESSION_TOKEN", "new")).start()
    with CheckpointMirror(tiny(ObjectStore(settings)), PART, patience=60) as mirror:
        mirror.add(folder)
    assert intact(tiny(store), tmp_path / "back") == [4]


# --------------------------------------------------------------------------- what arrives
def test_a_file_that_is_there_is_not_sent_again(tmp_path: Path, proxy: Any, proxied: ObjectStore) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(17 * MIB))
    sent = upload_file(proxied, "runs/tiny/step-4/model.safetensors", path, patience=5)
    puts = [seen for seen in proxy.seen if seen.method == "PUT"]
    assert sent.bytes == 17 * MIB
    assert len(puts) == 2  # two parts
    assert upload_file(proxied, "runs/tiny/step-4/model.safetensors", path, patience=5) == sent
    assert [seen for seen in proxy.seen if seen.method == "PUT"] == puts
    path.write_bytes(os.urandom(17 * MIB))
    assert upload_file(proxied, "runs/tiny/step-4/model.safetensors", path, patience=5) != sent


def test_a_file_that_cannot_be_read_is_no_reason_to_wait(tmp_path: Path, store: ObjectStore) -> None:
    folder = checkpoint(tmp_path, 4)
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer.pt").symlink_to(tmp_path / "nowhere")
    mirror = CheckpointMirror(tiny(store), PART, patience=1e6)
    mirror.add(folder)
    with pytest.raises(MirrorError, match=r"optimizer\.pt"):
        mirror.finish()
    assert tiny(store).survey() == ([], [4])


# --------------------------------------------------------------------------- the queue
def test_the_bucket_is_at_most_two_behind_and_the_newest_wins(
    tmp_path: Path, proxy: Any, proxied: ObjectStore, store: ObjectStore
) -> None:
    folders = [checkpoint(tmp_path, step) for step in (4, 8, 12, 16)]
    proxy.down = True
    with CheckpointMirror(tiny(proxied), PART, patience=60) as mirror:
        mirror.add(folders[0])
        while not proxy.seen:  # the first is on its way
            time.sleep(0.01)
        for folder in folders[1:]:
            mirror.add(folder)
            assert mirror.pending == {folders[0], folder}
        proxy.down = False
    assert intact(tiny(store), tmp_path / "back") == [4, 16]


def test_an_interrupted_upload_is_caught_up_at_the_next_start(tmp_path: Path, store: ObjectStore) -> None:
    checkpoint(tmp_path, 4)
    with CheckpointMirror(tiny(store), PART) as mirror:
        mirror.catch_up(tmp_path)
    assert intact(tiny(store), tmp_path / "back") == [4]
    with CheckpointMirror(tiny(store), PART) as mirror:
        mirror.catch_up(tmp_path)
        assert not mirror.pending


# --------------------------------------------------------------------------- several nodes
def test_two_nodes_make_one_checkpoint(tmp_path: Path, store: ObjectStore) -> None:
    ours = checkpoint(tmp_path / "node0", 4)
    theirs = tmp_path / "node1" / "checkpoint-4"
    theirs.mkdir(parents=True)
    (theirs / "rng_state_1.pth").write_bytes(os.urandom(100))
    (theirs / "part.json").write_text("{}", encoding="utf-8")
    bucket = tiny(store)
    stale = MirrorPart(attempt="zero", node=1)
    with CheckpointMirror(bucket, stale) as mirror:
        mirror.add(theirs)
    first = CheckpointMirror(bucket, MirrorPart(attempt="one", others=(1,)), patience=60)
    first.add(ours)
    time.sleep(1)
    assert bucket.survey() == ([], [4])  # the part of an earlier start does not count
    with CheckpointMirror(bucket, MirrorPart(attempt="one", node=1)) as second:
        second.add(theirs)
    with first:
        first.finish()
    back = bucket.download(4, tmp_path / "back")
    assert (back / "rng_state_1.pth").read_bytes() == (theirs / "rng_state_1.pth").read_bytes()
    assert not (back / "part.json").exists()


# --------------------------------------------------------------------------- kill -9
_RUN = textwrap.dedent(
    """
    import os, pathlib, random, sys, time
    from training_ready.storage.objects import ObjectStore
    from training_ready.storage.settings import StorageSettings
    from training_ready.training.checkpoint_bucket import BucketCheckpoints
    from training_ready.training.checkpoint_mirror import CheckpointMirror, MirrorPart
    from training_ready.training.checkpoints import StreamState, checkpoints_in, flush_to_disk, make_room, step_of

    run = pathlib.Path(sys.argv[1])
    store = ObjectStore(StorageSettings.from_environment())
    bucket = BucketCheckpoints(store, "runs/tiny/", "tiny")
    with CheckpointMirror(bucket, MirrorPart(attempt=str(os.getpid())), keep=2) as mirror:
        mirror.catch_up(run)
        complete, _ = checkpoints_in(run)
        step = step_of(complete[-1]) if complete else 0
        print("begun", flush=True)
        while True:
            step += 1
            make_room(run, step, limit=2, protected=mirror.pending)
            folder = run / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            for name, size in (("model.safetensors", 17 << 20), ("optimizer.pt", 1 << 20), ("trainer_state.json", 0)):
                (folder / name).write_bytes(random.Random(step).randbytes(size))
            flush_to_disk(folder)
            (folder / "stream_state.json").write_text("{}")
            mirror.add(folder)
            make_room(run, step, limit=2, protected=mirror.pending)
            time.sleep(0.1)
    """
)


def killed_at_random_moments(
    times: int, run: Path, store: ObjectStore, server: EmbeddedStore, seed: int
) -> None:
    """Save and upload without end, kill -9, look: whatever counts as complete is whole, here and in the bucket."""
    chance, bucket, newest = random.Random(seed), tiny(store), 0
    environment = {**os.environ, **server.environment(), "OVH_S3_BUCKET": store.bucket}
    run.mkdir()
    for _ in range(times):
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(run)], env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        while max(bucket.survey()[0], default=0) <= newest:  # at least one more has arrived
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in run.glob("checkpoint-*"):
            if (folder / STREAM_STATE).exists():
                expected = random.Random(int(folder.name[11:])).randbytes(17 << 20)
                assert (folder / "model.safetensors").read_bytes() == expected
        complete = intact(bucket, run.with_name("back"))
        assert len(complete) <= 3  # two stay; a third is there until the oldest has gone
        assert max(complete, default=0) >= newest
        newest = max(complete, default=0)
    assert newest > 0


def test_kill_9_leaves_only_whole_checkpoints(
    tmp_path: Path, store: ObjectStore, store_server: EmbeddedStore
) -> None:
    killed_at_random_moments(3, tmp_path / "run", store, store_server, seed=1)


@pytest.mark.slow
def test_kill_9_twenty_times_in_a_row(
    tmp_path: Path, store: ObjectStore, store_server: EmbeddedStore
) -> None:
    killed_at_random_moments(20, tmp_path / "run", store, store_server, seed=2)


# --------------------------------------------------------------------------- a full disk
@pytest.mark.parametrize("small_disk", ["8m"], indirect=True)
def test_a_full_disk_stops_a_download_before_it_begins(
    tmp_path: Path, store: ObjectStore, small_disk: Path
) -> None:
    bucket = tiny(store)
    with CheckpointMirror(bucket, PART) as mirror:
        mirror.add(checkpoint(tmp_path, 4, size=5 * MIB))
    with pytest.raises(Exception, match=r"are free. Make room"):
        bucket.download(4, small_disk)
    with contextlib.suppress(FileNotFoundError):
        assert list((small_disk / "checkpoint-4").iterdir()) == []
