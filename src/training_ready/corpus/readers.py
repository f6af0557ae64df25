"""What rows does this object hold? CSV, JSON Lines, JSON arrays and Parquet, plain or compressed, as a stream.

::

    bytes ──► decompressed ──► rows ──► Row(position, value | problem)
              .gz  .zst        csv tsv jsonl json parquet

A row that cannot be read comes out as a Row with a problem, for the gates to count. A file that cannot be read any
further raises :class:`SourceError`: half a file is never taken for a whole one.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from training_ready import TrainingReadyError
from training_ready.corpus.json_array import JsonArrayError, read_json_array

Format = Literal["auto", "csv", "tsv", "jsonl", "json", "parquet"]

_MAX_ROW_BYTES = 64 << 20
_SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
}
_COMPRESSIONS = (".gz", ".zst")


class SourceError(TrainingReadyError):
    """A source object that cannot be read, or does not hold what the specification says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row: where it stands in its file, and its fields or the reason why it has none."""

    position: str
    value: dict[str, object] | None = None
    problem: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows to be read once. ``columns`` is known before the first row for CSV and Parquet, else None."""

    columns: tuple[str, ...] | None
    rows: Iterator[Row]


def format_of(key: str) -> tuple[Format, str]:
    """Format and compression ("", ".gz", ".zst") by the ending of ``key``. Raises :class:`SourceError`."""
    name = key.lower()
    compression = next((suffix for suffix in _COMPRESSIONS if name.endswith(suffix)), "")
    name = name.removesuffix(compression)
    for suffix, found in _SUFFIXES.items():
        if name.endswith(suffix):
            return found, compression
    raise SourceError(
        f"{key}: cannot tell the format from the ending; known are {', '.join(_SUFFIXES)}, each also with "
        f"{' or '.join(_COMPRESSIONS)}. Set format: in the specification"
    )


def read_table(
    stream: BinaryIO, key: str, *, format: Format = "auto", records_key: str = "conversations"
) -> Table:
    """Opens ``stream`` (seekable for Parquet) as rows; ``key`` gives the format and stands in every message."""
    name = key.lower()
    compression = next((suffix for suffix in _COMPRESSIONS if name.endswith(suffix)), "")
    if format == "auto":
        format, compression = format_of(key)
    if format == "parquet":
        if compression:
            raise SourceError(f"{key}: Parquet compresses inside; store it without {compression}")
        return _parquet(stream, key)
    plain = _decompressed(stream, compression)
    if format in ("csv", "tsv"):
        return _csv(plain, key, "\t" if format == "tsv" else ",")
    rows = _json_lines(plain) if format == "jsonl" else _json_array(plain, records_key)
    return Table(columns=None, rows=_named_failures(rows, key))


def _named_failures(rows: Iterator[Row], key: str) -> Iterator[Row]:
    """Every failure of the text formats in one shape: object, last position that was read, cause."""
    last = "the start of the file"
    try:
        for row in rows:
            yield row
            last = row.position
    except (JsonArrayError, csv.Error, EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise SourceError(
            f"{key}: cannot be read after {last}: {error}. Repair or replace the object"
        ) from error


def _decompressed(stream: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))
    if compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(stream), 1 << 20))
    return stream


class _ZstdStream(io.RawIOBase):
    """Plain bytes of one or several zstd frames. Unlike ``zstandard.stream_reader`` (0.25) it refuses a stream that
    ends inside a frame, which would otherwise look like a shorter file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        while not self._ready:
            data = self._stream.read(1 << 17)
            if not data:
                if self._frame is not None:
                    raise EOFError("the zstd stream ends inside a frame: the object was cut short")
                return 0
            self._ready = self._decode(data)
        count = min(len(view), len(self._ready))
        view[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decode(self, data: bytes) -> bytes:
        parts: list[bytes] = []
        while data:
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            parts.append(frame.decompress(data))
            self._frame, data = (None, frame.unused_data) if frame.eof else (frame, b"")
        return b"".join(parts)


def _csv(stream: BinaryIO, key: str, delimiter: str) -> Table:
    # Bytes that are not UTF-8 become lone surrogates, which costs their row and not the file.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    csv.field_size_limit(_MAX_ROW_BYTES)
    lines = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
    except (csv.Error, EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise SourceError(f"{key}: the header cannot be read: {error}") from error
    named = [name for name in header if name]
    if not named:
        raise SourceError(f"{key}: the file is empty; a CSV needs a header line and rows")
    if repeated := sorted({name for name in named if named.count(name) > 1}):
        raise SourceError(f"{key}:1: the header names {repeated} more than once; which one is meant?")

    def rows() -> Iterator[Row]:
        while True:
            position = f"line {lines.line_num + 1}"
            try:
                cells = next(lines)
            except StopIteration:
                text.detach()  # or it would close the stream, which is not ours
                return
            except csv.Error as error:
                raise csv.Error(f"{position}: {error}") from error
            if len(cells) == len(header):
                yield Row(position=position, value=dict(zip(header, cells, strict=True)))
            elif cells:
                yield Row(position=position, problem=f"{len(cells)} cells, the header has {len(header)}")

    return Table(columns=tuple(header), rows=_named_failures(rows(), key))


def _json_lines(stream: BinaryIO) -> Iterator[Row]:
    number = 0
    while line := stream.readline(_MAX_ROW_BYTES):
        number += 1
        if len(line) >= _MAX_ROW_BYTES:
            raise OSError(
                f"line {number} is longer than {_MAX_ROW_BYTES:,} bytes; is it a JSON array (format: json)?"
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        position = f"line {number}"
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield Row(position=position, problem=f"not JSON: {error}")
        else:
            yield _object_row(position, value)


def _json_array(stream: BinaryIO, records_key: str) -> Iterator[Row]:
    for index, (offset, value) in enumerate(read_json_array(stream, records_key)):
        yield _object_row(f"item {index} (byte {offset})", value)


def _object_row(position: str, value: object) -> Row:
    if isinstance(value, dict):
        return Row(position=position, value=value)
    return Row(position=position, problem=f"a record should be a JSON object, found {type(value).__name__}")


def _parquet(stream: BinaryIO, key: str) -> Table:
    try:
        file = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{key}: not a whole Parquet file: {error}") from error

    def rows() -> Iterator[Row]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=512):
                for value in batch.to_pylist():
                    yield Row(position=f"row {number}", value=value)
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{key}: cannot be read after row {number}: {error}") from error

    return Table(columns=tuple(file.schema_arrow.names), rows=rows())
