"""How well does the stream mix? Its order against a full permutation, by pure computation.

    python benchmarks/shuffle_quality.py [rows] [rows per block]

Rows are numbered as they lie in the corpus. Printed for each order, over one epoch:

* neighbours: mean distance in the corpus between a row and the next one trained (a full permutation: rows / 3);
* correlation: of the row number with the place where it is trained (0 is ideal, 1 the corpus order);
* coverage: in the first 512 rows trained, how many of 64 equal stretches of the corpus are met (a permutation: 64);
* batches: how much the mean row number varies between batches of 512 rows, against a full permutation (1 is ideal,
  above it batches are more alike inside than chance makes them).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from training_ready.stream.index import Cell, TokenIndex
from training_ready.stream.lanes import Chapter
from training_ready.stream.lengths import TokenCounts
from training_ready.stream.line import PackLine
from training_ready.stream.mixture import PERIOD
from training_ready.stream.order import early_rounds
from training_ready.stream.plan import PackPlan
from training_ready.stream.token_set import TokenSet

MAX_LENGTH, BATCH = 4096, 512


def index_of(rows: int, block_rows: int) -> TokenIndex:
    lengths = np.clip(np.random.default_rng(1).lognormal(5.5, 0.8, rows).astype(np.int32), 8, MAX_LENGTH)
    blocks = [min(block_rows, rows - start) for start in range(0, rows, block_rows)]
    return TokenIndex(
        blocks=tuple(f"block-{number}" for number in range(len(blocks))),
        block_rows=np.asarray(blocks),
        block_bytes=np.asarray(blocks),
        lengths=lengths,
        learned=lengths // 2,
        cell_of_row=np.zeros(rows, np.int16),
        cells=(Cell("benchmark", "stage1_foundation"),),
        counts=TokenCounts(rows=rows),
    )


def order_of(
    index: TokenIndex, *, lanes: int, blocks_per_group: int, early: bool = False
) -> tuple[npt.NDArray[np.int64], float]:
    """The rows of epoch 0 as they are trained, and the fill of their packs."""
    rounds = early_rounds(len(index.blocks), seed=3) if early else [np.arange(len(index.blocks))]
    blocks = np.concatenate(rounds)
    number = np.concatenate([np.arange(*index.block_starts[block : block + 2]) for block in blocks])
    about: dict[str, Any] = {
        "name": "benchmark",
        "store": None,
        "prefix": "",
        "index": index,
    }  # nothing is read
    tokens = TokenSet.early(**about, seed=3) if early else TokenSet(**about)
    line = PackLine(tokens, max_length=MAX_LENGTH, seed=3, blocks_per_group=blocks_per_group)
    plan = PackPlan({"data": line}, chapters=[Chapter(start=0, quota=(PERIOD,))], lanes=lanes)
    packs = [plan.rows(address) for p in range(line.packs_per_epoch) if (address := plan.address(p))]
    return number[np.concatenate(packs)], index.lengths.sum() / (line.packs_per_epoch * MAX_LENGTH)


def quality(order: npt.NDArray[np.int64], ideal: npt.NDArray[np.int64]) -> str:
    rows = len(order)

    def spread(one: npt.NDArray[np.int64]) -> float:
        return float(one[: rows // BATCH * BATCH].reshape(-1, BATCH).mean(axis=1).std())

    neighbours = np.abs(np.diff(order)).mean() / (rows / 3)
    correlation = abs(np.corrcoef(np.arange(rows), order)[0, 1])
    coverage = len(np.unique(order[:512] * 64 // rows))
    return f"{neighbours:10.3f} {correlation:12.4f} {coverage:9d} {spread(order) / spread(ideal):8.2f}"


def main(rows: int = 200_000, block_rows: int = 1000) -> None:
    index = index_of(rows, block_rows)
    ideal = np.random.default_rng(0).permutation(rows)
    print(f"{rows:,} rows in blocks of {block_rows}; neighbours as a share of a third of the corpus")
    print(f"{'order':34} neighbours  correlation  coverage  batches   fill")
    print(f"{'full permutation':34} {quality(ideal, np.random.default_rng(9).permutation(rows))}")
    print(f"{'corpus order':34} {quality(np.arange(rows), ideal)}")
    for lanes in (1, 4, 16):
        for blocks_per_group, early in ((1, False), (2, False), (8, False), (8, True)):
            order, fill = order_of(index, lanes=lanes, blocks_per_group=blocks_per_group, early=early)
            if sorted(order.tolist()) != list(range(rows)):
                raise SystemExit("an epoch does not hold every row once")
            name = f"{lanes} lanes, {blocks_per_group} blocks a group" + ", early" * early
            print(f"{name:34} {quality(order, ideal)} {fill:7.2%}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
