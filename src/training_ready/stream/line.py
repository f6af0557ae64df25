"""Which rows make a pack? The packs of one part of a corpus in a line, epoch after epoch.

::

    epoch 0   | group 7: 590 packs | group 2: 601 packs | group 0 ...
    epoch 1   | group 4: 588 packs | group 7: 590 packs | ...

Tokens that are still being made come in rounds (:mod:`.token_set`), and an order that begins early reads them so::

    epoch 0   | round 0: group 0 | round 1: group 1 | round 2: group 2 | round 3: group 3 | ...

A group has the same number of packs in every epoch: its rows change places, but best-fit-decreasing looks at their
lengths alone. So every epoch has the same number of packs, and where any pack stands is arithmetic, in epoch 0 as in
epoch 9,000.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from training_ready.stream.index import TokenIndex, wanted_cells
from training_ready.stream.order import ROWS, Indices, block_groups, generator, group_order
from training_ready.stream.packs import best_fit_decreasing
from training_ready.stream.shards import StreamError
from training_ready.stream.token_set import TokenSet

_GROUPS_KEPT = 1024  # packed groups kept by a line: 8 bytes a row

# Per cell: rows, tokens, learned tokens. int64 (cells, 3)
CellCounts = npt.NDArray[np.int64]


class NoRowsError(StreamError):
    """Nothing is chosen of a split."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A stretch of the line that lanes share out: an epoch, or a round of an epoch that begins early.

    ``start``: the draws before it. ``offset``: the packs before it in its epoch.
    """

    epoch: int
    start: int
    offset: int
    packs: int

    @property
    def end(self) -> int:
        return self.start + self.packs


class PackLine:
    """The packs of chosen rows of a set of tokens; of one that is still growing, as far as anybody asked."""

    def __init__(
        self,
        tokens: TokenSet,
        *,
        max_length: int,
        seed: int,
        sources: Sequence[str] | None = None,
        stages: Sequence[str] | None = None,
        components: Sequence[str] | None = None,
        packing: bool = True,
        blocks_per_group: int = 8,
        shuffle: bool = True,
        counted: Callable[[str], Sequence[int] | None] = lambda fingerprint: None,
        keep: Callable[[str, Sequence[int]], None] = lambda fingerprint, packs: None,
    ) -> None:
        """
        Args:
            sources, stages, components: rows in all given lists only; None takes all.
            shuffle: False keeps the order of the corpus (evaluation).
            counted: gives the packs per group of the line with this fingerprint, if somebody has counted them.
            keep: takes them when they have been counted here.

        Raises:
            NoRowsError: no row is chosen.
            StreamError: one cannot be tokenised.
        """
        self._tokens = tokens
        self._max_length, self._seed = max_length, seed
        self._packing, self._shuffle, self._blocks_per_group = packing, shuffle, blocks_per_group
        self._choice = {"sources": sources, "stages": stages, "components": components}
        choice = [None if names is None else sorted(names) for names in self._choice.values()]
        identity = [tokens.fingerprint, tokens.begins_early, max_length, seed, choice]
        self.fingerprint = hashlib.sha256(
            json.dumps([*identity, packing, blocks_per_group, shuffle]).encode()
        ).hexdigest()
        self._packed = lru_cache(_GROUPS_KEPT)(self._pack)
        self._order_of = lru_cache(4)(self._group_order)
        self._rounds = 0  # taken
        self._spans: list[Span] = []  # of epoch 0
        self._counts: list[CellCounts] = []  # of the groups, as far as anybody asked
        self.groups: list[Indices] = []
        self.group_packs: list[int] = []
        self._known, self._keep = counted(self.fingerprint) if tokens.complete else None, keep
        while not self.groups and not self.complete:
            self._take_round()
        if tokens.complete:
            self.wait_for_all()
        if not self.groups:
            raise NoRowsError("no row is left to train on: the choice is empty after the length policy")

    @property
    def index(self) -> TokenIndex:
        """Of the rows that are there."""
        return self._tokens.index

    @property
    def complete(self) -> bool:
        """Whether every group is known."""
        return self._tokens.complete and self._rounds == len(self._tokens.rounds)

    @property
    def packs_per_epoch(self) -> int:
        """Waits for all tokens."""
        self.wait_for_all()
        return self._spans[-1].end

    @property
    def epoch_counts(self) -> CellCounts:
        """What one epoch holds. Waits for all tokens."""
        self.wait_for_all()
        return self._count_groups(range(len(self.groups)))

    def wait_for_all(self) -> None:
        while not self.complete:
            self._take_round()

    def span_at(self, draw: int) -> Span:
        """The span that holds a draw. Waits until it is there."""
        while not self.is_known(draw):
            self._take_round()
        if draw < self._spans[-1].end:
            return self._spans[bisect.bisect_right(self._spans, draw, key=lambda span: span.start) - 1]
        epoch = draw // self.packs_per_epoch
        return Span(epoch=epoch, start=epoch * self.packs_per_epoch, offset=0, packs=self.packs_per_epoch)

    def is_known(self, draw: int) -> bool:
        """Whether the span of a draw can be told without waiting."""
        return self.complete or (bool(self._spans) and draw < self._spans[-1].end)

    def locate(self, epoch: int, offset: int) -> tuple[int, int]:
        """(group, pack inside it) of the ``offset``-th pack of an epoch."""
        order, starts = self._order_of(epoch, len(self.groups))
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

    def count_span(self, span: Span) -> CellCounts:
        """What a whole span holds."""
        order, starts = self._order_of(span.epoch, len(self.groups))
        inside = (starts >= span.offset) & (starts < span.offset + span.packs)
        return self._count_groups(order[inside])

    def count_between(self, epoch: int, first: int, stop: int) -> CellCounts:
        """What the packs [first, stop) of an epoch hold."""
        order, starts = self._order_of(epoch, len(self.groups))
        ends = starts + np.asarray(self.group_packs, dtype=np.int64)[order]
        whole = (starts >= first) & (ends <= stop)
        total = self._count_groups(order[whole])
        for at in np.flatnonzero(~whole & (starts < stop) & (ends > first)):
            packed = self.packed(epoch, int(order[at]))
            low, high = max(first - starts[at], 0), min(stop, ends[at]) - starts[at]
            total += self._count(packed.rows[packed.starts[low] : packed.starts[high]])
        return total

    def _take_round(self) -> None:
        """The groups of the next round, and how many packs they make. Waits until it is there."""
        tokens, number = self._tokens, self._rounds
        if number == len(tokens.rounds):
            tokens.grow()
        begin, end = tokens.rounds[number - 1] if number else 0, tokens.rounds[number]
        starts = self.index.block_starts[begin : end + 1]
        chosen = self._wanted()[self.index.cell_of_row[starts[0] : starts[-1]]]
        before = np.concatenate([[0], np.cumsum(chosen)])  # chosen rows of the round before each of its rows
        kept = begin + np.flatnonzero(np.diff(before[starts - starts[0]]))
        first, offset = len(self.groups), self._spans[-1].end if self._spans else 0
        self.groups += block_groups(
            kept, self._blocks_per_group, seed=self._seed, round=number, shuffle=self._shuffle
        )
        self.group_packs += (
            list(self._known[first : len(self.groups)])
            if self._known
            else [self._packed(0, group).packs for group in range(first, len(self.groups))]
        )
        packs = sum(self.group_packs[first:])
        self._rounds += 1
        if self.complete and not self._known:
            self._keep(self.fingerprint, self.group_packs)
        if packs:
            self._spans.append(Span(epoch=0, start=offset, offset=offset, packs=packs))

    def _wanted(self) -> npt.NDArray[np.bool_]:
        """Of every cell, whether its rows are chosen."""
        return np.isin(np.arange(len(self.index.cells)), list(wanted_cells(self.index, **self._choice)))

    def _group_order(self, epoch: int, groups: int) -> tuple[Indices, Indices]:
        """The groups of an epoch in order, and the packs before each."""
        if epoch == 0 and self._tokens.begins_early:
            order = np.arange(groups)  # round by round
        else:
            order = group_order(groups, seed=self._seed, epoch=epoch, shuffle=self._shuffle)
        packs = np.asarray(self.group_packs, dtype=np.int64)[order]
        return order, np.cumsum(packs) - packs

    def _count_groups(self, groups: Iterable[int]) -> CellCounts:
        for group in range(len(self._counts), len(self.groups)):
            self._counts.append(self._count(self._rows_of(group)))
        total: CellCounts = np.zeros((len(self.index.cells), 3), np.int64)
        for group in groups:
            counts = self._counts[group]  # may be older than the last cells
            total[: len(counts)] += counts
        return total

    def _rows_of(self, group: int) -> Indices:
        """The chosen rows of a group's blocks, in the blocks' order."""
        starts = self.index.block_starts
        rows = np.concatenate([np.arange(starts[block], starts[block + 1]) for block in self.groups[group]])
        return np.asarray(rows[self._wanted()[self.index.cell_of_row[rows]]])

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
