"""Rows of tokens in the bucket, block by block: a block is one object, made of one row group of the corpus.

A block is a Parquet object of some 1,000 rows, about 1 MB:

==========================  ============================================================================
``input_ids``               list<int32> (T,)
``learned``                 list<int32>, flat pairs [start, end) of the learned tokens
``length``                  int32, T
``learned_tokens``          int32
``source``, ``stage``       where the row came from
``components``              its component annotations, sorted, joined by a comma
``domain``                  what it is about; empty where the corpus does not say
schema metadata             counts of rows and tokens in, kept, truncated, split, dropped; SHA-256 of all but tokens
==========================  ============================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training_ready.storage.objects import ObjectStore
from training_ready.stream.index import Cell, TokenIndex
from training_ready.stream.lengths import TokenCounts
from training_ready.stream.render import RenderedConversation
from training_ready.stream.shards import StreamError

BLOCK_ROWS = 1000  # of blocks that are made of anything else than a corpus
_OURS = b"training_ready."
_COUNTS_KEY, _INDEX_KEY = _OURS + b"counts", _OURS + b"index_sha256"
_CELL_COLUMNS = ("source", "stage", "components", "domain")
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("learned_tokens", pa.int32()),
        *((name, pa.string()) for name in _CELL_COLUMNS),
    ]
)
_READ, _INDEXED = ("input_ids", "learned"), ("length", "learned_tokens", *_CELL_COLUMNS)
_BETWEEN = "\x1f"  # the unit separator stands in no name
# What Arrow says of pages without their checksum, and of footers, which have none.
_DAMAGED = (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError)
_MADE_AGAIN = "Start again; if that is no help, delete the corpus's tokens/ folder: they are made again."

# A row of a block: its tokens, and the values of the cell columns.
TokenRow = tuple[RenderedConversation, tuple[str, str, str, str]]


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


class Indexed(Protocol):
    """Whoever knows the blocks, perhaps more and more of them: a set of tokens."""

    @property
    def index(self) -> TokenIndex: ...


class BlockReader:
    """Reads blocks of a set of tokens. Safe for several threads."""

    def __init__(self, store: ObjectStore, tokens: Indexed) -> None:
        self.store, self._tokens = store, tokens
        self._lock = threading.Lock()
        self.bytes_read = 0
        self.blocks_read = 0

    def read(self, block: int) -> TokenBlock:
        """One block.

        Raises:
            StreamError: the object holds other rows than the index says.
        """
        return self.decode(block, self.fetch(block))

    def fetch(self, block: int) -> bytes:
        """The stored bytes of one block, in one request."""
        with self.store.open(self._tokens.index.blocks[block], ahead=False) as source:
            data = source.read_range(0, source.info.size)
        with self._lock:
            self.bytes_read += len(data)
            self.blocks_read += 1
        return data

    def decode(self, block: int, data: bytes) -> TokenBlock:
        """The rows in the stored bytes of one block. Raises StreamError as :meth:`read`."""
        index = self._tokens.index
        where = f"{self.store.uri(index.blocks[block])}, bytes 0 to {len(data)},"
        try:
            file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
            table = file.read(columns=list(_READ), use_threads=False)
            lengths = pc.list_value_length(table[_READ[0]]).to_numpy()
            found = TokenBlock(table)
        except _DAMAGED as error:
            raise StreamError(f"{where} cannot be read: {error!r}. {_MADE_AGAIN}") from error
        if not np.array_equal(lengths, index.lengths[slice(*index.block_starts[block : block + 2])]):
            raise StreamError(f"{where} holds other rows than the index says. {_MADE_AGAIN}")
        return found


def write_block(
    store: ObjectStore, key: str, rows: Sequence[TokenRow], counts: TokenCounts, more: Mapping[str, str]
) -> TokenIndex:
    """Writes rows as the block ``key``; its index.

    Args:
        counts: of the rows through the length policy.
        more: entries for the footer.
    """
    facts = {_COUNTS_KEY: json.dumps(dataclasses.asdict(counts)).encode()}
    facts |= {name.encode(): text.encode() for name, text in more.items()}
    table = _table(rows)
    table = table.replace_schema_metadata({**facts, _INDEX_KEY: _index_sha256(table, facts)})
    with tempfile.NamedTemporaryFile(suffix=".parquet") as out:
        pq.write_table(
            table, out.name, compression="zstd", write_page_checksum=True, row_group_size=len(rows) or 1
        )
        index = index_of_block(out.file, key, store.uri(key))
        store.keep_on_disk(store.put_file(key, Path(out.name)), Path(out.name))
    return index


def index_of_block(source: IO[bytes], key: str, where: str) -> TokenIndex:
    """The index of one block.

    Raises:
        StreamError: it cannot be read.
    """
    try:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        table = file.read(columns=list(_INDEXED), use_threads=False)
        facts = file.metadata.metadata
        if _index_sha256(table, facts) != facts[_INDEX_KEY]:
            raise ValueError("other rows than were written")
        names = pc.binary_join_element_wise(*(table[column] for column in _CELL_COLUMNS), _BETWEEN)
        coded = names.combine_chunks().dictionary_encode()
        found = [name.split(_BETWEEN) for name in coded.dictionary.to_pylist()]
        return TokenIndex(
            blocks=(key,),
            block_rows=np.asarray([table.num_rows], dtype=np.int64),
            block_bytes=np.asarray([source.seek(0, io.SEEK_END)], dtype=np.int64),
            lengths=table["length"].to_numpy(),
            learned=table["learned_tokens"].to_numpy(),
            cell_of_row=coded.indices.to_numpy().astype(np.int32),
            cells=tuple(
                Cell(source, stage, tuple(filter(None, parts.split(","))), domain)
                for source, stage, parts, domain in found
            ),
            counts=TokenCounts(**json.loads(facts[_COUNTS_KEY])),
        )
    except _DAMAGED as error:
        raise StreamError(
            f"{where}: cannot be read up to byte {source.tell()}: {error!r}. Delete it; it is made again."
        ) from error


def _index_sha256(table: pa.Table, facts: Mapping[bytes, bytes]) -> bytes:
    """Over all that is read of a block but its tokens: a Parquet footer has no checksum of its own."""
    ours = {name for name in facts if name.startswith(_OURS) and name != _INDEX_KEY}
    text = [[facts[name].decode() for name in sorted(ours)], [table[name].to_pylist() for name in _INDEXED]]
    return hashlib.sha256(json.dumps(text).encode()).hexdigest().encode()


def _table(rows: Sequence[TokenRow]) -> pa.Table:
    """The rows as Arrow, straight from their arrays."""
    runs = [runs_of_mask(row.learned) for row, _ in rows]
    columns: list[Any] = [
        _lists([row.input_ids for row, _ in rows]),
        _lists(runs),
        pa.array([len(row.input_ids) for row, _ in rows], pa.int32()),
        pa.array([int((run[1::2] - run[::2]).sum()) for run in runs], pa.int32()),
        *(pa.array([cell[number] for _, cell in rows], pa.string()) for number in range(len(_CELL_COLUMNS))),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _lists(arrays: Sequence[npt.NDArray[np.int32]]) -> pa.ListArray:
    starts = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    values = np.concatenate([np.zeros(0, np.int32), *arrays])
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(values))


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
