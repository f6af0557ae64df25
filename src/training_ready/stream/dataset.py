"""The stream as the trainer sees it: a ``datasets.IterableDataset`` of packs whose whole state is one position.

Example of what one item holds, for a pack of two conversations of 3 and 2 tokens::

    input_ids    [5, 6, 7, 8, 9]
    labels       [-100, 6, 7, -100, 9]
    seq_lengths  [3, 2]
    domains      ["mental_health", ""]     what each conversation is about; empty where the corpus does not say

After the last pack of a plan that has an end come empty packs, to fill the last global batch: one token, not learned.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import IterableDataset
from datasets.iterable_dataset import _BaseExamplesIterable

from training_ready.stream.groups import PackReader
from training_ready.stream.plan import positions
from training_ready.stream.render import RenderedConversation
from training_ready.stream.shards import StreamError

IGNORED_LABEL = -100
_EMPTY_TOKEN = 0  # any token: it is not learned, and attention keeps it apart from every conversation


def pack_stream(
    packs: PackReader,
    *,
    global_batch: int = 1,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    fill_last_batch: bool = True,
) -> IterableDataset:
    """The packs of a plan, or one rank's share of them: ``global_batch / world_size`` of every global batch.

    Args:
        position: packs of all ranks before the first one; the beginning of a global batch.
        fill_last_batch: False ends with the last pack instead of empty ones (of use on one rank only).
    """
    packs.plan.check_divides(world_size, global_batch)
    return IterableDataset(
        ex_iterable=PackIterable(
            packs,
            position=position,
            rank=rank,
            world_size=world_size,
            global_batch=global_batch,
            fill_last_batch=fill_last_batch,
        )
    )


class PackIterable(_BaseExamplesIterable):
    """One rank's packs from a position on.

    ``state_dict()`` of the data set holds the position of the global batch, the packs taken of it by this rank, and
    the plan's identity. At the beginning of a global batch it serves any number of ranks.
    """

    def __init__(
        self,
        packs: PackReader,
        *,
        position: int,
        rank: int,
        world_size: int,
        global_batch: int,
        fill_last_batch: bool,
    ) -> None:
        super().__init__()
        self._state_dict: dict[str, Any] | None = None
        self._plan, self._reader, self._start = packs.plan, packs, position
        self._rank, self._world_size, self._global_batch = rank, world_size, global_batch
        self._fill_last_batch = fill_last_batch

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        start, taken = self._resumed()
        mine = self._global_batch // self._world_size
        last = self._plan.last_position()
        packs = self._reader.read(self._positions(start, taken, last))
        while True:
            began = time.monotonic()
            found = next(packs, None)
            if found is None:
                return
            position, rows = found
            example = _example(rows)
            self._reader.waited += time.monotonic() - began
            taken += 1
            if self._state_dict:
                whole, rest = divmod(taken, mine)
                self._state_dict["position"] = start + whole * self._global_batch
                self._state_dict["taken"] = rest
            yield str(position), example

    def _positions(self, start: int, taken: int, last: int | None) -> Iterator[int]:
        endless = positions(
            self._plan,
            start=start,
            rank=self._rank,
            world_size=self._world_size,
            global_batch=self._global_batch,
        )
        for number, position in enumerate(endless):
            if last is not None and position >= last:
                if position // self._global_batch * self._global_batch >= last:
                    return
                if not self._fill_last_batch:
                    continue
            if number >= taken:
                yield position

    def _resumed(self) -> tuple[int, int]:
        """(position of a global batch, packs of it already taken by this rank)."""
        state = self._state_dict
        if not state:
            return self._start, 0
        if state["plan"] != self._plan.fingerprint:
            raise StreamError(
                "the saved stream position belongs to another stream (other shards, tokenizer, template, mixture, seed "
                f"or pack length): saved plan {state['plan'][:12]}, this plan {self._plan.fingerprint[:12]}"
            )
        if state["taken"] and (state["world_size"], state["global_batch"]) != (
            self._world_size,
            self._global_batch,
        ):
            raise StreamError(
                f"the state was saved after {state['taken']} packs of a global batch of {state['global_batch']} on "
                f"{state['world_size']} ranks; only between global batches can it be continued on {self._world_size}"
            )
        state["world_size"], state["global_batch"] = self._world_size, self._global_batch
        return state["position"], state["taken"]

    def _init_state_dict(self) -> dict[str, Any]:
        self._state_dict = {
            "position": self._start,
            "taken": 0,
            "world_size": self._world_size,
            "global_batch": self._global_batch,
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
    if not rows:
        nothing = np.array([_EMPTY_TOKEN], dtype=np.int64)
        return {
            "input_ids": nothing,
            "labels": np.array([IGNORED_LABEL]),
            "seq_lengths": [1],
            "domains": [""],
        }
    input_ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    learned = np.concatenate([row.learned for row in rows])
    return {
        "input_ids": input_ids,
        "labels": np.where(learned, input_ids, IGNORED_LABEL),
        "seq_lengths": [len(row.input_ids) for row in rows],
        "domains": [row.domain for row in rows],
    }
