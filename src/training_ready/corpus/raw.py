"""Which conversations do raw objects hold, from any place on, without a built corpus?

::

    objects ──► rows ──► conversations, each with the position behind it ──► iter_raw(source, position) goes on there

The order is that of the objects and of their rows: nothing is shuffled, judged or de-duplicated, and how many rows
there are is known at the end only. What a built corpus adds: docs/corpus.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, BinaryIO

from training_ready.corpus.adapters import Form, InvalidRow, map_row
from training_ready.corpus.raw_objects import RawObject
from training_ready.corpus.readers import Format, Place, Row, SourceError, read_table
from training_ready.corpus.record import Role
from training_ready.storage.compression import Frame
from training_ready.storage.errors import StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class RawSource:
    """Objects (see :func:`training_ready.corpus.raw_objects.find_objects`) and how their rows are understood.

    ``form`` and ``columns`` as in a corpus specification. ``bad_rows``: as many rows may be no conversation, and are
    set aside and counted; one more is an error, and so is the first where none may be.
    """

    name: str
    objects: tuple[RawObject, ...]
    format: Format = "auto"
    records_key: str = "conversations"
    form: Form = "auto"
    columns: Mapping[Role, Sequence[str]] | None = None
    bad_rows: int = 0

    @property
    def fingerprint(self) -> str:
        """Equal means: the same rows in the same order, as far as the versions of the objects can tell."""
        objects = [(one.uri, one.version) for one in self.objects]
        columns = {role: list(names) for role, names in self.columns.items()} if self.columns else None
        identity = [self.name, objects, self.format, self.records_key, self.form, columns]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class RawPosition:
    """Between two conversations of one source. ``bad``: rows set aside before it."""

    source: str
    object: int = 0
    place: Place = field(default_factory=Place)
    bad: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"place": asdict(self.place) | {"frame": list(self.place.frame)}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RawPosition:
        place = value["place"]
        return cls(**{**value, "place": Place(**{**place, "frame": Frame(*place["frame"])})})


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that was set aside. Never holds its text."""

    uri: str
    position: str
    offset: int | None
    why: str

    def __str__(self) -> str:
        place = self.position if self.offset is None else f"{self.position}, byte {self.offset}"
        return f"{self.uri}: {place}: {self.why}"


def iter_raw(
    source: RawSource,
    position: RawPosition | None = None,
    *,
    set_aside: Callable[[BadRow], None] | None = None,
) -> Iterator[tuple[RawPosition, list[dict[str, str]]]]:
    """The conversations of a source from ``position`` on, as messages, each with the position behind it.

    Reading goes on by seeking: to the byte in plain text, to the frame in compressed text (whose beginning is read
    again), to the row group in Parquet.

    Args:
        set_aside: told of every bad row that ``bad_rows`` allows.

    Raises:
        SourceError: an object changed, cannot be read to its end, or holds a bad row too many; the message names
            the object, the line or row, and the byte.
    """
    at = position or RawPosition(source=source.fingerprint)
    if at.source != source.fingerprint:
        raise SourceError(
            f"the position belongs to another state of {source.name!r}: its objects, their versions or how they are "
            f"understood differ (then {at.source[:12]}, now {source.fingerprint[:12]}). Start anew"
        )
    for number in range(at.object, len(source.objects)):
        one = source.objects[number]
        if number != at.object:
            at = replace(at, object=number, place=Place())
        with one.open() as stream:
            try:
                for row in _rows(source, one, stream, at.place):
                    messages = _understood(row, source)
                    bad = isinstance(messages, str)
                    at = replace(at, place=row.next, bad=at.bad + bad)
                    if isinstance(messages, str):
                        found = BadRow(uri=one.uri, position=row.position, offset=row.offset, why=messages)
                        _allow(found, at.bad, source.bad_rows)
                        if set_aside:
                            set_aside(found)
                    else:
                        yield at, messages
            except StorageError as error:
                last = f"row {at.place.row}, offset {at.place.offset}"
                raise SourceError(f"{error} (source {source.name!r}, after {last})") from error


def _rows(source: RawSource, one: RawObject, stream: BinaryIO, start: Place) -> Iterator[Row]:
    table = read_table(stream, one.uri, format=source.format, records_key=source.records_key, start=start)
    yield from table.rows


def _understood(row: Row, source: RawSource) -> list[dict[str, str]] | str:
    """The row's messages, or why it is no conversation."""
    if row.value is None:
        return row.problem
    try:
        turns = map_row(row.value, columns=source.columns, form=source.form).turns
    except InvalidRow as error:
        return str(error)
    if not turns:
        return "no turn at all"
    blank = next((number for number, turn in enumerate(turns, 1) if not turn.content.strip()), None)
    if blank:
        return f"turn {blank} of {len(turns)} says nothing"
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _allow(row: BadRow, bad: int, limit: int) -> None:
    if bad > limit:
        allowed = f"bad row number {bad}, {limit} allowed" if limit else "bad rows are not allowed"
        raise SourceError(f"{row} ({allowed}). Correct or remove the row, or raise bad_rows")
