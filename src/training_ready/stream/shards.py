"""Reads corpus shards from the bucket row group by row group, each proven to be the one that its manifest lists."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from training_ready import TrainingReadyError
from training_ready.corpus.manifest import Shard
from training_ready.storage.objects import ObjectNotFound, ObjectStore
from training_ready.storage.reader import RangedReader

_BATCH_ROWS = 64
_OPEN_SHARDS = 256
_FOOTER_READ = 64 << 10  # Arrow asks for so much of a file's end at first
_CHANGED = "damaged on the way, or the object was changed after the build. Build the corpus again."

_Opened = tuple[RangedReader, pq.FileMetaData]


class StreamError(TrainingReadyError):
    """The stream cannot deliver what the recipe asks for."""


class CorpusReader:
    """Reads row groups of corpus shards, each in a request for exactly its bytes; keeps the footers of some shards."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self._open: dict[str, _Opened] = {}  # the one used last at the end

    def row_group(self, shard: Shard, number: int, columns: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """The records of one row group in batches.

        Raises:
            StreamError: the object is gone, or is not the one that the manifest promises.
        """
        opened = self._open.pop(shard.key) if shard.key in self._open else self._opened(shard)
        self._open[shard.key] = opened
        if len(self._open) > _OPEN_SHARDS:
            del self._open[next(iter(self._open))]
        source, metadata = opened
        group, seen = shard.row_groups[number], 0
        data = source.read_range(group.offset, group.offset + group.bytes)
        _prove(data, group.sha256, f"{source.name}: row group {number}, from byte {group.offset} on,")
        file = pq.ParquetFile(Stretch(group.offset, data), metadata=metadata)
        for batch in file.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=[number], columns=list(columns), use_threads=False
        ):
            seen += batch.num_rows
            yield batch.to_pylist()
        if seen != group.records:
            raise StreamError(
                f"{source.name}: row group {number} holds {seen} records, its manifest says {group.records}"
            )

    def _opened(self, shard: Shard) -> _Opened:
        try:
            source = self.store.open(shard.key, ahead=False)
        except ObjectNotFound as error:
            raise StreamError(
                f"{self.store.uri(shard.key)} is in the manifest but not in the bucket; build the corpus again"
            ) from error
        if source.info.size != shard.bytes:
            raise StreamError(
                f"{source.name} has {source.info.size} bytes, its manifest says {shard.bytes}: {_CHANGED}"
            )
        footer = max((group.offset + group.bytes for group in shard.row_groups), default=0)
        begin = min(footer, max(0, shard.bytes - _FOOTER_READ))
        data = source.read_range(begin, shard.bytes)
        _prove(
            data[footer - begin :], shard.footer_sha256, f"{source.name}: its footer, from byte {footer} on,"
        )
        return source, pq.ParquetFile(Stretch(begin, data)).metadata


def _prove(data: bytes, sha256: str, what: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise StreamError(f"{what} has sha256 {found}, its manifest says {sha256}: {_CHANGED}")


def read_corpus_shard(
    store: ObjectStore, shard: Shard, columns: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """The records of one shard in batches, each row group proven first. Raises as :meth:`CorpusReader.row_group`."""
    reader = CorpusReader(store)
    for number in range(len(shard.row_groups)):
        yield from reader.row_group(shard, number, columns)


class Stretch(io.RawIOBase):
    """A file of which only the bytes from ``begin`` on are here; reading others is an error."""

    def __init__(self, begin: int, data: bytes) -> None:
        super().__init__()
        self._begin, self._data, self._at = begin, memoryview(data), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        end = self._begin + len(self._data)
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: end}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        start = self._at - self._begin
        view = memoryview(buffer).cast("B")
        if not 0 <= start <= start + len(view) <= len(self._data):
            raise OSError(f"bytes {self._at} to {self._at + len(view)} are outside of the block")
        view[:] = self._data[start : start + len(view)]
        self._at += len(view)
        return len(view)
