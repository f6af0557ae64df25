"""How does one range of one version arrive whole over a network that fails?"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from training_ready.storage.errors import ObjectChanged, StorageError, is_passing, status_of

if TYPE_CHECKING:
    from training_ready.storage.objects import ObjectInfo, ObjectStore
    from training_ready.storage.shared_cache import BlockCache


class Patience:
    """Growing pauses with jitter, as long as the last success is less than ``seconds`` ago."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._deadline, self._pause = time.monotonic() + self.seconds, 0.1

    def pause(self) -> bool:
        """Sleep and return True, or return False at once when the time is up."""
        if time.monotonic() + self._pause > self._deadline:
            return False
        time.sleep(random.uniform(self._pause / 2, self._pause))  # noqa: S311 - jitter, not a secret
        self._pause = min(self._pause * 2, 10.0)
        return True


def pin(store: ObjectStore, key: str, patience: float) -> ObjectInfo:
    """The object as it is now. A store that answered before is given ``patience`` seconds to answer again.

    Raises:
        ObjectNotFound: there is no such object.
        StorageError: the store does not answer, or names no version of its objects.
    """
    waiting, nameless = Patience(patience), Patience(min(patience, 3.0))
    while True:
        try:
            info = store.head(key)
        except StorageError as error:
            if not (store.has_answered and is_passing(error.__cause__) and waiting.pause()):
                raise
            continue
        if not info.etag and nameless.pause():
            continue  # rclone names none while the object is being replaced
        if not info.etag:
            raise StorageError(
                f"{store.uri(key)} has no ETag: its versions cannot be told apart while it is read."
            )
        return info


class RangeFetcher:
    """Fetches ranges of one pinned object. Safe for several threads."""

    def __init__(self, store: ObjectStore, info: ObjectInfo, patience: float) -> None:
        self._store, self._info, self._patience = store, info, patience
        self._uri = store.uri(info.key)

    def fetch(self, start: int, stop: int, wanted: Callable[[], bool]) -> bytes:
        """The bytes [start, stop): after each failure from the last byte on, until patience or interest ends.

        Raises:
            ObjectChanged: the object is no longer the pinned one.
            StorageError: no byte for too long, or a reply that cannot be right.
        """
        received = bytearray()
        waiting = Patience(self._patience)
        while len(received) < stop - start:
            before = len(received)
            try:
                self._request(start + before, stop, received)
            except (ClientError, BotoCoreError, HTTPError, OSError) as error:
                if not (is_passing(error) or isinstance(error, HTTPError)):
                    raise self._refusal(error, start + before) from error
                if len(received) > before:
                    waiting.restart()
                if not wanted() or not waiting.pause():
                    raise StorageError(
                        f"{self._uri}: no byte for {self._patience:g} s at offset {start + len(received)} of "
                        f"{self._info.size} ({type(error).__name__}: {error}). Check the network and the endpoint."
                    ) from error
                self._store.traffic.add(retries=1)
        return bytes(received)

    def _request(self, start: int, stop: int, into: bytearray) -> None:
        """One GET; what arrives before it breaks off is kept."""
        etag, size, before = self._info.etag, self._info.size, len(into)
        self._store.traffic.add(requests=1)
        reply = self._store.attempt(
            lambda client: client.get_object(
                Bucket=self._store.bucket,
                Key=self._info.key,
                Range=f"bytes={start}-{stop - 1}",
                IfMatch=f'"{etag}"',
            )
        )
        body = reply["Body"]
        try:
            answered = reply.get("ETag", "").removeprefix("W/").strip('"')
            if answered != etag:
                raise self._changed(answered, start)
            expected, got = f"bytes {start}-{stop - 1}/{size}", reply.get("ContentRange")
            if got != expected or reply["ContentLength"] != stop - start:
                raise StorageError(
                    f"{self._uri}: asked for '{expected}', got '{got}' of {reply['ContentLength']} bytes. "
                    "The server, or a proxy before it, fails at ranges."
                )
            for chunk in body.iter_chunks(256 << 10):
                into += chunk
        finally:
            self._store.traffic.add(bytes=len(into) - before)
            body.close()

    def _changed(self, etag: str, offset: int) -> ObjectChanged:
        return ObjectChanged(
            f"{self._uri} changed while it was read: opened with ETag {self._info.etag}, now {etag} at "
            f"offset {offset} of {self._info.size}. No two versions are mixed: read it again from the start."
        )

    def _refusal(self, error: Exception, offset: int) -> StorageError:
        status = status_of(error) if isinstance(error, ClientError) else 0
        if status in (404, 412, 416):
            now = {404: "gone", 412: "another (the server does not say which)", 416: "shorter"}[status]
            return self._changed(now, offset)
        return self._store.translated(error, "GetObject", self._info.key)


class CachedFetcher:
    """Fetches ranges of one pinned object in whole blocks that a cache keeps. Safe for several threads."""

    def __init__(self, store: ObjectStore, info: ObjectInfo, patience: float, cache: BlockCache) -> None:
        self._fetcher = RangeFetcher(store, info, patience)
        self._cache, self._size, self._traffic = cache, info.size, store.traffic
        self._version = _version_of(store, info)

    def fetch(self, start: int, stop: int, wanted: Callable[[], bool]) -> bytes:
        """The bytes [start, stop), as :meth:`RangeFetcher.fetch`."""
        block_bytes, parts = self._cache.block_bytes, []
        for number in range(start // block_bytes, (stop - 1) // block_bytes + 1):
            first = number * block_bytes
            last = min(first + block_bytes, self._size)
            data, here = self._cache.block(
                f"{self._version}-{number:x}", partial(self._fetcher.fetch, first, last, wanted)
            )
            if here:
                self._traffic.add(cache_hits=1, cached_bytes=len(data))
            else:
                self._traffic.add(cache_misses=1)
            parts.append(data[max(0, start - first) : stop - first])
        return b"".join(parts)


def lay_into_cache(store: ObjectStore, info: ObjectInfo, path: Path, cache: BlockCache) -> None:
    """The blocks that a :class:`CachedFetcher` would fetch, from the file that the object was written from."""
    version = _version_of(store, info)

    def part(first: int) -> bytes:
        with path.open("rb") as source:
            source.seek(first)
            return source.read(cache.block_bytes)

    for number, first in enumerate(range(0, info.size, cache.block_bytes)):
        cache.block(f"{version}-{number:x}", partial(part, first))


def _version_of(store: ObjectStore, info: ObjectInfo) -> str:
    version = (store.settings.endpoint_name, store.bucket, info.key, info.etag, str(info.size))
    return hashlib.sha256("\0".join(version).encode()).hexdigest()[:40]
