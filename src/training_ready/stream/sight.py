"""What does the data cost a step, and what is in it? Figures for every log of a run."""

from __future__ import annotations

import time

from training_ready.stream.groups import PackReader
from training_ready.stream.plan import tokens_by_source


class StreamSight:
    """Figures of the time between two logs.

    ==============================  ====================================================================
    ``stream/wait_share``           time that this rank waited for packs, as a share of all time
    ``stream/fetched_mb``           stored bytes of the blocks that this rank fetched, 10^6
    ``stream/retries``              ranges that this rank asked for again
    ``stream/cache_hits``           blocks of the disk cache that it found there
    ``stream/fill``                 tokens of all ranks' packs as a share of their room
    ``stream/tokens/<source>``      tokens trained since the beginning of the run, all ranks
    ``stream/epochs/<part>``        passes over a part of the mixture since the beginning of the run, once its packs
                                    are counted
    ==============================  ====================================================================
    """

    def __init__(self, packs: PackReader, max_length: int, position: int) -> None:
        self._packs, self._max_length = packs, max_length
        self._counts = packs.plan.count(position)
        self._time, self._waited, self._bytes = time.monotonic(), packs.waited, packs.bytes_read
        self._traffic = packs.traffic()

    def since_last_log(self, position: int) -> dict[str, float]:
        """The figures at a position: packs that the optimizer has seen."""
        now, counts = time.monotonic(), self._packs.plan.count(position)
        traffic = self._packs.traffic()
        packs = sum(counts[name].packs - self._counts[name].packs for name in counts)
        tokens = sum(counts[name].tokens - self._counts[name].tokens for name in counts)
        figures = {
            "stream/wait_share": round((self._packs.waited - self._waited) / (now - self._time), 4),
            "stream/fetched_mb": round((self._packs.bytes_read - self._bytes) / 1e6, 3),
            "stream/retries": traffic["retries"] - self._traffic["retries"],
            "stream/cache_hits": traffic["cache_hits"] - self._traffic["cache_hits"],
            "stream/fill": round(tokens / (packs * self._max_length), 4) if packs else 0.0,
        }
        for source, (_, tokens, _) in tokens_by_source(self._packs.plan, counts).items():
            figures[f"stream/tokens/{source}"] = int(tokens)
        for name, part in counts.items():
            if part.epochs is not None:
                figures[f"stream/epochs/{name}"] = round(part.epochs, 4)
        self._counts, self._time, self._traffic = counts, now, traffic
        self._waited, self._bytes = self._packs.waited, self._packs.bytes_read
        return figures
