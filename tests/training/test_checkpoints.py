"""Which checkpoints count, which are deleted, and how they come back from the bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training_ready import TrainingReadyError
from training_ready.storage.objects import ObjectStore
from training_ready.training.checkpoint_bucket import BucketCheckpoints, CheckpointManifest, DamagedCheckpoint
from training_ready.training.checkpoint_mirror import CheckpointMirror, MirrorPart
from training_ready.training.checkpoints import (
    STREAM_STATE,
    ResumeError,
    StreamState,
    copies_on_disk,
    make_room,
)
from training_ready.training.nodes import RunNodes
from training_ready.training.resume import checkpoint_to_resume

ALONE = RunNodes(node=0, keeper=True, first=True, attempt="one")


def checkpoint(run: Path, step: int, *, complete: bool = True, size: int = 1000) -> Path:
    """A folder such as a save leaves, filled with bytes of its own."""
    folder = run / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(size))
    (folder / "global_step" / "rank_0.pt").write_bytes(b"")
    if complete:
        (folder / STREAM_STATE).write_text(json.dumps({"step": step}), encoding="utf-8")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


@pytest.fixture
def bucket(store: ObjectStore) -> BucketCheckpoints:
    return BucketCheckpoints(store, "runs/tiny/", "tiny")


def mirror_all(bucket: BucketCheckpoints, *folders: Path, keep: int | None = None) -> None:
    with CheckpointMirror(bucket, MirrorPart(attempt="one"), keep=keep) as mirror:
        for folder in folders:
            mirror.add(folder)
            mirror.finish()


# --------------------------------------------------------------------------- on the disk
def test_room_is_made_before_a_save_and_the_newest_complete_one_stays(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 16, complete=False)

    make_room(tmp_path, 16, limit=3)  # two stay, the third is the one that is about to be written
    assert steps(tmp_path) == ["checkpoint-12", "checkpoint-8"]
    make_room(tmp_path, 16, limit=1)  # nothing complete would be left while the new one is written
    assert steps(tmp_path) == ["checkpoint-12"]
    checkpoint(tmp_path, 16)
    make_room(tmp_path, 16, limit=1)
    assert steps(tmp_path) == ["checkpoint-16"]


def test_without_a_limit_only_what_is_incomplete_goes(tmp_path: Path) -> None:
    for step in (4, 8, 100):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 104, complete=False)
    (tmp_path / "checkpoint-best").mkdir()
    make_room(tmp_path, 108, limit=None)
    assert steps(tmp_path) == ["checkpoint-100", "checkpoint-4", "checkpoint-8", "checkpoint-best"]


def test_a_protected_checkpoint_is_not_deleted(tmp_path: Path) -> None:
    folders = [checkpoint(tmp_path, step) for step in (4, 8, 12)]
    make_room(tmp_path, 16, limit=1, protected={folders[0]})
    assert steps(tmp_path) == ["checkpoint-12", "checkpoint-4"]
    assert len(steps(tmp_path)) + 1 <= (copies_on_disk(1, mirrored=True) or 0)


def test_what_a_person_says_is_checked(tmp_path: Path) -> None:
    four, eight = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    with pytest.raises(ResumeError, match=r"holds checkpoint-8.*resume_from_checkpoint=auto"):
        checkpoint_to_resume(tmp_path, None, None, ALONE)
    (four / STREAM_STATE).write_text(eight.name, encoding="utf-8")
    with pytest.raises(ResumeError, match=r"no readable stream_state\.json"):
        checkpoint_to_resume(tmp_path, str(four), None, ALONE)
    assert checkpoint_to_resume(tmp_path / "other", None, None, ALONE) is None
    assert checkpoint_to_resume(tmp_path / "other", "auto", None, ALONE) is None


def test_weights_without_their_optimizer_are_not_trained_further(tmp_path: Path) -> None:
    state = StreamState(position=8, step=4, global_batch=2, manifests={}, tokens="", order={})
    folder = checkpoint(tmp_path, 4)
    with pytest.raises(ResumeError, match=r"weights only.*step 4 of 12"):
        state.refuse_weights_only(folder, 12)
    state.refuse_weights_only(folder, 4)  # nothing is left to train: only to upload and to report
    (folder / "rng_state_0.pth").touch()
    state.refuse_weights_only(folder, 12)


def test_going_back_behind_a_newer_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    four = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 8)
    monkeypatch.setattr(StreamState, "read", classmethod(lambda cls, folder: None))
    with pytest.raises(ResumeError, match="step 8 is complete too"):
        checkpoint_to_resume(tmp_path, str(four), None, ALONE)


# --------------------------------------------------------------------------- in the bucket
def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path, bucket: BucketCheckpoints) -> None:
    mirror_all(bucket, checkpoint(tmp_path / "a", 4), checkpoint(tmp_path / "a", 12, size=40 << 20))
    assert bucket.survey() == ([4, 12], [])

    found = checkpoint_to_resume(tmp_path / "b", "auto", bucket, ALONE)
    assert found == tmp_path / "b" / "checkpoint-12"
    assert content(found) == content(tmp_path / "a" / "checkpoint-12")
    assert steps(tmp_path / "b") == ["checkpoint-12"]


def test_the_newer_of_disk_and_bucket_wins(tmp_path: Path, bucket: BucketCheckpoints) -> None:
    mirror_all(bucket, checkpoint(tmp_path / "a", 8))
    newer = checkpoint(tmp_path / "b", 12)
    assert checkpoint_to_resume(tmp_path / "b", "auto", bucket, ALONE) == newer
    checkpoint(tmp_path / "c", 4)
    assert checkpoint_to_resume(tmp_path / "c", "auto", bucket, ALONE) == tmp_path / "c" / "checkpoint-8"
    with pytest.raises(ResumeError, match=r"s3://.*/runs/tiny/ already holds checkpoint-8"):
        checkpoint_to_resume(tmp_path / "new", None, bucket, ALONE)


def test_what_has_no_manifest_is_ignored_and_named(
    tmp_path: Path, bucket: BucketCheckpoints, caplog: pytest.LogCaptureFixture
) -> None:
    mirror_all(bucket, checkpoint(tmp_path / "a", 4), checkpoint(tmp_path / "a", 8))
    bucket.unpublish(8)
    checkpoint(tmp_path / "b", 9, complete=False)
    found = checkpoint_to_resume(tmp_path / "b", "auto", bucket, ALONE)
    assert found == tmp_path / "b" / "checkpoint-4"
    assert "checkpoint-9: incomplete" in caplog.text
    assert "runs/tiny/step-8: incomplete" in caplog.text


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    tmp_path: Path, bucket: BucketCheckpoints, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    mirror_all(bucket, checkpoint(tmp_path / "a", 4), checkpoint(tmp_path / "a", 8))
    key = bucket.key(8, "model.safetensors")
    if damage == "lost":
        bucket.store.delete(key)
    else:
        bucket.store.put_bytes(key, os.urandom(1000))
    with pytest.raises(DamagedCheckpoint, match=r"step-8/model\.safetensors"):
        bucket.download(8, tmp_path / "c")
    found = checkpoint_to_resume(tmp_path / "b", "auto", bucket, ALONE)
    assert found == tmp_path / "b" / "checkpoint-4"
    assert "step-8/model.safetensors" in caplog.text

    bucket.store.delete(bucket.key(4, "model.safetensors"))
    with pytest.raises(ResumeError, match=r"no checkpoint of .* is whole"):
        checkpoint_to_resume(tmp_path / "d", "auto", bucket, ALONE)


def test_a_manifest_cannot_write_outside_its_folder_or_pose_as_another_run(
    tmp_path: Path, bucket: BucketCheckpoints
) -> None:
    mirror_all(bucket, checkpoint(tmp_path / "a", 4))
    manifest = json.loads(bucket.store.get_bytes(bucket.key(4, "manifest.json")))
    for name in ("../escaped", "/etc/escaped", "a/../../escaped", "a\\b"):
        crooked = {**manifest, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}
        bucket.store.put_bytes(bucket.key(4, "manifest.json"), json.dumps(crooked).encode())
        with pytest.raises(DamagedCheckpoint, match="leads out"):
            bucket.download(4, tmp_path / "b")
    bucket.store.put_bytes(bucket.key(4, "manifest.json"), b"{")
    with pytest.raises(DamagedCheckpoint, match="not a checkpoint's manifest"):
        bucket.download(4, tmp_path / "b")
    bucket.publish(CheckpointManifest.model_validate(manifest))
    with pytest.raises(DamagedCheckpoint, match="belongs to step 4 of the run 'tiny'"):
        BucketCheckpoints(bucket.store, bucket.prefix, "other").download(4, tmp_path / "b")
    bucket.publish(
        CheckpointManifest.model_validate({**manifest, "files": {"big": {"bytes": 1 << 60, "sha256": ""}}})
    )
    with pytest.raises(TrainingReadyError, match="are free"):
        bucket.download(4, tmp_path / "b")


def test_an_interrupted_download_goes_on(tmp_path: Path, bucket: BucketCheckpoints) -> None:
    mirror_all(bucket, checkpoint(tmp_path / "a", 4, size=3_000_000))
    received: list[int] = []
    bucket.download(4, tmp_path / "b", received.append)
    whole = sum(received)
    coming = tmp_path / "b" / ".checkpoint-4.download"
    (tmp_path / "b" / "checkpoint-4").rename(coming)
    (coming / STREAM_STATE).write_text("half", encoding="utf-8")  # one file is wrong, one is not there
    received.clear()
    bucket.download(4, tmp_path / "b", received.append)
    assert 0 < sum(received) < whole / 100
    assert content(tmp_path / "b" / "checkpoint-4") == content(tmp_path / "a" / "checkpoint-4")


def test_only_the_newest_stay_in_the_bucket(tmp_path: Path, bucket: BucketCheckpoints) -> None:
    turns = sys.getswitchinterval()
    bucket.store.put_bytes(bucket.key(2, "model.safetensors"), b"left by an interrupted upload")
    mirror_all(bucket, *(checkpoint(tmp_path, step) for step in (4, 8, 12)), keep=2)
    assert bucket.survey() == ([8, 12], [])
    assert sys.getswitchinterval() == turns  # shortened only while an upload runs


def test_the_files_of_a_checkpoint_need_no_torch() -> None:
    """A process that only moves checkpoints starts in a blink; the tests of kill -9 rely on it too."""
    code = "import sys, training_ready.training.checkpoint_mirror; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
