"""Which rows make a pack? The packs of one part of a corpus in a line, epoch after epoch.

::

    epoch 0   | group 7: 590 packs | group 2: 601 packs | group 0 ...
    epoch 1   | group 4: 588 packs | group 7: 590 packs | ...

A group has the same number of packs in every epoch: its rows change places, but best-fit-decreasing looks at their
lengths alone. So every epoch has the same number of packs, and where any pack stands is arithmetic, in epoch 0 as in
epoch 9,000.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from training_ready.stream.index import TokenIndex
from training_ready.stream.order import ROWS, Indices, block_groups, generator, group_order
from training_ready.stream.packs import best_fit_decreasing
from training_ready.stream.shards import StreamError

_GROUPS_KEPT = 1024  # packed groups kept by a line: 8 bytes a row

# Per cell: rows, tokens, learned tokens. int64 (cells, 3)
CellCounts = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedGroup:
    """The packs of one group in one epoch: ``rows`` of pack p are ``rows[starts[p]:starts[p + 1]]``."""

    rows: Indices
    starts: Indices

    @property
    def packs(self) -> int:
        return len(self.starts) - 1

    def pack(self, number: int) -> Indices:
        return self.rows[self.starts[number] : self.starts[number + 1]]


class PackLine:
    """The packs of chosen rows of one token index."""

    def __init__(
        self,
        index: TokenIndex,
        *,
        max_length: int,
        seed: int,
        cells: frozenset[int] | None = None,
        packing: bool = True,
        blocks_per_group: int = 8,
        shuffle: bool = True,
        counted: Callable[[str], Sequence[int] | None] = lambda fingerprint: None,
    ) -> None:
        """
        Args:
            cells: rows of these cells only; None takes all.
            shuffle: False keeps the order of the corpus (evaluation).
            counted: gives the packs per group of the line with this fingerprint, if somebody has counted them.

        Raises:
            StreamError: no row is chosen.
        """
        self.index = index
        self._max_length, self._seed = max_length, seed
        self._packing, self._shuffle = packing, shuffle
        chosen = range(len(index.cells)) if cells is None else sorted(cells)
        self._wanted = np.isin(np.arange(len(index.cells)), list(chosen))
        present = self._wanted[index.cell_of_row]
        kept = np.add.reduceat(present, index.block_starts[:-1]) if index.rows else np.zeros(0)
        blocks = np.flatnonzero(kept)
        if not len(blocks):
            raise StreamError("no row is left to train on: the choice is empty after the length policy")
        self.groups = block_groups(blocks, blocks_per_group, seed=seed, shuffle=shuffle)
        identity = [index.fingerprint, max_length, seed, list(chosen), packing, blocks_per_group, shuffle]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._packed = lru_cache(_GROUPS_KEPT)(self._pack)
        self._starts_of = lru_cache(4)(self._epoch_starts)
        self.group_packs = np.asarray(
            counted(self.fingerprint)
            or [self._packed(0, number).packs for number in range(len(self.groups))],
            dtype=np.int64,
        )
        self.packs_per_epoch = int(self.group_packs.sum())

    @cached_property
    def _group_counts(self) -> CellCounts:
        return np.asarray([self._count(self._rows_of(group)) for group in range(len(self.groups))])

    @property
    def epoch_counts(self) -> CellCounts:
        """What one epoch holds."""
        return np.asarray(self._group_counts.sum(axis=0))

    def locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """(group, pack inside it) of the ``offset``-th pack of an epoch."""
        order, starts = self._starts_of(epoch)
        at = int(np.searchsorted(starts, offset, side="right")) - 1
        return int(order[at]), offset - int(starts[at])

    def packed(self, epoch: int, group: int) -> PackedGroup:
        """The packs of a group.

        Raises:
            StreamError: they are not as many as an earlier count said.
        """
        packed = self._packed(epoch, group)
        if packed.packs != self.group_packs[group]:
            raise StreamError(
                f"group {group} makes {packed.packs} packs, a count in the bucket says {self.group_packs[group]}. "
                "Delete the corpus's tokens/ folder; it is made again."
            )
        return packed

    def blocks_of(self, rows: Indices) -> Indices:
        """The block of each row."""
        return np.asarray(np.searchsorted(self.index.block_starts, rows, side="right") - 1)

    def count_between(self, epoch: int, first: int, stop: int) -> CellCounts:
        """What the packs [first, stop) of an epoch hold."""
        total: CellCounts = np.zeros_like(self._group_counts[0])
        if first >= stop:
            return total
        order, starts = self._starts_of(epoch)
        ends = np.append(starts[1:], self.packs_per_epoch)
        whole = (starts >= first) & (ends <= stop)
        total += self._group_counts[order[whole]].sum(axis=0)
        for at in np.flatnonzero(~whole & (starts < stop) & (ends > first)):
            packed = self.packed(epoch, int(order[at]))
            low, high = max(first - starts[at], 0), min(stop, ends[at]) - starts[at]
            total += self._count(packed.rows[packed.starts[low] : packed.starts[high]])
        return total

    def _epoch_starts(self, epoch: int) -> tuple[Indices, Indices]:
        order = group_order(len(self.groups), seed=self._seed, epoch=epoch, shuffle=self._shuffle)
        return order, np.concatenate([[0], np.cumsum(self.group_packs[order])[:-1]])

    def _rows_of(self, group: int) -> Indices:
        """The chosen rows of a group's blocks, in the blocks' order."""
        starts = self.index.block_starts
        rows = np.concatenate([np.arange(starts[block], starts[block + 1]) for block in self.groups[group]])
        return np.asarray(rows[self._wanted[self.index.cell_of_row[rows]]])

    def _pack(self, epoch: int, group: int) -> PackedGroup:
        rows, random = self._rows_of(group), generator(self._seed, ROWS, epoch, group)
        if self._shuffle:
            rows = random.permutation(rows)
        if self._packing:
            packs = best_fit_decreasing(self.index.lengths[rows], self._max_length)
        else:
            packs = [[number] for number in range(len(rows))]
        if self._shuffle:  # best-fit-decreasing leaves the longest rows first
            packs = [packs[i] for i in random.permutation(len(packs))]
        sizes = [len(pack) for pack in packs]
        flat = np.fromiter((number for pack in packs for number in pack), np.int64, sum(sizes))
        return PackedGroup(rows=rows[flat], starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    def _count(self, rows: Indices) -> CellCounts:
        cells = self.index.cell_of_row[rows]
        tokens, learned = self.index.lengths[rows], self.index.learned[rows]
        many = len(self.index.cells)
        columns = [np.bincount(cells, weights, many) for weights in (None, tokens, learned)]
        return np.asarray(np.stack(columns, axis=1).astype(np.int64))
