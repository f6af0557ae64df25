"""How is one object read as a file, in order or at random, without downloading the whole?"""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from training_ready.storage.errors import StorageError
from training_ready.storage.ranges import CachedFetcher, RangeFetcher, pin

if TYPE_CHECKING:
    from training_ready.storage.objects import ObjectStore

_MIB = 1 << 20
_SMALLEST = 64 << 10


@dataclass(slots=True)
class _Segment:
    """The bytes [start, stop) of the object, here or on their way."""

    start: int
    stop: int
    data: Future[bytes]


class RangedReader(io.RawIOBase):
    """A seekable, read-only file over one object, pinned to the version found when it was opened.

    One HEAD learns size and ETag. Every range asks for that ETag (If-Match) and every reply is compared with it,
    since some servers ignore the header; its Content-Range and length are compared too. What a lost connection
    cut off is asked for from the last byte on, with growing pauses, until ``patience`` seconds bring no byte.

    Reads that continue one another are fetched ahead: as far as was read in one go so far, ``in_flight`` ranges
    of ``range_bytes`` at most. A jump fetches what was asked for. Not for two threads at once.

    If the store has a cache, ranges are cut out of whole blocks on the local disk, fetched where they are missing.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        range_bytes: int = 4 * _MIB,
        in_flight: int = 8,
        ahead: bool = True,
        whole: bool = False,
        compare: bool = False,
        patience: float = 300.0,
    ) -> None:
        """Open the object.

        Args:
            ahead: fetch ahead of sequential reads; False fetches only what is asked for (at least 64 KiB).
            whole: it will be read to its end, so fetch as far ahead as allowed from the first byte on.
            compare: if the whole object is read in order, its bytes must have the MD5 that its ETag is, where the
                ETag is one; a jump past unread bytes ends that.
            patience: seconds without a single byte after which a range gives up.

        Raises:
            ObjectNotFound: there is no such object.
        """
        super().__init__()
        if range_bytes < 1 or in_flight < 1:
            raise ValueError(
                f"range_bytes and in_flight must be at least 1, not {range_bytes} and {in_flight}"
            )
        self.info = pin(store, key, patience)
        self.name = store.uri(key)
        self._fetcher: RangeFetcher | CachedFetcher = (
            CachedFetcher(store, self.info, patience, store.cache)
            if store.cache
            else RangeFetcher(store, self.info, patience)
        )
        self._range_bytes, self._ahead = range_bytes, ahead
        self._window = range_bytes * in_flight
        self._position = 0
        self._expected = 0  # where a read would continue the one before
        self._run = self._window if whole else 0  # bytes read without a jump
        self._segments: deque[_Segment] = deque()
        self._plans = 0  # fetches that belong to an older plan may give up
        self._pid = os.getpid()
        self._compared = 0  # bytes from the beginning on that went into the digest
        comparable = self.info.etag_is_hash and re.fullmatch("[0-9a-f]{32}", self.info.etag)
        self._digest = hashlib.md5(usedforsecurity=False) if compare and comparable else None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.info.size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset} in {self.name}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the whole buffer; fewer bytes mean the end of the object."""
        self._checkClosed()
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self.info.size - self._position))
        done = 0
        while done < wanted:
            done += self._read_window(view[done : min(wanted, done + self._window)])
        if self._digest is not None and done:
            self._compare(view[:done])
        return done

    def _compare(self, just_read: memoryview) -> None:
        assert self._digest is not None  # noqa: S101
        begin = self._position - len(just_read)
        if not begin <= self._compared < self._position:
            return
        self._digest.update(just_read[self._compared - begin :])
        self._compared = self._position
        if self._compared == self.info.size and self._digest.hexdigest() != self.info.etag:
            raise StorageError(
                f"{self.name}: its bytes 0 to {self.info.size} have the MD5 {self._digest.hexdigest()}, its ETag is "
                f"{self.info.etag}: damaged on the way or in the store. Read it again; then upload it again."
            )

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of the pinned version, wherever the reader stands. Safe for several threads."""
        size = self._range_bytes
        return b"".join(
            self._fetcher.fetch(at, min(at + size, stop), lambda: True) for at in range(start, stop, size)
        )

    def readall(self) -> bytes:
        """The rest of the object."""
        rest = bytearray(max(0, self.info.size - self._position))
        self.readinto(rest)
        return bytes(rest)

    def close(self) -> None:
        if not self.closed:
            self._forget()
        super().close()

    def _read_window(self, view: memoryview) -> int:
        self._plan(self._position, len(view))
        done = 0
        while done < len(view):
            segment = self._segments[0]
            try:
                data = segment.data.result()
            except BaseException:
                self._forget()  # a later read asks anew
                raise
            offset = self._position - segment.start
            taken = min(len(view) - done, segment.stop - self._position)
            view[done : done + taken] = memoryview(data)[offset : offset + taken]
            done += taken
            self._position += taken
            if self._position == segment.stop:
                self._segments.popleft()
        self._expected, self._run = self._position, self._run + done
        return done

    def _plan(self, position: int, wanted: int) -> None:
        """Make the segments cover [position, position + wanted), and what lies ahead of reads in order."""
        if self._pid != os.getpid():  # after a fork the parent's threads are not here
            self._forget()
            self._pid = os.getpid()
        while self._segments and self._segments[0].stop <= position:
            self._segments.popleft()
        if self._segments and self._segments[0].start > position:
            self._forget()
        if position != self._expected:
            self._run = 0
        ahead = min(self._run, self._window) if self._ahead else 0
        needed, end = position + wanted, self._segments[-1].stop if self._segments else position
        reach = min(self.info.size, needed + ahead)
        # Small reads that go on and on are served by ever larger ranges, up to range_bytes.
        size = min(self._range_bytes, max(wanted, ahead, _SMALLEST))
        while end < needed or (end + size <= reach) or (end < reach == self.info.size):
            stop = min(end + size, self.info.size, max(reach, position + _SMALLEST))
            alone = not self._segments and stop >= reach
            self._segments.append(_Segment(end, stop, self._start(end, stop, here=alone)))
            end = stop

    def _start(self, start: int, stop: int, *, here: bool) -> Future[bytes]:
        """Begin to fetch a range, in a thread unless there is nothing to do meanwhile."""
        plan, future = self._plans, Future[bytes]()

        def fetch() -> None:
            try:
                data = self._fetcher.fetch(start, stop, lambda: plan == self._plans)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(data)

        if here:
            fetch()
        else:  # daemons: a network that is down must not hold up the end of the program
            threading.Thread(target=fetch, name=f"range {start} of {self.name}", daemon=True).start()
        return future

    def _forget(self) -> None:
        self._plans += 1
        self._segments.clear()
