"""Where do named contents live? In a folder or in a bucket; each is written whole or not at all.

The hub keeps its models in a place, and a release can be published to one. A place knows names and bytes; what they
mean is said by :mod:`.hub_store` and :mod:`.publish_place`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from training_ready import TrainingReadyError

BLOCK = 2**20


class PlaceError(TrainingReadyError):
    """The place cannot hold what it was given; the message says why and what to do."""


class Place(Protocol):
    """Names are POSIX paths without `..`. Safe for many threads of one process; see `swap` for many processes."""

    @property
    def where(self) -> str:
        """How a message calls it: a path or an s3:// address."""
        ...

    @property
    def exclusive(self) -> bool:
        """Whether nobody else writes there while `sole_server` is held."""
        ...

    def read(self, name: str) -> bytes | None:
        """A small content; None when there is none."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a content; None when there is none."""
        ...

    def blocks(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes [start, stop) of a content of any size, block by block."""
        ...

    def names(self, prefix: str) -> Iterator[str]:
        """Every name that starts with `prefix`, a name that ends in a slash."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Put a small content there, whatever was there before."""
        ...

    def swap(self, name: str, data: bytes, *, expected: bytes | None) -> bool:
        """Put a small content there if `expected` (None: nothing) is there now; False, and no change, otherwise.

        Of two writers with the same expectation one wins, whichever process they are in.
        """
        ...

    def keep(self, name: str, spooled: Path) -> None:
        """Move a file that was written at a path of `spool` under `name`."""
        ...

    def put_file(self, name: str, path: Path) -> None:
        """Copy a file of any size under `name`."""
        ...

    def move(self, name: str, to: str) -> None: ...

    def delete(self, name: str) -> None:
        """Remove a content; one that is not there is no error."""
        ...

    def spool(self) -> Path:
        """A fresh local path for a content that is still arriving."""
        ...

    def sole_server(self) -> AbstractContextManager[object]:
        """Hold what one server or publication needs; raises PlaceError when another has it."""
        ...


def check_name(name: str) -> str:
    """The name itself. Raises PlaceError for one that could leave the place."""
    if not name or name.startswith("/") or "\0" in name or {"", ".", ".."} & set(name.rstrip("/").split("/")):
        raise PlaceError(f"{name!r} is not a name inside a place")
    return name


def open_place(address: str, *, only_writer: bool = False) -> Place:
    """The place at `address`, an `s3://bucket/prefix` or the path of a folder, which is made when missing.

    Args:
        only_writer: the caller's promise that nobody else writes there meanwhile, for a bucket whose server ignores
            conditional writes.

    Raises PlaceError, or StorageError from the bucket.
    """
    from training_ready.storage.uri import parse_s3_uri

    uri = parse_s3_uri(address)
    if uri is None:
        from training_ready.release.place_folder import FolderPlace

        return FolderPlace(Path(address))
    from training_ready.release.place_bucket import BucketPlace
    from training_ready.storage.objects import ObjectStore
    from training_ready.storage.settings import StorageSettings

    store = ObjectStore(StorageSettings.from_environment(), uri.bucket)
    return BucketPlace(store, uri.key, only_writer=only_writer)
