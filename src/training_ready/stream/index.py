"""Which rows are there? Lengths and origins of all rows of a split, without their tokens: 12 bytes a row in memory.

One object beside the tokens, so that a run knows its whole order after a single read, however many blocks there are::

    row      0    1    2    3    4    5  ...        over all blocks, in order
    length  212  840   97  433  512   60            int32
    learned  90  301   40  120  256   21            int32
    cell      0    0    1    0    2    1            int32, number of a (source, stage, components, domain)
    block    |------ 0 ------|------ 1 ...          one row group of the corpus, one object of tokens
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
    """The rows of some blocks of tokens, one block after the other."""

    blocks: tuple[str, ...]  # keys
    block_rows: npt.NDArray[np.int64]  # a block may be empty: the length policy dropped its rows
    block_bytes: npt.NDArray[np.int64]  # as stored
    lengths: npt.NDArray[np.int32]
    learned: npt.NDArray[np.int32]
    cell_of_row: npt.NDArray[np.int32]
    cells: tuple[Cell, ...]
    counts: TokenCounts

    def __post_init__(self) -> None:
        starts = np.concatenate([[0], np.cumsum(self.block_rows)])
        object.__setattr__(self, "block_starts", starts)
        if starts[-1] != len(self.lengths) or len(self.blocks) != len(self.block_rows):
            raise ValueError(
                f"{len(self.blocks)} blocks of {starts[-1]} rows, the index has {len(self.block_rows)} of "
                f"{len(self.lengths)}"
            )

    block_starts: npt.NDArray[np.int64] = dataclasses.field(init=False, repr=False)

    @classmethod
    def joined(cls, parts: Sequence[TokenIndex]) -> TokenIndex:
        """The rows of several indexes, one after the other; the first one's cells keep their numbers."""
        counts, cells, cell_of_row = TokenCounts(), dict[Cell, int](), []
        for part in parts:
            counts.add(part.counts)
            numbers = [cells.setdefault(cell, len(cells)) for cell in part.cells]
            cell_of_row.append(np.asarray(numbers, dtype=np.int32)[part.cell_of_row])
        return cls(
            blocks=tuple(block for part in parts for block in part.blocks),
            block_rows=np.concatenate([part.block_rows for part in parts]),
            block_bytes=np.concatenate([part.block_bytes for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            learned=np.concatenate([part.learned for part in parts]),
            cell_of_row=np.concatenate(cell_of_row),
            cells=tuple(cells),
            counts=counts,
        )

    def in_order(self, blocks: npt.NDArray[np.int64]) -> TokenIndex:
        """The same blocks in another order."""
        rows = np.concatenate(
            [np.arange(self.block_starts[block], self.block_starts[block + 1]) for block in blocks.tolist()]
        )
        return dataclasses.replace(
            self,
            blocks=tuple(self.blocks[block] for block in blocks.tolist()),
            block_rows=self.block_rows[blocks],
            block_bytes=self.block_bytes[blocks],
            lengths=self.lengths[rows],
            learned=self.learned[rows],
            cell_of_row=self.cell_of_row[rows],
        )

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """sha256 over the blocks' keys, which name all that their rows depend on."""
        return fingerprint_of(self.blocks)

    def to_bytes(self) -> bytes:
        """As one Parquet file."""
        header = {
            "blocks": self.blocks,
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
            blocks=tuple(header["blocks"]),
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


def fingerprint_of(blocks: Sequence[str]) -> str:
    """sha256 over keys of blocks."""
    return hashlib.sha256(json.dumps(blocks).encode()).hexdigest()


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
