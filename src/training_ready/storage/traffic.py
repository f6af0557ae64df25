"""What has reading cost so far? Counted as it happens, per store and process."""

from __future__ import annotations

import os
import threading
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """``bytes`` came over the network, ``cached_bytes`` from the local disk; a retry is a range asked for again."""

    requests: int = 0
    bytes: int = 0
    retries: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cached_bytes: int = 0


class Traffic:
    """Counters that several threads add to. A forked child counts from zero."""

    def __init__(self) -> None:
        self._reset()

    def add(self, **amounts: int) -> None:
        """Add to the counters named as in :class:`Cost`."""
        if self._pid != os.getpid():  # the parent's lock may be held for ever here
            self._reset()
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def cost(self) -> Cost:
        """What was counted so far."""
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            return Cost(**self._counts)

    def __repr__(self) -> str:
        return f"Traffic({asdict(self.cost())})"

    def _reset(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._counts = {field.name: 0 for field in fields(Cost)}
