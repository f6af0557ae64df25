"""How does a folder hold named contents? Each under a temporary name, fsynced, then renamed."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training_ready.release.places import BLOCK, PlaceError, check_name

_INCOMING = ".incoming"


class FolderPlace:
    """Contents are files under `root`; what is still arriving lies in `root/.incoming`."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        try:
            (self.root / _INCOMING).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PlaceError(f"{self.root} cannot be written: {error.strerror}") from error

    @property
    def where(self) -> str:
        return str(self.root)

    @property
    def exclusive(self) -> bool:
        return True

    def path(self, name: str) -> Path:
        return self.root / check_name(name)

    def read(self, name: str) -> bytes | None:
        try:
            return self.path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size(self, name: str) -> int | None:
        path = self.path(name)
        return path.stat().st_size if path.is_file() else None

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        with self.path(name).open("rb") as file:
            file.seek(start)
            left = float("inf") if stop is None else stop - start
            while left > 0 and (block := file.read(int(min(BLOCK, left)))):
                left -= len(block)
                yield block

    def names(self, prefix: str) -> Iterator[str]:
        for parent, folders, files in os.walk(self.path(prefix)):
            folders.sort()
            for file in sorted(files):
                yield (Path(parent) / file).relative_to(self.root).as_posix()

    def write(self, name: str, data: bytes) -> None:
        spooled = self.spool()
        # What lies at the top (a hub's tokens.json) is its owner's; a release's manifest is as readable as its weights.
        mode = 0o666 if "/" in name else 0o600
        descriptor = os.open(spooled, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        self.keep(name, spooled)

    def swap(self, name: str, data: bytes, *, expected: bytes | None) -> bool:
        with (self.root / ".writing").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released with the file; also between processes
            if self.read(name) != expected:
                return False
            self.write(name, data)
            return True

    def keep(self, name: str, spooled: Path) -> None:
        with spooled.open("rb") as file:
            os.fsync(file.fileno())
        target = self.path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(spooled, target)
        _sync(target.parent)

    def put_file(self, name: str, path: Path) -> None:
        spooled = self.spool()
        try:
            shutil.copyfile(path, spooled)
            self.keep(name, spooled)
        finally:
            spooled.unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        self.path(to).parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path(name), self.path(to))

    def delete(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def spool(self) -> Path:
        return self.root / _INCOMING / uuid.uuid4().hex

    @contextmanager
    def sole_server(self) -> Iterator[None]:
        """One server or publication per folder, because it empties `.incoming/` at its start."""
        with (self.root / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise PlaceError(
                    f"another hub already serves {self.root}, or a publication writes to it; stop it or choose "
                    "another folder"
                ) from error
            for leftover in (self.root / _INCOMING).iterdir():
                leftover.unlink()
            yield


def _sync(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
