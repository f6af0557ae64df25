"""How does every checkpoint get a second home in the bucket without holding up the training?

A thread uploads one checkpoint while the newest other one waits; a third takes the place of the one that waits. So the
bucket is never more than two checkpoints behind, and nothing but a queue of one stands between it and the step loop.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from training_ready import TrainingReadyError
from training_ready.storage.objects import ObjectNotFound
from training_ready.training.checkpoint_bucket import PARTS, BucketCheckpoints, CheckpointManifest, FileFacts
from training_ready.training.checkpoint_upload import until_it_works, upload_file
from training_ready.training.checkpoints import PART, checkpoints_in, step_of

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_TURN_SECONDS = 0.0005


class MirrorError(TrainingReadyError):
    """A checkpoint is complete on the disk, but not in the bucket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MirrorPart:
    """Which part of each checkpoint this process uploads.

    Node 0 writes the manifest, once the parts of the ``others`` are there; ``attempt`` is the same on all nodes of
    one start, so that no part of an earlier start is taken for one of this.
    """

    attempt: str
    node: int = 0
    others: tuple[int, ...] = ()


class CheckpointMirror:
    """Uploads checkpoints in the background. Use as a context manager, which waits for the last one at its end."""

    def __init__(
        self, bucket: BucketCheckpoints, part: MirrorPart, *, keep: int | None = None, patience: float = 900.0
    ) -> None:
        """
        Args:
            keep: complete steps that stay in the bucket; None keeps all.
            patience: seconds without any success after which a checkpoint's upload is given up.
        """
        self._bucket, self._part, self._keep, self._patience = bucket, part, keep, patience
        self._changed = threading.Condition()
        self._uploading: Path | None = None
        self._waiting: Path | None = None
        self._newest: Path | None = None
        self._failures: dict[Path, Exception] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="checkpoint mirror", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> frozenset[Path]:
        """Checkpoints that are being uploaded or wait for it: their folders must stay."""
        with self._changed:
            return frozenset(path for path in (self._uploading, self._waiting) if path is not None)

    def add(self, checkpoint: Path) -> None:
        """Queue a complete checkpoint; says loudly that earlier ones were given up."""
        with self._changed:
            if self._waiting is not None:
                logger.info(f"{self._waiting.name} is not mirrored: {checkpoint.name} came before its turn")
            self._waiting = self._newest = checkpoint
            lost = [str(error) for error in self._failures.values()]
            self._changed.notify_all()
        for message in lost:
            logger.error(f"still only on this disk: {message}")

    def catch_up(self, output_dir: Path) -> None:
        """Queue the newest complete local checkpoint if the bucket does not have it: an upload was interrupted.

        Not where it takes several nodes: they continue from what is in the bucket already.
        """
        complete, _ = checkpoints_in(output_dir)
        if complete and not self._part.others and step_of(complete[-1]) not in self._bucket.survey()[0]:
            self.add(complete[-1])

    def finish(self) -> None:
        """Wait until nothing is left to upload; one that was given up is tried once more.

        Raises:
            MirrorError: the newest checkpoint did not reach the bucket.
        """
        with self._changed:
            if self._newest in self._failures and self._waiting is None:
                self._waiting = self._newest
                self._changed.notify_all()
            if self.pending:
                logger.info(f"waiting until the last checkpoint has reached {self._bucket.uri}")
            self._changed.wait_for(lambda: self._uploading is None and self._waiting is None)
            failure = self._failures.get(self._newest) if self._newest else None
        if failure is not None:
            raise MirrorError(
                f"{failure}\nThe checkpoint itself is whole: {self._newest}. When the bucket answers again, start the "
                "same command with resume_from_checkpoint=auto: it uploads what is missing."
            ) from failure

    def __enter__(self) -> CheckpointMirror:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except MirrorError as failure:
            if error is None:
                raise
            logger.error(failure)  # beside the error that ended the run, which is the one to be raised
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                self._uploading, self._waiting = self._waiting, None
                checkpoint = self._uploading
            failure: Exception | None = None
            try:
                with _short_turns():
                    self._upload(checkpoint)
            except Exception as error:
                failure = error
                logger.error(
                    f"{checkpoint} could not be mirrored to {self._bucket.uri}; training goes on. {error}",
                    exc_info=not isinstance(error, TrainingReadyError),
                )
            with self._changed:
                self._uploading = None
                if failure is None:
                    self._failures.clear()  # a newer one is there: what older ones lacked no longer matters
                else:
                    self._failures[checkpoint] = MirrorError(
                        f"{checkpoint} is not in {self._bucket.uri}: {failure}"
                    )
                self._changed.notify_all()

    def _upload(self, checkpoint: Path) -> None:
        step, started = step_of(checkpoint), time.monotonic()
        if self._part.node == 0:
            until_it_works(lambda: self._bucket.unpublish(step), self._patience)
        files = {
            name: upload_file(self._bucket.store, self._bucket.key(step, name), path, patience=self._patience)
            for name, path in _files_of(checkpoint)
        }
        own = CheckpointManifest(run=self._bucket.run, step=step, files=files)
        if self._part.node != 0:
            key = self._part_key(step, self._part.node)
            until_it_works(
                lambda: self._bucket.store.put_bytes(key, own.model_dump_json().encode()), self._patience
            )
            return
        for node in self._part.others:
            _add(files, self._part_of(step, node).files, node)
        whole = CheckpointManifest(run=self._bucket.run, step=step, files=files)
        until_it_works(lambda: self._bucket.publish(whole), self._patience)
        size = sum(facts.bytes for facts in files.values())
        seconds = time.monotonic() - started
        logger.info(
            f"{checkpoint.name} is in {self._bucket.store.uri(self._bucket.key(step, ''))}: {len(files)} files, "
            f"{size:,} bytes in {seconds:.1f} s"
        )
        self._rotate()

    def _part_key(self, step: int, node: int) -> str:
        return self._bucket.key(step, f"{PARTS}{self._part.attempt}-{node}.json")

    def _part_of(self, step: int, node: int) -> CheckpointManifest:
        """What another node uploaded of this step, when it has."""
        key, deadline = self._part_key(step, node), time.monotonic() + self._patience
        while True:
            try:
                data = until_it_works(lambda: self._bucket.store.get_bytes(key), self._patience)
                return CheckpointManifest.model_validate_json(data)
            except ObjectNotFound as error:
                if time.monotonic() > deadline:
                    raise MirrorError(
                        f"node {node} has not written {self._bucket.store.uri(key)} in {self._patience:.0f} s: see the "
                        "log of that node"
                    ) from error
            except ValidationError as error:
                raise MirrorError(f"{self._bucket.store.uri(key)} is damaged: {error}") from error
            time.sleep(_POLL_SECONDS)

    def _rotate(self) -> None:
        if self._keep is None:
            return
        complete, incomplete = until_it_works(self._bucket.survey, self._patience)
        for step in [*complete[: -self._keep], *(one for one in incomplete if one < complete[-1])]:
            until_it_works(lambda step=step: self._bucket.remove(step), self._patience)  # type: ignore[misc]
            logger.info(
                f"removed step {step} from {self._bucket.uri}: checkpoint.keep_remote is {self._keep}"
            )


@contextmanager
def _short_turns() -> Iterator[None]:
    """A thread that wants the interpreter gets it after half a millisecond, not five: the training thread asks often.

    It then waited 4 ms of a step instead of 7 to 15 (docs/checkpoints.md).
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _files_of(checkpoint: Path) -> Iterator[tuple[str, Path]]:
    """Path inside the checkpoint, and file; the file that says that a part is complete stays where it is."""
    for path in sorted(checkpoint.rglob("*")):
        if not path.is_dir() and path.name != PART:
            yield path.relative_to(checkpoint).as_posix(), path


def _add(files: dict[str, FileFacts], more: dict[str, FileFacts], node: int) -> None:
    for name, facts in more.items():
        if files.setdefault(name, facts) != facts:
            raise MirrorError(
                f"nodes wrote different files of the name {name}: {files[name].sha256[:12]} and, on node {node}, "
                f"{facts.sha256[:12]}. Give all nodes one output_dir on a shared disk."
            )
