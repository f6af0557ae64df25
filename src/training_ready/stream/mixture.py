"""Which part of the data does the next pack come from? Shares turned into a fixed pattern of packs.

A pack belongs to one part. The pattern is a low-discrepancy sequence over a period of 10,007 packs (a prime, so that
every lane of the stream runs through all of it): part c is drawn when::

    u(p) = p × 6,185 mod 10,007          6,185 ≈ 10,007 × golden ratio
    cumulative quota(c − 1) ≤ u(p) < cumulative quota(c)

In a whole period every part is drawn exactly as often as its quota says, and any 1,000 packs come within 1 % of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from training_ready.stream.shards import StreamError

PERIOD = 10_007
_STRIDE = 6_185


def shares(weights: Sequence[float], temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """``weight ** (1 / temperature)``, normalised: above 1 evens parts out, below 1 favours the heavy ones."""
    scaled = np.asarray(weights, dtype=np.float64) ** (1 / temperature)
    return np.asarray(scaled / scaled.sum())


def pack_shares(
    wanted: npt.NDArray[np.float64], per_pack: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Shares of packs that make the wanted shares of tokens (or rows), with ``per_pack`` of them in a pack."""
    packs = wanted / per_pack
    return np.asarray(packs / packs.sum())


def quotas(packs: npt.NDArray[np.float64], names: Sequence[str]) -> list[int]:
    """Draws per period, by largest remainder.

    Raises:
        StreamError: a part is wanted so rarely that it would never be drawn.
    """
    exact = packs * PERIOD
    found = np.floor(exact).astype(int)
    for part in np.argsort(found - exact, kind="stable")[: PERIOD - found.sum()]:
        found[part] += 1
    never = [name for name, share, quota in zip(names, packs, found, strict=True) if share and not quota]
    if never:
        raise StreamError(
            f"stream.mixture: {', '.join(never)} would be less than one pack of {PERIOD} and never be drawn; give it "
            "a larger weight or leave it out"
        )
    return [int(quota) for quota in found]


def pattern(quota: Sequence[int], *, first: int, stride: int) -> npt.NDArray[np.int16]:
    """The parts of one period, at the positions ``first + i * stride``."""
    positions = (first + np.arange(PERIOD, dtype=np.int64) * stride) % PERIOD
    return np.searchsorted(np.cumsum(quota), positions * _STRIDE % PERIOD, side="right").astype(np.int16)
