"""Which rows share a training sequence? Best-fit-decreasing bin packing, deterministic.

Each row goes into the fullest pack that still has room for it, longest rows first (Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830). No row is split or cut here.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def best_fit_decreasing(lengths: Sequence[int] | npt.NDArray[np.int32], capacity: int) -> list[list[int]]:
    """Packs of row indices whose lengths sum to at most ``capacity`` tokens.

    Raises:
        ValueError: a row is longer than ``capacity``.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for row in order.tolist():
        length = int(lengths[row])
        if length > capacity:
            raise ValueError(f"row {row} has {length} tokens, more than the pack's {capacity}")
        at = bisect.bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, pack = rooms.pop(at)
            packs[pack].append(row)
        else:
            room, pack = capacity, len(packs)
            packs.append([row])
        bisect.insort(rooms, (room - length, pack))
    return packs
