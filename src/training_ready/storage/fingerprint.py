"""Is this object that file? Compared without downloading it again."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training_ready.storage.objects import ObjectInfo

_MIB = 1 << 20


def part_bytes(size: int) -> int:
    """The part size of an upload: 16 MiB, doubled until S3's limit of 10,000 parts is kept."""
    part = 16 * _MIB
    while part * 10_000 < size:
        part *= 2
    return part


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """A file's size and hashes. ``parts_etag`` is the ETag that S3 gives an upload in parts, else None."""

    size: int
    sha256: str
    md5: str
    parts_etag: str | None

    @classmethod
    def of_file(cls, path: Path) -> Fingerprint:
        """Read the file once, a mebibyte at a time."""
        size = path.stat().st_size
        part = part_bytes(size)
        sha256, whole = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        parts: list[bytes] = []
        current = hashlib.md5(usedforsecurity=False)
        filled = total = 0
        with path.open("rb") as source:
            while chunk := source.read(_MIB):
                sha256.update(chunk)
                whole.update(chunk)
                current.update(chunk)  # 1 MiB divides every part size
                filled, total = filled + len(chunk), total + len(chunk)
                if filled == part:
                    parts.append(current.digest())
                    current, filled = hashlib.md5(usedforsecurity=False), 0
        if filled:
            parts.append(current.digest())
        joined = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest()
        return cls(
            size=total,
            sha256=sha256.hexdigest(),
            md5=whole.hexdigest(),
            parts_etag=f"{joined}-{len(parts)}" if size >= part else None,
        )

    def proves(self, stored: ObjectInfo) -> bool:
        """Whether the object is certainly this file: same size, and its ETag or recorded sha256 agrees."""
        if stored.size != self.size:
            return False
        return stored.etag in (self.md5, self.parts_etag) or stored.metadata.get("sha256") == self.sha256

    def contradicts(self, stored: ObjectInfo) -> bool:
        """Whether the object is certainly not this file. An ETag that is no hash proves nothing."""
        if stored.size != self.size:
            return True
        hashed = stored.etag_is_hash and re.fullmatch(r"[0-9a-f]{32}(-\d+)?", stored.etag)
        return bool(hashed) and stored.etag not in (self.md5, self.parts_etag)
