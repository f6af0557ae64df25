"""Which bytes does the hub hold? One file per content, named by its sha256, fsynced before it is named.

root/
  blobs/ab/ab12…   shared by all repositories of the hub
  incoming/        uploads in flight; emptied when the hub starts
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Container, Iterator
from pathlib import Path

from training_ready import TrainingReadyError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubError(TrainingReadyError):
    """A request that the hub refuses. `status` is the HTTP status, `code` the hub protocol's X-Error-Code."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class BlobStore:
    """Content-addressed files under `root`. Safe to use from many threads: no two writers share a name."""

    def __init__(self, root: Path) -> None:
        self._blobs = root / "blobs"
        self._incoming = root / "incoming"
        for folder in (self._blobs, self._incoming):
            folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._incoming.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def new_incoming(self) -> Path:
        """A fresh name on the same file system as everything else, so that a rename moves it."""
        return self._incoming / uuid.uuid4().hex

    def path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise HubError(f"{sha256!r} is not a sha256", status=422)
        return self._blobs / sha256[:2] / sha256

    def size(self, sha256: str) -> int | None:
        """Bytes of a stored blob, None when there is none."""
        path = self.path(sha256)
        return path.stat().st_size if path.is_file() else None

    def put(self, data: bytes) -> str:
        """Store bytes that are already in memory; returns their sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if self.size(sha256) != len(data):
            incoming = IncomingBlob(self)
            try:
                incoming.write(data)
                incoming.keep()
            finally:
                incoming.discard()
        return sha256

    def damaged(self) -> Iterator[Path]:
        """Re-read every blob; yield those whose content no longer has the hash in their name."""
        for path in sorted(self._blobs.glob("??/*")):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != path.name:
                    yield path

    def set_aside(self, sha256: str) -> Path:
        """Move a damaged blob out of the way, into `damaged/`, so that its next upload is stored anew."""
        target = self._blobs.parent / "damaged" / sha256
        target.parent.mkdir(exist_ok=True)
        os.replace(self.path(sha256), target)
        return target

    def delete_except(self, wanted: Container[str]) -> int:
        """Delete every blob whose sha256 is not in `wanted`; returns the bytes freed."""
        freed = 0
        for path in self._blobs.glob("??/*"):
            if path.name not in wanted:
                freed += path.stat().st_size
                path.unlink()
        return freed


class IncomingBlob:
    """An upload in flight: hashed while it is written, kept only if it is what was announced."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._path = blobs.new_incoming()
        self._file = self._path.open("xb")
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def keep(self, *, sha256: str | None = None, size: int | None = None) -> None:
        """Move into the blobs. Raises HubError (422) when the content is not what was announced."""
        received = self._digest.hexdigest()
        if sha256 not in (None, received) or size not in (None, self.size):
            raise HubError(
                f"the upload arrived as sha256 {received} ({self.size} bytes) but was announced as {sha256} "
                f"({size} bytes); nothing was stored, send it again",
                status=422,
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        target = self._blobs.path(received)
        target.parent.mkdir(exist_ok=True)
        os.replace(self._path, target)
        sync_folder(target.parent)

    def discard(self) -> None:
        """Remove what was not kept; does nothing after :meth:`keep`."""
        self._file.close()
        self._path.unlink(missing_ok=True)
