"""How many requests may this process send? A bucket has limits, and every rank and worker draws on them.

OVHcloud's soft limits are 900 GET/s and 300 PUT/s for one bucket
(help.ovhcloud.com, article KB0047376). Beyond them answers are 503.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from training_ready.storage.errors import SettingsError

READS_PER_SECOND = 900.0
WRITES_PER_SECOND = 300.0
_VARIABLES = {"OVH_S3_READS_PER_SECOND": READS_PER_SECOND, "OVH_S3_WRITES_PER_SECOND": WRITES_PER_SECOND}
_READS = ("GET", "HEAD")


class TokenBucket:
    """At most ``rate`` a second on average, ``rate`` (at least 1) in one burst. Safe for several threads."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._most = max(1.0, rate)
        self._left, self._then = self._most, time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> float:
        """Take one, and wait until it is there; the seconds waited. Those who come first are served first."""
        with self._lock:
            now = time.monotonic()
            self._left = min(self._most, self._left + (now - self._then) * self.rate) - 1
            self._then = now
            wait = -self._left / self.rate if self._left < 0 else 0.0
        if wait:
            time.sleep(wait)
        return wait


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestBudget:
    """One process' share of what a host takes. Botocore's own retries and the parts of an upload count too."""

    reads: TokenBucket
    writes: TokenBucket

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> RequestBudget:
        """The host's limits (``OVH_S3_READS_PER_SECOND``, ``OVH_S3_WRITES_PER_SECOND``) in equal shares.

        The shares are as many as ``WORLD_SIZE`` says, which every launcher sets for its ranks.

        Raises:
            SettingsError: a limit is not a number above zero.
        """
        found = os.environ if env is None else env
        processes = max(1, int(found.get("WORLD_SIZE") or 1))
        reads, writes = (
            TokenBucket(_number(name, found.get(name), default) / processes)
            for name, default in _VARIABLES.items()
        )
        return cls(reads=reads, writes=writes)

    def take(self, method: str) -> float:
        """Wait until a request of this HTTP method may be sent; the seconds waited."""
        return (self.reads if method in _READS else self.writes).take()


_budgets: dict[tuple[int, str], RequestBudget] = {}  # by process and host, whatever the bucket or the keys
_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


def budget_of(endpoint: str) -> RequestBudget:
    """This process' budget at one endpoint, shared by its threads and kept when credentials are renewed."""
    with _lock:
        key = (os.getpid(), endpoint)
        if key not in _budgets:
            _budgets[key] = RequestBudget.from_environment()
        return _budgets[key]


def _number(name: str, text: str | None, default: float) -> float:
    try:
        number = float(text) if text else default
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise SettingsError(
            f"{name} is '{text}': give the requests per second that the bucket takes, such as 900."
        )
    return number
