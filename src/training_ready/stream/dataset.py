"""The stream as the trainer sees it: a ``datasets.IterableDataset`` of packs whose whole state is one position.

Example of what one item holds, for a pack of two conversations of 3 and 2 tokens::

    input_ids    [5, 6, 7, 8, 9]
    labels       [-100, 6, 7, -100, 9]
    seq_lengths  [3, 2]
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from datasets import IterableDataset
from datasets.iterable_dataset import _BaseExamplesIterable

from training_ready.stream.plan import Group, PackPlan, Row
from training_ready.stream.render import RenderedConversation
from training_ready.stream.shards import StreamError

IGNORED_LABEL = -100


def pack_stream(
    plan: PackPlan, *, position: int = 0, rank: int = 0, world_size: int = 1, micro_batch: int = 1
) -> IterableDataset:
    """An endless stream of packs, or one rank's share of it.

    The packs of global position ``m * world_size * micro_batch + rank * micro_batch + i`` (``i < micro_batch``) belong
    to ``rank``: every optimizer step covers the same packs whatever the number of ranks.

    Args:
        position: global position to start from.
        micro_batch: packs that a rank takes at a time (its per-device batch size).
    """
    return IterableDataset(
        ex_iterable=PackIterable(
            plan, position=position, rank=rank, world_size=world_size, micro_batch=micro_batch
        )
    )


class PackIterable(_BaseExamplesIterable):
    """Packs from a position on. ``state_dict()`` of the data set holds that position and the plan's fingerprint."""

    def __init__(
        self, plan: PackPlan, *, position: int, rank: int, world_size: int, micro_batch: int
    ) -> None:
        super().__init__()
        self._state_dict: dict[str, Any] | None = None
        self._plan, self._start = plan, position
        self._rank, self._world_size, self._micro_batch = rank, world_size, micro_batch

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        position = self._start
        if self._state_dict:
            if self._state_dict["plan"] != self._plan.fingerprint:
                raise StreamError(
                    "the saved stream position belongs to another stream (other shards, tokenizer, template, seed or "
                    f"pack length): saved plan {self._state_dict['plan'][:12]}, this plan {self._plan.fingerprint[:12]}"
                )
            position = self._state_dict["position"]
        for pack_position, rows in self._packs(position):
            if self._is_mine(pack_position):
                if self._state_dict:
                    self._state_dict["position"] = pack_position + 1
                yield str(pack_position), _example(rows)

    def _is_mine(self, position: int) -> bool:
        return position // self._micro_batch % self._world_size == self._rank

    def _packs(self, position: int) -> Iterator[tuple[int, list[RenderedConversation]]]:
        epoch, group_index, offset = self._plan.locate(position)
        groups = self._plan.groups_from(epoch, group_index)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="stream") as ahead:
            coming = ahead.submit(self._read, next(groups))
            while True:
                group, rows = coming.result()
                coming = ahead.submit(
                    self._read, next(groups)
                )  # the next group is fetched while this one is used
                for pack in group.packs[offset:]:
                    yield position, [rows[row] for row in pack]
                    position += 1
                offset = 0

    def _read(self, group: Group) -> tuple[Group, dict[Row, RenderedConversation]]:
        rows: dict[Row, RenderedConversation] = {}
        for block in group.blocks:
            shard, local = self._plan.home_of(block)
            for row, conversation in enumerate(shard.read_block(local)):
                rows[block, row] = conversation
        return group, rows

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict = {
            "position": self._start,
            "plan": self._plan.fingerprint,
            "type": type(self).__name__,
        }
        return self._state_dict

    @property
    def num_shards(self) -> int:
        # One, and not to be divided: this stream does its own sharding (see `pack_stream`).
        return 1

    def shuffle_data_sources(self, generator: np.random.Generator) -> PackIterable:
        raise StreamError(
            "the stream is shuffled already; change `data_seed` in the recipe for another order"
        )

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> PackIterable:
        if num_shards == 1:
            return self
        raise StreamError(
            f"something tried to split the stream {num_shards} ways a second time: ranks would train on part of the "
            "rows only. Use pack_stream(rank=..., world_size=...)."
        )


def _example(rows: list[RenderedConversation]) -> dict[str, Any]:
    input_ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    learned = np.concatenate([row.learned for row in rows])
    return {
        "input_ids": input_ids,
        "labels": np.where(learned, input_ids, IGNORED_LABEL),
        "seq_lengths": [len(row.input_ids) for row in rows],
    }
