"""Which bytes of the bucket does this machine hold already? One copy for all its processes, within a byte budget.

::

    blocks/3f/3f9c…-7        bytes of one block, then their SHA-256     (named by object version and block number)
    locks/0a1                one download of a block at a time on the whole machine
    ledger                   bytes reserved by all blocks together
    blocks/3f/.new-…         being written; renamed when whole

Nothing here needs tidying after ``kill -9``: every lock is the kernel's (flock) and goes with its process, a block
appears by rename only, and bytes are reserved before a block appears, so the ledger can be too high but never too
low; when it reaches the budget the blocks are counted anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from training_ready.storage.errors import SettingsError

logger = logging.getLogger(__name__)

BLOCK_BYTES = 4 << 20
_DIGEST_BYTES = 32
_NEW = ".new-"
_LOCKS = 1024  # lock files; blocks that share one wait for each other
_LOW_WATER = 0.9  # a full cache is emptied to this share of its budget, the longest unused blocks first


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskCache:
    """A folder of blocks of ``block_bytes`` (an object's last one is shorter).

    Safe for threads and processes at once, to pickle, and after a fork.

    A block that is being read is pinned by a shared lock: it is never evicted meanwhile, whoever needs room.
    """

    folder: Path
    budget_bytes: int
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        if self.block_bytes < 1 or self.budget_bytes < 2 * (self.block_bytes + _DIGEST_BYTES):
            raise SettingsError(
                f"A cache of {self.budget_bytes} bytes in {self.folder} is too small: it holds blocks of "
                f"{self.block_bytes} bytes and needs room for at least two of them."
            )

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> DiskCache | None:
        """The cache that ``TRAINING_READY_CACHE`` (a folder) and ``TRAINING_READY_CACHE_GB`` (50) describe, or None.

        Raises:
            SettingsError: the budget is not a number, or too small.
        """
        found = os.environ if env is None else env
        if not found.get("TRAINING_READY_CACHE"):
            return None
        text = found.get("TRAINING_READY_CACHE_GB") or "50"
        try:
            budget = int(float(text) * 1e9)
        except (ValueError, OverflowError) as error:
            raise SettingsError(
                f"TRAINING_READY_CACHE_GB is '{text}': give a number of gigabytes, such as 50."
            ) from error
        return cls(folder=Path(found["TRAINING_READY_CACHE"]).expanduser().resolve(), budget_bytes=budget)

    def block(self, name: str, fetch: Callable[[], bytes]) -> tuple[bytes, bool]:
        """The block of this name (hex digits and ``-``), fetched unless it is here; and whether it was here.

        While one process fetches a block, the others that want it wait and then read its copy. A copy that does not
        have its SHA-256 is fetched again. A full or read-only disk costs the cache, not the bytes: a
        warning says so, once.
        """
        path, data = self.folder / "blocks" / name[:2] / name, None
        try:
            if (kept := _read(path)) is not None:
                return kept, True
            with self._locked(f"locks/{int(name[:8], 16) % _LOCKS:03x}"):
                if (kept := _read(path)) is not None:  # another process was faster
                    return kept, True
                data = fetch()
                self._write(path, data)
        except OSError as error:
            _warn_once(self.folder, error)
        return fetch() if data is None else data, False

    def held_bytes(self) -> int:
        """Bytes of all blocks, counted now."""
        return sum(size for _, size, _ in self._blocks())

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_name(f"{_NEW}{uuid.uuid4().hex}")
        try:
            with self._reserved(temporary, len(data) + _DIGEST_BYTES) as output:
                output.write(data)
                output.write(hashlib.sha256(data).digest())
                output.flush()
                os.fsync(output.fileno())
                # Whoever counts the blocks holds the ledger: a name that changed meanwhile would be counted nowhere.
                with self._locked("ledger"):
                    os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _reserved(self, temporary: Path, size: int) -> BinaryIO:
        """A new file of ``size`` bytes that fits the budget; what was unused longest makes room for it.

        Its lock says that its writer lives. Raises OSError if every block is in use and none can go.
        """
        with self._locked("ledger") as ledger:
            text = os.pread(ledger, 32, 0).decode("ascii", "replace")
            booked = int(text) if text.isdigit() else self._make_room(0)
            if booked + size > self.budget_bytes:
                booked = self._make_room(size)
            if booked + size > self.budget_bytes:
                raise OSError(
                    errno.ENOSPC, f"{booked} of {self.budget_bytes} bytes are in use at this moment"
                )
            os.pwrite(ledger, f"{booked + size:020d}".encode(), 0)
            output = temporary.open("xb")
            fcntl.flock(output, fcntl.LOCK_EX)
            os.truncate(output.fileno(), size)
            return output

    def _make_room(self, size: int) -> int:
        """Evict until ``size`` more bytes fit, and some besides; the bytes that are left."""
        blocks = sorted(self._blocks())
        held = sum(block[1] for block in blocks)
        target = self.budget_bytes * _LOW_WATER - size if held + size > self.budget_bytes else held
        for _, block_size, path in blocks:
            # What a killed process was writing goes in any case: nobody holds its lock.
            if (held > target or path.name.startswith(_NEW)) and _evicted(path):
                held -= block_size
        return held

    def _blocks(self) -> Iterator[tuple[int, int, Path]]:
        """(last use, bytes, path) of every block, those being written included."""
        for path in self.folder.glob("blocks/*/*"):
            with contextlib.suppress(FileNotFoundError):  # evicted or renamed meanwhile
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[int]:
        path = self.folder / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            fcntl.flock(
                descriptor, fcntl.LOCK_UN
            )  # a child forked meanwhile holds the same lock: let go for both
            os.close(descriptor)


def _read(path: Path) -> bytes | None:
    """A whole block, pinned while it is read and marked as used now; None if it is not here or damaged."""
    try:
        with path.open("rb") as source:
            fcntl.flock(source, fcntl.LOCK_SH)
            stored = source.read()
            os.utime(source.fileno())
            fcntl.flock(source, fcntl.LOCK_UN)
    except FileNotFoundError:
        return None
    data, digest = stored[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        logger.warning(f"{path} is damaged on the disk: it is fetched again")
        return None
    return data


def _evicted(path: Path) -> bool:
    """Remove a block unless somebody reads or writes it now."""
    try:
        with path.open("rb") as block:
            fcntl.flock(block, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


_warned: set[Path] = set()


def _warn_once(folder: Path, error: OSError) -> None:
    if folder not in _warned:
        _warned.add(folder)
        logger.warning(f"{folder}: the cache cannot be used ({error}); reading goes on without it")
