"""Rows of tokens in the bucket, block by block: a block is one row group of a token shard, what one read fetches.

A token shard is one Parquet object per corpus shard:

==========================  ============================================================================
``input_ids``               list<int32> (T,)
``learned``                 list<int32>, flat pairs [start, end) of the learned tokens
``length``                  int32, T
``learned_tokens``          int32
``source``, ``stage``       where the row came from
``components``              its component annotations, sorted, joined by a comma
schema metadata             counts of rows and tokens in, kept, truncated, split, dropped
==========================  ============================================================================
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training_ready.storage.objects import ObjectStore
from training_ready.stream.index import TokenIndex
from training_ready.stream.render import RenderedConversation
from training_ready.stream.shards import StreamError

BLOCK_ROWS = 1000
COUNTS_KEY = b"training_ready.counts"
CELL_COLUMNS = ("source", "stage", "components")
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

    def row(self, row: int) -> RenderedConversation:
        ids = self._ids[self._id_starts[row] : self._id_starts[row + 1]]
        runs = self._runs[self._run_starts[row] : self._run_starts[row + 1]]
        return RenderedConversation(input_ids=ids, learned=mask_of_runs(len(ids), runs))


class BlockReader:
    """Reads blocks of the token shards of one index. Safe for several threads; opens a shard at its first block."""

    def __init__(self, store: ObjectStore, index: TokenIndex) -> None:
        self._store, self._index = store, index
        self._open: OrderedDict[int, tuple[threading.Lock, pq.ParquetFile]] = OrderedDict()
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.blocks_read = 0

    def read(self, block: int) -> TokenBlock:
        """One block.

        Raises:
            StreamError: the shard holds other rows than the index says.
        """
        shard, local = self._index.home_of(block)
        lock, file = self._shard(shard)
        begin = file.metadata.row_group(local).column(0).data_page_offset
        where = f"{self._store.uri(self._index.shards[shard])}: row group {local} (from byte {begin})"
        try:
            with lock:  # a Parquet file is not for two threads at once
                table = file.read_row_group(local, columns=list(_READ))
        except (pa.ArrowException, OSError) as error:  # a page without its checksum, most likely
            raise StreamError(f"{where} cannot be read: {error}. {_MADE_AGAIN}") from error
        expected = self._index.lengths[slice(*self._index.block_starts[block : block + 2])]
        if not np.array_equal(pc.list_value_length(table[_READ[0]]).to_numpy(), expected):
            raise StreamError(f"{where} holds other rows than the index says. {_MADE_AGAIN}")
        with self._lock:
            self.bytes_read += int(self._index.block_bytes[block])
            self.blocks_read += 1
        return TokenBlock(table)

    def _shard(self, shard: int) -> tuple[threading.Lock, pq.ParquetFile]:
        with self._lock:
            if shard not in self._open:
                source = self._store.open(self._index.shards[shard], ahead=False)
                reader = io.BufferedReader(source, buffer_size=1 << 20)
                try:
                    file = pq.ParquetFile(reader, page_checksum_verification=True)
                except (pa.ArrowException, OSError) as error:
                    raise StreamError(
                        f"{source.name}: the footer, up to byte {source.info.size}, cannot be read: {error}. "
                        + _MADE_AGAIN
                    ) from error
                self._open[shard] = threading.Lock(), file
                if len(self._open) > _OPEN_SHARDS:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return self._open[shard]


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
