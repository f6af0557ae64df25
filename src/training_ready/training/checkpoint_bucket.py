"""Which checkpoints of a run lie in the bucket, are they whole, and how do they come back?

::

    <prefix>step-<N>/<file of the checkpoint> ...
                     parts/<attempt>-<node>.json    what a node with a disk of its own has uploaded
                     manifest.json                  every file, its size and sha256; written last: the step exists
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from training_ready import TrainingReadyError
from training_ready.storage.objects import ObjectNotFound, ObjectStore
from training_ready.training.checkpoints import flush_to_disk, folder_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PARTS = "parts/"
_STEP = re.compile(r"step-(\d+)/(.+)")
_CHUNK = 8 << 20


class DamagedCheckpoint(TrainingReadyError):
    """A checkpoint in the bucket has a manifest, but not every file that it promises."""


class FileFacts(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str


class CheckpointManifest(BaseModel):
    """The files of a checkpoint by their path in its folder; of a part, those of one node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    step: int
    files: dict[str, FileFacts]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileFacts]) -> dict[str, FileFacts]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or {"..", "."} & set(name.split("/")) or "\\" in name or not path.parts:
                raise ValueError(f"{name!r} leads out of the checkpoint's folder")
        return files


class BucketCheckpoints:
    """The checkpoints of one run below ``prefix``, which ends in a slash."""

    def __init__(self, store: ObjectStore, prefix: str, run: str) -> None:
        self.store, self.prefix, self.run = store, prefix, run

    @property
    def uri(self) -> str:
        return self.store.uri(self.prefix)

    def key(self, step: int, name: str) -> str:
        return f"{self.prefix}step-{step}/{name}"

    def survey(self) -> tuple[list[int], list[int]]:
        """(complete, incomplete) steps in the bucket, oldest first."""
        names: dict[int, set[str]] = {}
        for info in self.store.list(self.prefix):
            match = _STEP.fullmatch(info.key.removeprefix(self.prefix))
            if match:
                names.setdefault(int(match[1]), set()).add(match[2])
        complete = {step for step, found in names.items() if MANIFEST in found}
        return sorted(complete), sorted(names.keys() - complete)

    def manifest(self, step: int) -> CheckpointManifest:
        """
        Raises:
            ObjectNotFound: the step is not complete.
            DamagedCheckpoint: the manifest cannot be read, or is another run's.
        """
        key = self.key(step, MANIFEST)
        try:
            manifest = CheckpointManifest.model_validate_json(self.store.get_bytes(key))
        except ValidationError as error:
            faults = "; ".join(detail["msg"] for detail in error.errors())
            raise DamagedCheckpoint(
                f"{self.store.uri(key)} is not a checkpoint's manifest: {faults}"
            ) from error
        if (manifest.run, manifest.step) != (self.run, step):
            raise DamagedCheckpoint(
                f"{self.store.uri(key)} belongs to step {manifest.step} of the run {manifest.run!r}, not to step "
                f"{step} of {self.run!r}: two runs must not share a place in the bucket"
            )
        return manifest

    def publish(self, manifest: CheckpointManifest) -> None:
        """Write the manifest, after every file that it names has been compared with what was sent."""
        self.store.put_bytes(self.key(manifest.step, MANIFEST), manifest.model_dump_json(indent=1).encode())

    def unpublish(self, step: int) -> None:
        """Take the manifest away: the step no longer counts as complete."""
        self.store.delete(self.key(step, MANIFEST))

    def remove(self, step: int) -> None:
        """Delete a step, its manifest first."""
        self.unpublish(step)
        for info in list(self.store.list(self.key(step, ""))):
            self.store.delete(info.key)

    def download(self, step: int, output_dir: Path, progress: Callable[[int], None] | None = None) -> Path:
        """Bring a step to ``output_dir`` as a complete local checkpoint; files that are there already are kept.

        Args:
            progress: called with numbers of bytes just received.

        Raises:
            DamagedCheckpoint: a file is missing in the bucket, or is not what the manifest says.
            StorageError: the bucket cannot be read.
        """
        manifest = self.manifest(step)
        target = folder_of(output_dir, step)
        coming = target.with_name(f".{target.name}.download")
        self._refuse_unless_it_fits(manifest, coming)
        for name, facts in manifest.files.items():
            self._fetch(step, name, facts, coming / name, progress)
        flush_to_disk(coming)
        if target.exists():  # what an interrupted save left there
            shutil.rmtree(target)
        os.replace(coming, target)
        return target

    def _refuse_unless_it_fits(self, manifest: CheckpointManifest, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = sum(facts.bytes for facts in manifest.files.values())
        here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(folder).free
        if wanted - here > free:
            raise TrainingReadyError(
                f"{self.store.uri(self.key(manifest.step, ''))} needs {wanted - here:,} bytes more on the disk of "
                f"{folder.parent} ({wanted:,} in all, {here:,} there), and {free:,} are free. Make room, or give the "
                "run an output_dir on a larger disk."
            )

    def _fetch(
        self, step: int, name: str, facts: FileFacts, path: Path, progress: Callable[[int], None] | None
    ) -> None:
        if path.exists() and path.stat().st_size == facts.bytes and _sha256(path) == facts.sha256:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        uri = self.store.uri(self.key(step, name))
        digest, received = hashlib.sha256(), 0
        try:
            with self.store.open(self.key(step, name)) as source, path.open("wb") as file:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                    received += len(chunk)
                    if progress:
                        progress(len(chunk))
        except ObjectNotFound as error:
            raise DamagedCheckpoint(f"{uri} is missing, though the manifest of its step names it") from error
        if digest.hexdigest() != facts.sha256:
            path.unlink()
            raise DamagedCheckpoint(
                f"{uri} is not what the manifest of its step says: {received:,} bytes with sha256 "
                f"{digest.hexdigest()[:12]} instead of {facts.bytes:,} bytes with {facts.sha256[:12]}"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
