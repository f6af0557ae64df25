"""Which rows are there? Lengths and origins of all rows of a split, without their tokens: 12 bytes a row in memory.

One object beside the token shards, so that a run knows its whole order after a single read, however many shards
there are::

    row      0    1    2    3    4    5  ...        over all shards, in order
    length  212  840   97  433  512   60            int32
    learned  90  301   40  120  256   21            int32
    cell      0    0    1    0    2    1            int32, number of a (source, stage, components, domain)
    block    |------ 0 ------|------ 1 ...          one row group of a token shard
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from training_ready.stream.lengths import TokenCounts

_HEADER = b"training_ready.index"


class Cell(NamedTuple):
    """Where a row comes from: the finest part of a corpus that a mixture can name."""

    source: str
    stage: str
    components: tuple[str, ...] = ()
    domain: str = ""


@dataclass(frozen=True, kw_only=True)
class TokenIndex:
    """All rows of the token shards of one split."""

    shards: tuple[str, ...]  # keys
    shard_blocks: tuple[int, ...]  # blocks per shard
    block_rows: npt.NDArray[np.int64]
    block_bytes: npt.NDArray[np.int64]  # as stored
    lengths: npt.NDArray[np.int32]
    learned: npt.NDArray[np.int32]
    cell_of_row: npt.NDArray[np.int32]
    cells: tuple[Cell, ...]
    counts: TokenCounts

    def __post_init__(self) -> None:
        starts = np.concatenate([[0], np.cumsum(self.block_rows)])
        shard_starts = np.concatenate([[0], np.cumsum(self.shard_blocks)])
        object.__setattr__(self, "block_starts", starts)
        object.__setattr__(self, "_shard_starts", shard_starts)
        if starts[-1] != len(self.lengths) or shard_starts[-1] != len(self.block_rows):
            raise ValueError(f"the blocks hold {starts[-1]} rows, the index has {len(self.lengths)}")

    block_starts: npt.NDArray[np.int64] = dataclasses.field(init=False, repr=False)
    _shard_starts: npt.NDArray[np.int64] = dataclasses.field(init=False, repr=False)

    @classmethod
    def joined(cls, parts: Sequence[TokenIndex]) -> TokenIndex:
        """The rows of several indexes, one after the other."""
        counts, cells, cell_of_row = TokenCounts(), dict[Cell, int](), []
        for part in parts:
            counts.add(part.counts)
            numbers = [cells.setdefault(cell, len(cells)) for cell in part.cells]
            cell_of_row.append(np.asarray(numbers, dtype=np.int32)[part.cell_of_row])
        return cls(
            shards=tuple(shard for part in parts for shard in part.shards),
            shard_blocks=tuple(blocks for part in parts for blocks in part.shard_blocks),
            block_rows=np.concatenate([part.block_rows for part in parts]),
            block_bytes=np.concatenate([part.block_bytes for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            learned=np.concatenate([part.learned for part in parts]),
            cell_of_row=np.concatenate(cell_of_row),
            cells=tuple(cells),
            counts=counts,
        )

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' keys, which name all that their rows depend on."""
        return hashlib.sha256(json.dumps(self.shards).encode()).hexdigest()

    def home_of(self, block: int) -> tuple[int, int]:
        """(shard, row group inside it) of a block."""
        shard = int(np.searchsorted(self._shard_starts, block, side="right")) - 1
        return shard, block - int(self._shard_starts[shard])

    def to_bytes(self) -> bytes:
        """As one Parquet file."""
        header = {
            "shards": self.shards,
            "shard_blocks": self.shard_blocks,
            "block_rows": self.block_rows.tolist(),
            "block_bytes": self.block_bytes.tolist(),
            "cells": self.cells,
            "counts": dataclasses.asdict(self.counts),
        }
        table = pa.table({"length": self.lengths, "learned": self.learned, "cell": self.cell_of_row})
        table = table.replace_schema_metadata({_HEADER: json.dumps(header)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenIndex:
        table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
        header = json.loads(table.schema.metadata[_HEADER])
        return cls(
            shards=tuple(header["shards"]),
            shard_blocks=tuple(header["shard_blocks"]),
            block_rows=np.asarray(header["block_rows"], dtype=np.int64),
            block_bytes=np.asarray(header["block_bytes"], dtype=np.int64),
            lengths=table["length"].to_numpy(),
            learned=table["learned"].to_numpy(),
            cell_of_row=table["cell"].to_numpy(),
            cells=tuple(
                Cell(source, stage, tuple(parts), of) for source, stage, parts, of in header["cells"]
            ),
            counts=TokenCounts(**header["counts"]),
        )


def wanted_cells(
    index: TokenIndex,
    *,
    sources: Sequence[str] | None = None,
    stages: Sequence[str] | None = None,
    components: Sequence[str] | None = None,
) -> frozenset[int]:
    """Numbers of the cells that lie in every given list; a row with one of ``components`` counts as in it."""
    return frozenset(
        number
        for number, cell in enumerate(index.cells)
        if (sources is None or cell.source in sources)
        and (stages is None or cell.stage in stages)
        and (components is None or set(components) & set(cell.components))
    )
