"""Which bytes does the hub hold? One content per name, its sha256; shared by all models.

<place>/
  blobs/ab/ab12…   the contents
  damaged/ab12…    what `hub check` set aside
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterator

from training_ready import TrainingReadyError
from training_ready.release.places import Place

_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubError(TrainingReadyError):
    """A request that the hub refuses. `status` is the HTTP status, `code` the hub protocol's X-Error-Code."""

    def __init__(self, message: str, *, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class BlobStore:
    """Content-addressed bytes in a place. Safe to use from many threads: no two writers share a name."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def name(self, sha256: str) -> str:
        if not _SHA256.fullmatch(sha256):
            raise HubError(f"{sha256!r} is not a sha256", status=422)
        return f"blobs/{sha256[:2]}/{sha256}"

    def size(self, sha256: str) -> int | None:
        """Bytes of a stored content, None when there is none."""
        return self.place.size(self.name(sha256))

    def read(self, sha256: str) -> bytes:
        """A small content. Raises HubError (410) when it is gone."""
        data = self.place.read(self.name(sha256))
        if data is None:
            raise HubError(f"the content {sha256} is gone from {self.place.where}", status=410)
        return data

    def put(self, data: bytes) -> str:
        """Store bytes that are already in memory; returns their sha256."""
        sha256 = hashlib.sha256(data).hexdigest()
        if self.size(sha256) != len(data):
            self.place.write(self.name(sha256), data)
        return sha256

    def damaged(self) -> Iterator[str]:
        """Re-read every content; yield those that no longer have the hash in their name."""
        for name in self.place.names("blobs/"):
            digest = hashlib.sha256()
            for block in self.place.blocks(name):
                digest.update(block)
            if digest.hexdigest() != name.rpartition("/")[2]:
                yield name.rpartition("/")[2]

    def set_aside(self, sha256: str) -> str:
        """Move a damaged content out of the way, into `damaged/`, so that its next upload is stored anew."""
        self.place.move(self.name(sha256), f"damaged/{sha256}")
        return f"{self.place.where}/damaged/{sha256}"

    def delete_except(self, wanted: Container[str]) -> int:
        """Delete every content whose sha256 is not in `wanted`; returns the bytes freed."""
        freed = 0
        for name in list(self.place.names("blobs/")):
            if name.rpartition("/")[2] not in wanted:
                freed += self.place.size(name) or 0
                self.place.delete(name)
        return freed


class IncomingBlob:
    """An upload in flight: hashed while it is written, kept only if it is what was announced."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._path = blobs.place.spool()
        self._file = self._path.open("xb")
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def keep(self, *, sha256: str, size: int) -> None:
        """Move into the blobs. Raises HubError (422) when the content is not what was announced."""
        received = self._digest.hexdigest()
        if sha256 != received or size != self.size:
            raise HubError(
                f"the upload arrived as sha256 {received} ({self.size} bytes) but was announced as {sha256} "
                f"({size} bytes); nothing was stored, send it again",
                status=422,
            )
        self._file.close()
        self._blobs.place.keep(self._blobs.name(received), self._path)

    def discard(self) -> None:
        """Remove what was not kept; does nothing after :meth:`keep`."""
        self._file.close()
        self._path.unlink(missing_ok=True)
