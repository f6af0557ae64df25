"""Which rows make pack number n? Arithmetic over row lengths, without reading a token or the packs before it.

The packs of all epochs of a part stand in one endless line. Its draw number d lies in epoch ``d // packs_per_epoch``;
the epoch is cut into as many equal stretches as there are lanes, and the draws of a lane read its stretch in order::

    epoch of a part   | group 7    | group 2      | group 0   | group 5    |
    stretches, 4 lanes|  lane 0  |  lane 1   |  lane 2  |  lane 3          |   (lanes change places by epoch)
    draw of lane 1 ───────────────► next pack of its stretch

An epoch that begins before all its packs are counted is cut into rounds first, and each round into stretches.

A position's pack depends on the tokens, mixture, seed, pack length, grouping and number of lanes; never on
ranks, workers or where a run was stopped. Every rank takes equally many packs of every global batch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training_ready.stream.lanes import Chapter, Lane
from training_ready.stream.line import CellCounts, PackLine, Span
from training_ready.stream.order import Indices
from training_ready.stream.shards import StreamError

DEFAULT_LANES = 16


@dataclass(frozen=True, slots=True)
class PackAddress:
    """One pack: a part of the mixture, its epoch, a group of blocks, and the pack's number in it."""

    part: int
    epoch: int
    group: int
    pack: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PartCounts:
    """What a stretch of the stream holds of one part. ``cells``: rows, tokens, learned tokens per cell.

    ``epochs`` is None while the packs of an epoch are not counted.
    """

    packs: int
    epochs: float | None
    cells: CellCounts

    @property
    def rows(self) -> int:
        return int(self.cells[:, 0].sum())

    @property
    def tokens(self) -> int:
        return int(self.cells[:, 1].sum())

    @property
    def learned_tokens(self) -> int:
        return int(self.cells[:, 2].sum())


class PackPlan:
    """The order of packs, for ever or up to ``total``."""

    def __init__(
        self,
        parts: Mapping[str, PackLine],
        *,
        chapters: Sequence[Chapter],
        lanes: int,
        limits: Sequence[int | None] | None = None,
        total: int | None = None,
    ) -> None:
        """
        Args:
            chapters: quotas of the parts, in the order of ``parts``; starts are indices of a lane.
            limits: packs of each part at most, over all epochs; None without limit.
            total: positions that hold a pack; later ones are empty.
        """
        self.parts = dict(parts)
        self.lines = list(parts.values())
        self.lanes, self.total = lanes, total
        limits = limits or [None] * len(self.lines)
        self._lanes = [Lane(lane, lanes, chapters, limits) for lane in range(lanes)]
        order = [
            [(name, line.fingerprint) for name, line in self.parts.items()],
            [(chapter.start, chapter.quota) for chapter in chapters],
            list(limits),
            lanes,
        ]
        self.fingerprint = hashlib.sha256(json.dumps(order).encode()).hexdigest()

    @property
    def packs_per_pass(self) -> int:
        """Packs of one epoch of every part."""
        return sum(line.packs_per_epoch for line in self.lines)

    def wait_for_all(self) -> None:
        """Until all tokens of every part are there."""
        for line in self.lines:
            line.wait_for_all()

    def is_known(self, position: int) -> bool:
        """Whether :meth:`address` answers without waiting for tokens."""
        drawn = self._drawn(position)
        return drawn is None or self.lines[drawn[0]].is_known(drawn[1])

    def address(self, position: int) -> PackAddress | None:
        """Where the pack of a position stands; None for an empty position after the last pack."""
        drawn = self._drawn(position)
        if drawn is None:
            return None
        part, draw = drawn
        line = self.lines[part]
        span = line.span_at(draw)
        group, pack = line.locate(span.epoch, self._offset(span, draw))
        return PackAddress(part, span.epoch, group, pack)

    def rows(self, address: PackAddress) -> Indices:
        """The rows of a pack, as numbers in its line's index."""
        return self.lines[address.part].packed(address.epoch, address.group).pack(address.pack)

    def share(self, step: int, *, rank: int, world_size: int, global_batch: int) -> list[int]:
        """The positions of one rank in one global batch: whole lanes where there are enough of them.

        Raises:
            StreamError: the numbers do not divide.
        """
        self.check_divides(world_size, global_batch)
        mine, per_lane = global_batch // world_size, global_batch // self.lanes
        places = (divmod(n, per_lane) for n in range(rank * mine, (rank + 1) * mine))
        return [step * global_batch + turn * self.lanes + lane for lane, turn in places]

    def check_divides(self, world_size: int, global_batch: int) -> None:
        for name, number in (("ranks", world_size), ("stream.lanes", self.lanes)):
            if global_batch % number:
                raise StreamError(
                    f"{name} ({number}) must divide the global batch of {global_batch} packs, so that every rank takes "
                    f"equally many; {global_batch} = {global_batch // number} x {number} + {global_batch % number}"
                )

    def last_position(self) -> int | None:
        """The number of positions until nothing is left; None for an endless plan."""
        ends = [lane.end for lane in self._lanes]
        # The last pack of a lane stands at index end − 1.
        limited = (
            None
            if None in ends
            else max((end - 1) * self.lanes + lane + 1 for lane, end in enumerate(ends) if end)
        )
        known = [end for end in (self.total, limited) if end is not None]
        return min(known) if known else None

    def steps(self, global_batch: int) -> int | None:
        """Optimizer steps until nothing is left; None for an endless plan."""
        last = self.last_position()
        return None if last is None else math.ceil(last / global_batch)

    def count(self, position: int) -> dict[str, PartCounts]:
        """What the positions before ``position`` hold, per part."""
        if self.total is not None:
            position = min(position, self.total)
        drawn = [
            lane.drawn((position - number + self.lanes - 1) // self.lanes)
            for number, lane in enumerate(self._lanes)
        ]
        return {
            name: self._count_part(line, [of_lane[part] for of_lane in drawn])
            for part, (name, line) in enumerate(self.parts.items())
        }

    def _drawn(self, position: int) -> tuple[int, int] | None:
        """(part, draw of it) of a position; None after the last pack."""
        index, lane = divmod(position, self.lanes)
        return None if self.total is not None and position >= self.total else self._lanes[lane].at(index)

    def _count_part(self, line: PackLine, draws: Sequence[int]) -> PartCounts:
        packs, passed, last = sum(draws), min(draws) * self.lanes, max(draws) * self.lanes
        per_epoch = line.packs_per_epoch if line.complete else None
        whole = passed // per_epoch if per_epoch else 0
        if last:
            line.span_at(last - 1)  # all that is counted is there, and its cells are known
        cells: CellCounts = np.zeros((len(line.index.cells), 3), np.int64)
        if whole:
            cells += whole * line.epoch_counts
        at = whole * (per_epoch or 0)
        while at < last:
            span = line.span_at(at)
            if span.end <= passed:
                cells += line.count_span(span)
            else:
                for lane, of_lane in enumerate(draws):
                    # The draws of this lane that fall into this span are one stretch of it.
                    first = self._first_draw(span.start, lane)
                    stop = min(of_lane, self._first_draw(span.end, lane))
                    if stop > first:
                        start = self._offset(span, first * self.lanes + lane)
                        cells += line.count_between(span.epoch, start, start + stop - first)
            at = span.end
        return PartCounts(packs=packs, epochs=packs / per_epoch if per_epoch else None, cells=cells)

    def _first_draw(self, draw: int, lane: int) -> int:
        """The first k with k × lanes + lane ≥ draw."""
        return max(0, -((lane - draw) // self.lanes))

    def _offset(self, span: Span, draw: int) -> int:
        """The place in its epoch's line of a draw of a span: each lane has a stretch of the span for itself."""
        length, longer = divmod(span.packs, self.lanes)
        into, stretch = divmod(draw - span.start, self.lanes)
        return span.offset + stretch * length + min(stretch, longer) + into


def lanes_for(global_batch: int) -> int:
    """The most lanes, up to 16, that divide the global batch."""
    return max(n for n in range(1, min(global_batch, DEFAULT_LANES) + 1) if global_batch % n == 0)


def positions(plan: PackPlan, *, start: int, rank: int, world_size: int, global_batch: int) -> Iterator[int]:
    """One rank's positions from a global batch on, endlessly.

    Raises:
        StreamError: ``start`` is not the beginning of a global batch.
    """
    step, rest = divmod(start, global_batch)
    if rest:
        raise StreamError(
            f"position {start} is {rest} packs into a global batch of {global_batch}: continue with the global batch "
            "of the run that was stopped"
        )
    while True:
        yield from plan.share(step, rank=rank, world_size=world_size, global_batch=global_batch)
        step += 1


def fill_of(counts: Sequence[PartCounts], max_length: int) -> float:
    """Tokens in the packs as a share of their room."""
    packs = sum(one.packs for one in counts)
    return sum(one.tokens for one in counts) / (packs * max_length) if packs else 0.0


def tokens_by_source(plan: PackPlan, counts: Mapping[str, PartCounts]) -> dict[str, np.ndarray[Any, Any]]:
    """(rows, tokens, learned tokens) of every source family."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, part in counts.items():
        # Not strict: there may be more cells by now.
        for cell, numbers in zip(plan.parts[name].index.cells, part.cells, strict=False):
            if numbers[0]:
                found[cell.source] = found.get(cell.source, np.zeros(3, np.int64)) + numbers
    return dict(sorted(found.items()))
