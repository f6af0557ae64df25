"""Which pack stands at position n? The positions are dealt to lanes, and each lane is a pure function of its index.

::

    position   0 1 2 3   4 5 6 7   8 ...            4 lanes; position = index × lanes + lane
    lane       0 1 2 3   0 1 2 3   0 ...            a global batch takes equally many packs of every lane

    lane 1     index   0   1   2   3   4   5
               part    a   a   b   a   a   b        the mixture's pattern
               draw    0   1   0   2   3   1        how many of that part this lane has had

A lane's draws of a part read one stretch of its line (:mod:`.plan`), so whoever has few lanes reads few groups. A part
that may be repeated only so often is used up at some index of each lane; from there the others share its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training_ready.stream.mixture import PERIOD, pattern
from training_ready.stream.order import Indices


@dataclass(frozen=True, kw_only=True, slots=True)
class Chapter:
    """The draws per period of every part, from an index of the lanes on."""

    start: int
    quota: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Segment:
    """A stretch of a lane with one pattern; an empty pattern means that every part is used up."""

    start: int
    sequence: tuple[int, ...] | npt.NDArray[np.int16]
    places: list[Indices]  # of each part in the period
    before: tuple[int, ...]  # draws of each part before the start

    def drawn(self, index: int) -> tuple[int, ...]:
        """Draws of each part before an index of this stretch."""
        periods, rest = divmod(index - self.start, PERIOD)
        return tuple(
            before + periods * len(places) + int(np.searchsorted(places, rest))
            for before, places in zip(self.before, self.places, strict=True)
        )


class Lane:
    """One lane."""

    def __init__(
        self, lane: int, lanes: int, chapters: Sequence[Chapter], limits: Sequence[int | None]
    ) -> None:
        """
        Args:
            chapters: in order, the first at index 0.
            limits: draws of each part over all lanes, None without limit.
        """
        self._lane, self._lanes, self._chapters = lane, lanes, chapters
        # Draw k of this lane is draw k × lanes + lane of the part.
        self._limits = [None if limit is None else max(0, -((lane - limit) // lanes)) for limit in limits]
        self._segments = [self._segment(0, (0,) * len(limits))]
        self._complete = False

    def at(self, index: int) -> tuple[int, int] | None:
        """(part, draw of it over all lanes) at an index; None where every part is used up."""
        segment = self._at(index)
        if not len(segment.sequence):
            return None
        part = int(segment.sequence[(index - segment.start) % PERIOD])
        return part, segment.drawn(index)[part] * self._lanes + self._lane

    def drawn(self, index: int) -> tuple[int, ...]:
        """Draws of each part by this lane before an index."""
        return self._at(index).drawn(index)

    @property
    def end(self) -> int | None:
        """The index from which every part is used up; None if some part never is."""
        while not self._complete:
            self._extend()
        return None if len(self._segments[-1].sequence) else self._segments[-1].start

    def _at(self, index: int) -> _Segment:
        while self._segments[-1].start <= index and not self._complete:
            self._extend()
        return next(segment for segment in reversed(self._segments) if segment.start <= index)

    def _extend(self) -> None:
        """Adds the stretch after the last one: at the next chapter, or where a part is used up."""
        last = self._segments[-1]
        ends = [chapter.start for chapter in self._chapters if chapter.start > last.start][:1]
        for places, before, limit in zip(last.places, last.before, self._limits, strict=True):
            if limit is not None and len(places):
                periods, rest = divmod(limit - before - 1, len(places))
                ends.append(last.start + periods * PERIOD + int(places[rest]) + 1)
        if ends:
            start = min(ends)
            self._segments.append(self._segment(start, last.drawn(start)))
        else:
            self._complete = True

    def _segment(self, start: int, before: tuple[int, ...]) -> _Segment:
        chapter = [chapter for chapter in self._chapters if chapter.start <= start][-1]
        left = [
            0 if limit is not None and done >= limit else share
            for share, done, limit in zip(chapter.quota, before, self._limits, strict=True)
        ]
        if not sum(left):
            none: list[Indices] = [np.zeros(0, np.int64)] * len(left)
            return _Segment(start=start, sequence=(), places=none, before=before)
        sequence = pattern(_full(left), first=start * self._lanes + self._lane, stride=self._lanes)
        places = [np.flatnonzero(sequence == part) for part in range(len(left))]
        return _Segment(start=start, sequence=sequence, places=places, before=before)


def _full(left: Sequence[int]) -> list[int]:
    """Quotas of the parts that are left, enlarged to a whole period in their proportion."""
    if sum(left) == PERIOD:
        return list(left)
    borders = np.round(np.cumsum(left) * PERIOD / sum(left)).astype(int)
    return [int(n) for n in np.diff(np.concatenate([[0], borders]))]
