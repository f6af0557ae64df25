"""Is this object compressed, and is it all there? ``.gz`` and ``.zst`` are read as what they hold."""

from __future__ import annotations

import io
import zlib
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

import zstandard

from training_ready.storage.errors import StorageError

# Small, since a frame may hold a thousand times what it weighs.
_INPUT_BYTES = 64 << 10


class Frame(NamedTuple):
    """Where a frame begins: its byte in the object, and the byte of the text that it opens with."""

    stored: int = 0
    plain: int = 0


class _Frame(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


_FRAMES: dict[str, Callable[[], _Frame]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: cast(_Frame, zstandard.ZstdDecompressor().decompressobj()),
}


def strip_compression(name: str) -> str:
    """The name without its ``.gz`` or ``.zst``."""
    return name.rsplit(".", 1)[0] if name.lower().endswith(tuple(_FRAMES)) else name


def open_decompressed(raw: io.RawIOBase, name: str, *, where: str | None = None) -> BinaryIO:
    """A buffered stream of what ``raw`` holds, decompressed if ``name`` ends in ``.gz`` or ``.zst``.

    Several frames in a row are one stream. Closing it closes ``raw``. Raises StorageError while reading, if a
    frame is damaged or cut off, even between two records.
    """
    if name.lower().endswith(tuple(_FRAMES)):
        raw = FrameReader(raw, name, where=where)
    return io.BufferedReader(raw, buffer_size=1 << 20)


class FrameReader(io.RawIOBase):
    """The text of a ``.gz`` or ``.zst`` object, which may consist of several frames.

    Own, because zstandard's and gzip's own readers take a cut-off zstd frame or an empty file for its end.
    """

    def __init__(
        self,
        raw: io.RawIOBase | BinaryIO,
        name: str,
        *,
        where: str | None = None,
        start: Frame | None = None,
        close_raw: bool = True,
    ) -> None:
        """Read from the beginning, or from the frame ``start`` on, for which ``raw`` must be seekable."""
        super().__init__()
        self._close_raw = close_raw
        start = start or Frame()
        if start.stored:
            raw.seek(start.stored)
        self._raw, self._where = raw, where or name
        self._new_frame = next(new for suffix, new in _FRAMES.items() if name.lower().endswith(suffix))
        self._begun, self._produced = [start], start.plain
        self._frame: _Frame | None = None
        self._frames = 0
        self._compressed = b""
        self._plain = memoryview(b"")
        self._read = start.stored

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._fill():
                return 0
        view = memoryview(buffer).cast("B")
        taken = min(len(view), len(self._plain))
        view[:taken] = self._plain[:taken]
        self._plain = self._plain[taken:]
        return taken

    def _fill(self) -> bool:
        if not self._compressed:
            self._compressed = self._raw.read(_INPUT_BYTES) or b""
            self._read += len(self._compressed)
        if not self._compressed:
            if self._frame is not None or not self._frames:
                raise StorageError(
                    f"{self._where}: the compressed data ends after {self._read} bytes, in the middle of a frame. "
                    "The file was cut off: upload it again."
                )
            return False
        if self._frame is None and self._produced > self._begun[-1].plain:
            self._begun.append(Frame(self._read - len(self._compressed), self._produced))
        frame = self._frame = self._frame or self._new_frame()
        try:
            self._plain = memoryview(frame.decompress(self._compressed))
            self._produced += len(self._plain)
        except (zlib.error, zstandard.ZstdError) as error:
            raise StorageError(
                f"{self._where}: the compressed data is damaged before byte {self._read} ({error}). Upload it again."
            ) from error
        self._compressed = b""
        if frame.eof:
            self._compressed, self._frame, self._frames = frame.unused_data, None, self._frames + 1
        return True

    def frame_of(self, plain: int) -> Frame:
        """The last frame that begins at or before a byte of the text that was read already."""
        return self._begun[bisect_right(self._begun, plain, key=lambda frame: frame.plain) - 1]

    def close(self) -> None:
        if not self.closed and self._close_raw:
            self._raw.close()
        super().close()
