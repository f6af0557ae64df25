"""Which rows make pack number n? Computed from row lengths alone, without reading a token.

The packs of all epochs stand in one endless sequence; a position is an index into it::

    epoch 0: group 0 packs | group 1 packs | ...   epoch 1: group 0 packs | ...
    position 0 .. p0-1     | p0 ..                 packs_in_epoch(0) ..

What a row's place is depends on the token shards, seed, pack length and group size, never on ranks, workers or
batch size, so a run continues exactly on another number of machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training_ready.stream.order import block_groups, generator
from training_ready.stream.packs import best_fit_decreasing
from training_ready.stream.shards import StreamError
from training_ready.stream.tokens import TokenShard

# A row: (block, row inside the block). A block: index over all blocks of all shards.
Row = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Blocks that are read together, and the packs made of their rows."""

    blocks: tuple[int, ...]
    packs: list[list[Row]]


@dataclass(kw_only=True, slots=True)
class TrainedCounts:
    """What a stretch of the stream holds."""

    packs: int = 0
    rows: int = 0
    tokens: int = 0
    learned_tokens: int = 0


class PackPlan:
    """The order of packs over all epochs of a set of token shards."""

    def __init__(
        self,
        shards: Sequence[TokenShard],
        *,
        max_length: int,
        seed: int,
        packing: bool = True,
        blocks_per_group: int = 8,
        stages: Sequence[str] | None = None,
        shuffle: bool = True,
    ) -> None:
        """
        Args:
            max_length: tokens in a full pack.
            stages: keep only rows of these stages; None keeps all.
            shuffle: False keeps the order of the corpus (evaluation).

        Raises:
            StreamError: no row is left to train on.
        """
        self.shards = list(shards)
        self._max_length, self._seed = max_length, seed
        self._packing, self._shuffle = packing, shuffle
        self._blocks_per_group = blocks_per_group
        self._block_home = [(s, b) for s, shard in enumerate(shards) for b in range(len(shard.block_rows))]
        self._lengths, self._learned = _per_block(shards)
        self._kept = _kept_rows(shards, stages)
        self._groups: dict[tuple[int, int], Group] = {}
        self._epoch_sizes: dict[int, list[int]] = {}
        if not sum(len(rows) for rows in self._kept):
            wanted = f"stages {sorted(stages)}" if stages else "the split"
            raise StreamError(f"no row to train on: {wanted} is empty after the length policy")
        identity = [[s.key for s in shards], max_length, seed, packing, blocks_per_group, stages, shuffle]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def home_of(self, block: int) -> tuple[TokenShard, int]:
        """The shard that holds a block, and the block's index there."""
        shard, local = self._block_home[block]
        return self.shards[shard], local

    def packs_in_epoch(self, epoch: int) -> int:
        return sum(self._group_sizes(epoch))

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, group, pack inside the group) of a position."""
        epoch = 0
        while position >= (size := self.packs_in_epoch(epoch)):
            position, epoch = position - size, epoch + 1
        for group, size in enumerate(self._group_sizes(epoch)):
            if position < size:
                return epoch, group, position
            position -= size
        raise AssertionError("unreachable: the position lies inside the epoch")

    def groups_from(self, epoch: int, group: int) -> Iterator[Group]:
        """Groups in order, endlessly, starting at the given one."""
        while True:
            for index in range(group, len(self._group_sizes(epoch))):
                yield self._group(epoch, index)
            epoch, group = epoch + 1, 0

    def count(self, packs: int) -> TrainedCounts:
        """What the first ``packs`` packs of the stream hold."""
        counts = TrainedCounts()
        for group in self.groups_from(0, 0):
            for pack in group.packs:
                if counts.packs == packs:
                    return counts
                counts.packs += 1
                counts.rows += len(pack)
                counts.tokens += sum(int(self._lengths[block][row]) for block, row in pack)
                counts.learned_tokens += sum(int(self._learned[block][row]) for block, row in pack)
        raise AssertionError("unreachable: the stream has no end")

    def _group_sizes(self, epoch: int) -> list[int]:
        if epoch not in self._epoch_sizes:
            groups = self._blocks_of(epoch)
            self._epoch_sizes[epoch] = [len(self._group(epoch, index).packs) for index in range(len(groups))]
        return self._epoch_sizes[epoch]

    def _blocks_of(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        return block_groups(
            len(self._block_home), self._blocks_per_group, seed=self._seed, epoch=epoch, shuffle=self._shuffle
        )

    def _group(self, epoch: int, index: int) -> Group:
        blocks = tuple(self._blocks_of(epoch)[index].tolist())
        rows: list[Row] = [(block, row) for block in blocks for row in self._kept[block].tolist()]
        random = generator(self._seed, epoch, 1, index)
        if self._shuffle:
            rows = [rows[i] for i in random.permutation(len(rows))]
        lengths = [int(self._lengths[block][row]) for block, row in rows]
        if self._packing:
            packs = [[rows[i] for i in pack] for pack in best_fit_decreasing(lengths, self._max_length)]
        else:
            packs = [[row] for row in rows]
        if self._shuffle:  # best-fit-decreasing leaves the longest rows first
            packs = [packs[i] for i in random.permutation(len(packs))]
        return Group(blocks=blocks, packs=packs)


def _per_block(
    shards: Sequence[TokenShard],
) -> tuple[list[npt.NDArray[np.int32]], list[npt.NDArray[np.int32]]]:
    lengths: list[npt.NDArray[np.int32]] = []
    learned: list[npt.NDArray[np.int32]] = []
    for shard in shards:
        borders = np.cumsum(shard.block_rows)[:-1]
        lengths += np.split(shard.lengths, borders)
        learned += np.split(shard.learned_tokens, borders)
    return lengths, learned


def _kept_rows(shards: Sequence[TokenShard], stages: Sequence[str] | None) -> list[npt.NDArray[np.int64]]:
    """Per block, the rows that belong to the wanted stages."""
    kept = []
    for shard in shards:
        wanted = np.array([stages is None or stage in stages for stage in shard.stages], dtype=np.bool_)
        kept += [np.flatnonzero(part) for part in np.split(wanted, np.cumsum(shard.block_rows)[:-1])]
    return kept
