"""What rows does this object hold? CSV, JSON Lines, JSON arrays and Parquet, plain or compressed, as a stream.

::

    bytes ──► decompressed ──► rows ──► Row(position, value | problem)
              .gz  .zst        csv tsv jsonl json parquet

A row that cannot be read comes out as a Row with a problem, for the gates to count. A file that cannot be read any
further raises :class:`SourceError`: half a file is never taken for a whole one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal, cast

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from training_ready import TrainingReadyError
from training_ready.corpus.json_array import JsonArrayError, read_json_array
from training_ready.storage.compression import Frame, FrameReader
from training_ready.storage.errors import StorageError

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
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BOM = b"\xef\xbb\xbf"


class SourceError(TrainingReadyError):
    """A source object that cannot be read, or does not hold what the specification says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Between two rows of one file: reading goes on from here. The default is the beginning.

    Text: ``offset`` bytes of it and ``row`` lines or items stand before; if it is compressed, ``frame`` is the last
    frame that begins there; ``nested`` tells an array inside an object. Parquet: ``offset`` row groups, and ``row``
    rows of the next one.
    """

    offset: int = 0
    row: int = 0
    frame: Frame = Frame()  # noqa: RUF009 - immutable
    nested: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row: where it stands in its file, and its fields or the reason why it has none; the place after it."""

    position: str
    next: Place
    offset: int | None = None  # byte of the text where it begins; None for Parquet
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
    stream: BinaryIO,
    key: str,
    *,
    format: Format = "auto",
    records_key: str = "conversations",
    start: Place | None = None,
) -> Table:
    """Opens ``stream`` as rows, from ``start`` on; ``key`` gives the format and stands in every message.

    The stream must be seekable for Parquet, and for any ``start`` but the beginning.
    """
    name = key.lower()
    compression = next((suffix for suffix in _COMPRESSIONS if name.endswith(suffix)), "")
    if format == "auto":
        format, compression = format_of(key)
    start = start or Place()
    if format == "parquet":
        if compression:
            raise SourceError(f"{key}: Parquet compresses inside; store it without {compression}")
        return _parquet(stream, key, start)
    if format in ("csv", "tsv"):
        return _csv(stream, compression, key, "\t" if format == "tsv" else ",", start)
    text = _Text(stream, compression, start)
    rows = _json_lines(text, start) if format == "jsonl" else _json_array(text, records_key, start)
    return Table(columns=None, rows=_named_failures(rows, key))


def _named_failures(rows: Iterator[Row], key: str) -> Iterator[Row]:
    """Every failure of the text formats in one shape: object, last position that was read, cause."""
    last = "the start of the file"
    try:
        for row in rows:
            yield row
            last = row.position
    except (JsonArrayError, csv.Error, OSError, StorageError) as error:
        why = str(error).removesuffix(".")
        raise SourceError(
            f"{key}: cannot be read after {last}: {why}. Repair or replace the object"
        ) from error


class _Text:
    """The decompressed bytes of a file from a place on, and the way back to any place in them."""

    def __init__(self, stream: BinaryIO, compression: str, start: Place) -> None:
        self._frames = (
            FrameReader(
                stream, compression, where=_COMPRESSIONS[compression], start=start.frame, close_raw=False
            )
            if compression
            else None
        )
        if self._frames is None:
            self.bytes = stream
            if start.offset:
                stream.seek(start.offset)
        else:
            self.bytes = cast(BinaryIO, io.BufferedReader(self._frames, 1 << 20))
            skip = start.offset - start.frame.plain
            while skip and (passed := self.bytes.read(min(skip, 1 << 20))):
                skip -= len(passed)

    def place(self, offset: int, row: int, *, nested: bool = False) -> Place:
        frame = self._frames.frame_of(offset) if self._frames else Frame()
        return Place(offset=offset, row=row, frame=frame, nested=nested)


def _csv(stream: BinaryIO, compression: str, key: str, delimiter: str, start: Place) -> Table:
    csv.field_size_limit(_MAX_ROW_BYTES)
    text = _Text(stream, compression, Place())
    lines = _Lines(text.bytes, Place())
    try:
        header = next(csv.reader(lines, delimiter=delimiter, strict=True), [])
    except (csv.Error, OSError, StorageError) as error:
        raise SourceError(f"{key}: the header cannot be read: {error}") from error
    named = [name for name in header if name]
    if not named:
        raise SourceError(f"{key}: the file is empty; a CSV needs a header line and rows")
    if repeated := sorted({name for name in named if named.count(name) > 1}):
        raise SourceError(f"{key}:1: the header names {repeated} more than once; which one is meant?")
    if start.offset:
        stream.seek(0)
        text = _Text(stream, compression, start)
        lines = _Lines(text.bytes, start)
    return Table(columns=tuple(header), rows=_named_failures(_csv_rows(text, lines, header, delimiter), key))


def _csv_rows(text: _Text, lines: _Lines, header: list[str], delimiter: str) -> Iterator[Row]:
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        position, begin = f"line {lines.number + 1}", lines.offset
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise csv.Error(f"{position}: {error}") from error
        after = text.place(lines.offset, lines.number)
        if len(cells) == len(header):
            value: dict[str, object] = dict(zip(header, cells, strict=True))
            yield Row(position=position, next=after, offset=begin, value=value)
        elif cells:
            problem = f"{len(cells)} cells, the header has {len(header)}"
            yield Row(position=position, next=after, offset=begin, problem=problem)


class _Lines:
    """Lines as the csv module takes them, one when it asks for one, so that the bytes given out are known.

    Bytes that are not UTF-8 become lone surrogates, which costs their row and not the file.
    """

    def __init__(self, stream: BinaryIO, start: Place) -> None:
        self._stream, self.offset, self.number = stream, start.offset, start.row
        self._pieces: list[bytes] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self._pieces:
            line = _whole_line(self._stream, self.number + 1)
            if not line:
                raise StopIteration
            # A lone carriage return ends a line too, as on old Macs.
            self._pieces = (
                re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", line)[::-1] if b"\r" in line else [line]
            )
        piece = self._pieces.pop()
        first = not self.offset
        self.offset, self.number = self.offset + len(piece), self.number + 1
        return piece.removeprefix(_BOM if first else b"").decode("utf-8", "surrogateescape")


def _whole_line(stream: BinaryIO, number: int) -> bytes:
    line = stream.readline(_MAX_ROW_BYTES)
    if len(line) >= _MAX_ROW_BYTES:
        raise OSError(
            f"line {number} is longer than {_MAX_ROW_BYTES:,} bytes; is it a JSON array (format: json)?"
        )
    return line


def _json_lines(text: _Text, start: Place) -> Iterator[Row]:
    number, offset = start.row, start.offset
    while line := _whole_line(text.bytes, number + 1):
        begin, number, offset = offset, number + 1, offset + len(line)
        if not begin:
            line = line.removeprefix(_BOM)
        if not line.strip():
            continue
        position, after = f"line {number}", text.place(offset, number)
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            yield Row(position=position, next=after, offset=begin, problem=f"not JSON: {error}")
        else:
            yield _object_row(position, after, begin, value)


def _json_array(text: _Text, records_key: str, start: Place) -> Iterator[Row]:
    after = (start.offset, start.nested) if start.offset else None
    for index, item in enumerate(read_json_array(text.bytes, records_key, after=after), start.row):
        place = text.place(item.end, index + 1, nested=item.nested)
        yield _object_row(f"item {index} (byte {item.offset})", place, item.offset, item.value)


def _object_row(position: str, after: Place, offset: int, value: object) -> Row:
    if isinstance(value, dict):
        return Row(position=position, next=after, offset=offset, value=value)
    problem = f"a record should be a JSON object, found {type(value).__name__}"
    return Row(position=position, next=after, offset=offset, problem=problem)


def _parquet(stream: BinaryIO, key: str, start: Place) -> Table:
    try:
        file = pq.ParquetFile(stream, page_checksum_verification=True, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{key}: not a whole Parquet file: {error}") from error
    groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]

    def rows() -> Iterator[Row]:
        number = sum(groups[: start.offset])
        skip = start.row
        for group in range(start.offset, len(groups)):
            passed = 0
            try:
                for batch in file.iter_batches(batch_size=512, row_groups=[group]):
                    values = batch.slice(skip - passed).to_pylist() if passed < skip else batch.to_pylist()
                    passed += batch.num_rows - len(values)
                    for value in values:
                        passed += 1
                        done = passed == groups[group]
                        after = Place(offset=group + 1) if done else Place(offset=group, row=passed)
                        yield Row(position=f"row {number + passed - 1}", next=after, value=value)
            except (pa.ArrowException, OSError) as error:
                begin = file.metadata.row_group(group).column(0).data_page_offset
                raise SourceError(
                    f"{key}: row group {group} (byte {begin}) cannot be read after row {number + passed}: {error}"
                ) from error
            number, skip = number + groups[group], 0

    return Table(columns=tuple(file.schema_arrow.names), rows=rows())
