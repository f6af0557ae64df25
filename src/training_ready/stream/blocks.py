"""Rows of tokens in the bucket, block by block: a block is one row group of a token shard, what one read fetches.

A token shard is one Parquet object per corpus shard:

==========================  ============================================================================
``input_ids``               list<int32> (T,)
``learned``                 list<int32>, flat pairs [start, end) of the learned tokens
``length``                  int32, T
``learned_tokens``          int32
``source``, ``stage``       where the row came from
``components``              its component annotations, sorted, joined by a comma
``domain``                  what it is about; empty where the corpus does not say
schema metadata             counts of rows and tokens in, kept, truncated, split, dropped
==========================  ============================================================================
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training_ready.storage.objects import ObjectStore
from training_ready.storage.reader import RangedReader
from training_ready.stream.index import TokenIndex
from training_ready.stream.render import RenderedConversation
from training_ready.stream.shards import StreamError

BLOCK_ROWS = 1000
COUNTS_KEY = b"training_ready.counts"
CELL_COLUMNS = ("source", "stage", "components", "domain")
TOKEN_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("learned_tokens", pa.int32()),
        *((name, pa.string()) for name in CELL_COLUMNS),
    ]
)
_READ = ("input_ids", "learned")
_OPEN_SHARDS = 64
_MADE_AGAIN = "Start again; if that is no help, delete the corpus's tokens/ folder: they are made again."


class TokenBlock:
    """The rows of one block, as they lie in memory: about 4 bytes a token."""

    def __init__(self, table: pa.Table) -> None:
        ids, runs = (table[name].combine_chunks() for name in _READ)
        self._ids, self._id_starts = ids.values.to_numpy(), ids.offsets.to_numpy()
        self._runs, self._run_starts = runs.values.to_numpy(), runs.offsets.to_numpy()

    def __len__(self) -> int:
        return len(self._id_starts) - 1

    def row(self, row: int, domain: str = "") -> RenderedConversation:
        ids = self._ids[self._id_starts[row] : self._id_starts[row + 1]]
        runs = self._runs[self._run_starts[row] : self._run_starts[row + 1]]
        return RenderedConversation(input_ids=ids, learned=mask_of_runs(len(ids), runs), domain=domain)


class BlockReader:
    """Reads blocks of the token shards of one index. Safe for several threads; opens a shard at its first block."""

    def __init__(self, store: ObjectStore, index: TokenIndex) -> None:
        self.store, self._index = store, index
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.blocks_read = 0

    def read(self, block: int) -> TokenBlock:
        """One block.

        Raises:
            StreamError: the shard holds other rows than the index says.
        """
        return self.decode(block, self.fetch(block))

    def fetch(self, block: int) -> bytes:
        """The stored bytes of one block, in one request for exactly them."""
        shard, local = self._home(block)
        data = shard.read(*_span(shard.footer.row_group(local)))
        with self._lock:
            self.bytes_read += len(data)
            self.blocks_read += 1
        return data

    def decode(self, block: int, data: bytes) -> TokenBlock:
        """The rows in the stored bytes of one block. Raises StreamError as :meth:`read`."""
        shard, local = self._home(block)
        begin, _ = _span(shard.footer.row_group(local))
        where = f"{shard.uri}: row group {local} (from byte {begin})"
        try:
            file = pq.ParquetFile(
                _Stretch(begin, data), metadata=shard.footer, page_checksum_verification=True
            )
            table = file.read_row_group(local, columns=list(_READ), use_threads=False)
        except (pa.ArrowException, OSError) as error:  # a page without its checksum, most likely
            raise StreamError(f"{where} cannot be read: {error}. {_MADE_AGAIN}") from error
        expected = self._index.lengths[slice(*self._index.block_starts[block : block + 2])]
        if not np.array_equal(pc.list_value_length(table[_READ[0]]).to_numpy(), expected):
            raise StreamError(f"{where} holds other rows than the index says. {_MADE_AGAIN}")
        return TokenBlock(table)

    def _home(self, block: int) -> tuple[_Shard, int]:
        """The open shard that holds a block, and the block's number in it."""
        number, local = self._index.home_of(block)
        return self._shard(number), local

    def _shard(self, number: int) -> _Shard:
        with self._lock:
            shard = self._open.pop(number, None) or _Shard(self.store, self._index.shards[number])
            self._open[number] = shard
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        with shard.lock:  # one thread opens it, outside of the lock that all shards share
            shard.open()
        return shard


class _Shard:
    """One token shard: its footer, read at first use, and its bytes."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key = store, key
        self.uri = store.uri(key)
        self.lock = threading.Lock()
        self._source: RangedReader | None = None

    def open(self) -> None:
        if self._source is not None:
            return
        source = self._store.open(self._key, ahead=False)
        try:
            self.footer = pq.ParquetFile(source).metadata
        except (pa.ArrowException, OSError) as error:
            raise StreamError(
                f"{source.name}: the footer, up to byte {source.info.size}, cannot be read: {error}. "
                + _MADE_AGAIN
            ) from error
        self._source = source

    def read(self, begin: int, size: int) -> bytes:
        assert self._source is not None  # noqa: S101
        return self._source.read_range(begin, begin + size)


class _Stretch(io.RawIOBase):
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


def _span(group: Any) -> tuple[int, int]:
    """Where the columns that are read lie in the file, (first byte, bytes): they stand first and side by side."""
    columns = [group.column(number) for number in range(len(_READ))]
    first = columns[0].dictionary_page_offset or columns[0].data_page_offset
    return first, sum(column.total_compressed_size for column in columns)


def runs_of_mask(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Flat [start, end) pairs of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
    return edges.astype(np.int32)


def mask_of_runs(length: int, runs: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """The inverse of :func:`runs_of_mask`."""
    mask = np.zeros(length, dtype=np.bool_)
    for start, end in runs.reshape(-1, 2).tolist():
        mask[start:end] = True
    return mask
