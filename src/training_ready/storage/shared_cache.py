"""Which bytes does another machine of this run hold already? An optional Redis between the local disk and the bucket.

Blocks have the names and the size of :mod:`.disk_cache`: endpoint, bucket, key, ETag and number make the name, so what
is found is the version that was asked for. Each carries its SHA-256. Redis may be slow, full, empty or gone: whatever
it answers but the block itself, the bucket is asked.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Protocol
from urllib.parse import urlsplit

from training_ready.storage.disk_cache import BLOCK_BYTES, DiskCache
from training_ready.storage.errors import SettingsError

logger = logging.getLogger(__name__)

_PREFIX = "training-ready:block:"
_DIGEST_BYTES = 32
_KEPT_SECONDS = 24 * 3600
_TIMEOUT_SECONDS = 1.0
_REST_SECONDS = 30.0  # after an error nobody waits for the server's time-out again for so long


class BlockCache(Protocol):
    """What a reader can read through: :class:`DiskCache` or :class:`SharedCache`."""

    @property
    def block_bytes(self) -> int: ...

    def block(self, name: str, fetch: Callable[[], bytes]) -> tuple[bytes, bool]:
        """The block of this name, fetched unless the cache has it; and whether it had it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedCache:
    """Blocks in a Redis server at ``url``, behind the ``disk`` of this machine if there is one; as safe as that."""

    url: str = field(repr=False)  # may hold a password
    disk: DiskCache | None = None
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("redis", "rediss", "unix"):
            raise SettingsError(
                "TRAINING_READY_REDIS is no address of a Redis server: redis://host:6379/0, rediss:// for TLS, or unix://"
                "/path. Its value is not shown, as it may hold a password."
            )
        try:
            import redis  # noqa: F401
        except ModuleNotFoundError as error:
            raise SettingsError(
                'TRAINING_READY_REDIS is set, but its client is not installed: pip install "training-ready[redis]".'
            ) from error
        if self.disk is not None and self.disk.block_bytes != self.block_bytes:
            raise SettingsError(
                f"disk blocks of {self.disk.block_bytes} bytes, shared ones of {self.block_bytes}"
            )

    @property
    def server(self) -> str:
        """Its name without user and password, for messages."""
        parts = urlsplit(self.url)
        return f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path

    def block(self, name: str, fetch: Callable[[], bytes]) -> tuple[bytes, bool]:
        if self.disk is None:
            return self._shared(name, fetch)
        found: list[bool] = []

        def fetch_shared() -> bytes:
            data, here = self._shared(name, fetch)
            found.append(here)
            return data

        data, on_disk = self.disk.block(name, fetch_shared)
        return data, on_disk or any(found)

    def _shared(self, name: str, fetch: Callable[[], bytes]) -> tuple[bytes, bool]:
        stored = self._ask(lambda client: client.get(_PREFIX + name))
        if isinstance(stored, bytes) and len(stored) > _DIGEST_BYTES:
            data, digest = stored[:-_DIGEST_BYTES], stored[-_DIGEST_BYTES:]
            if hashlib.sha256(data).digest() == digest:
                return data, True
            logger.warning(f"block {name} in Redis at {self.server} is damaged: the bucket is asked")
        data = fetch()
        if len(data) <= self.block_bytes:
            value = data + hashlib.sha256(data).digest()
            self._ask(partial(_store, name=name, value=value))
        return data, False

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """The server's answer; None when it gives none, which is said once an outage."""
        import redis

        if time.monotonic() < _resting_until.get(self.url, 0.0):
            return None
        try:
            answer = question(_client(self.url, os.getpid()))
        except (redis.RedisError, OSError) as error:
            _resting_until[self.url] = time.monotonic() + _REST_SECONDS
            logger.warning(
                f"Redis at {self.server} cannot be used ({type(error).__name__}); for {_REST_SECONDS:.0f} s everything "
                "comes from the bucket"
            )
            return None
        return answer


def cache_from_environment(env: Mapping[str, str] | None = None) -> BlockCache | None:
    """The caches that ``TRAINING_READY_CACHE`` and ``TRAINING_READY_REDIS`` describe, or None.

    Raises:
        SettingsError: one of them cannot be meant.
    """
    disk = DiskCache.from_environment(env)
    url = (os.environ if env is None else env).get("TRAINING_READY_REDIS", "").strip()
    return SharedCache(url=url, disk=disk) if url else disk


_resting_until: dict[str, float] = {}


@lru_cache(maxsize=4)
def _client(url: str, process: int) -> Any:
    """One client a process: a forked child must not talk over its parent's connection."""
    import redis

    return redis.Redis.from_url(
        url, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS, retry=None
    )


def _store(client: Any, *, name: str, value: bytes) -> Any:
    return client.set(_PREFIX + name, value, ex=_KEPT_SECONDS)
