"""Raw objects as tokens: conversations that nobody built a corpus of, in the same order and with the same exact resume.

Each object is tokenised in segments, one block of tokens each, whose footer says where the next one begins: the byte of
the text (or the row group), so that whoever is stopped goes on with the segment that is missing::

    notes.jsonl   | 1,000 conversations | 1,000 | 613 |      footer: {"next": position | null, "bad": [...]}
                    segment 0             1       2

What a built corpus has and this has not: docs/stream.md.
"""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import pyarrow.parquet as pq

from training_ready.corpus.raw import BadRow, RawPosition, RawSource, iter_raw
from training_ready.corpus.readers import SourceError
from training_ready.storage.objects import ObjectNotFound, ObjectStore
from training_ready.stream.blocks import BLOCK_ROWS, TokenRow, index_of_block, write_block
from training_ready.stream.index import TokenIndex
from training_ready.stream.lengths import LengthPolicy, TokenCounts
from training_ready.stream.render import ChatRenderer, RenderError
from training_ready.stream.shards import StreamError
from training_ready.stream.tokens import name_of, wait_for

logger = logging.getLogger(__name__)

RAW_STAGE = "raw"  # the stage of every row: nobody has sorted them
SEGMENT_ROWS = BLOCK_ROWS
_RAW_KEY = "training_ready.raw"
_AT_ONCE = 64  # conversations rendered together


@dataclass(slots=True)
class _End:
    """Where a segment ends: the next one's beginning (None after the last), and the rows set aside before."""

    next: RawPosition | None
    bad: list[dict[str, Any]] = field(default_factory=list)

    def as_footer(self) -> dict[str, str]:
        after = None if self.next is None else self.next.as_json()
        return {_RAW_KEY: json.dumps({"next": after, "bad": self.bad})}

    @classmethod
    def from_footer(cls, footer: bytes) -> _End:
        facts = json.loads(footer)
        return cls(facts["next"] and RawPosition.from_json(facts["next"]), facts["bad"])

    def set_aside(self, row: BadRow, allowed: int) -> None:
        """
        Raises:
            SourceError: one row more than allowed.
        """
        self.bad.append(asdict(row))
        if len(self.bad) > allowed:
            raise SourceError(
                f"{row} ({allowed} bad rows left to allow). Correct or remove it, or raise bad_rows"
            )


class _Reader:
    """The conversations of one object from a position on; bad rows are set aside in the ``end`` of the open segment."""

    def __init__(self, source: RawSource, start: RawPosition) -> None:
        self.uri, self.end, self.allowed = source.objects[0].uri, _End(start), source.bad_rows
        self.rows = iter_raw(source, start, set_aside=lambda row: self.end.set_aside(row, self.allowed))


class RawTokenCache:
    """Finds or makes the token shards of a raw source."""

    def __init__(
        self,
        *,
        store: ObjectStore,
        prefix: str,
        renderer: ChatRenderer,
        policy: LengthPolicy,
        source: RawSource,
    ) -> None:
        """
        Args:
            store, prefix: where the tokens lie; the raw objects may be anywhere.
        """
        self.store, self._prefix, self._source = store, prefix, source
        self._renderer, self._policy = renderer, policy
        self._identity = [renderer.fingerprint, policy.max_length, policy.overlong]

    def ensure(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        advance: Callable[[int], None] | None = None,
        patience_seconds: float = 3600,
    ) -> TokenIndex:
        """The rows of the source as tokens in the bucket; each rank takes whole objects and waits for the others.

        Raises:
            SourceError: an object changed or cannot be read, or holds more bad rows than allowed; the message names
                object, line or row, and byte.
            StreamError: a conversation is too long and the policy is ``error``, or another rank did not finish.
        """
        identity = [self._source.fingerprint, self._source.bad_rows, *self._identity]
        key = f"{self._prefix}/index-{name_of(identity)}.parquet"
        try:
            return TokenIndex.from_bytes(self.store.get_bytes(key))
        except ObjectNotFound:
            pass
        # Its own objects first: the others are being made meanwhile, and what this rank took is no wait for them.
        everything = range(len(self._source.objects))
        segments = {number: self._object(number, advance) for number in everything[rank::world_size]}
        deadline = time.monotonic() + patience_seconds
        if rank:
            wait_for(self.store, key, deadline, "index of the tokens")
            return TokenIndex.from_bytes(self.store.get_bytes(key))
        segments |= {n: self._object(n, advance, deadline) for n in everything if n not in segments}
        self._report([bad for number in segments for _, end in segments[number] for bad in end.bad])
        index = TokenIndex.joined([part for number in sorted(segments) for part, _ in segments[number]])
        self.store.put_bytes(key, index.to_bytes())
        return index

    def _object(
        self, number: int, advance: Callable[[int], None] | None, deadline: float | None = None
    ) -> list[tuple[TokenIndex, _End]]:
        """The segments of one object; with a deadline they are another rank's to make."""
        source = replace(self._source, objects=(self._source.objects[number],))
        segments: list[tuple[TokenIndex, _End]] = []
        start: RawPosition | None = RawPosition(source=source.fingerprint)
        allowed = source.bad_rows
        reader: _Reader | None = None  # goes on from segment to segment: compressed text is not read again
        while start is not None:
            key = f"{self._prefix}/{name_of([source.fingerprint, *self._identity, len(segments)])}.parquet"
            if deadline is not None:
                wait_for(self.store, key, deadline, f"tokens of {source.objects[0].uri}")
            try:
                (index, end), reader = self._read(key), None
            except ObjectNotFound:
                end, counts = _End(start), TokenCounts()
                reader = reader or _Reader(source, start)
                reader.end, reader.allowed = end, allowed
                rows = list(self._rows(reader, counts))
                index = write_block(self.store, key, rows, counts, end.as_footer())
            segments.append((index, end))
            start, allowed = end.next, allowed - len(end.bad)
            if advance:
                advance(index.rows)
        return segments

    def _read(self, key: str) -> tuple[TokenIndex, _End]:
        with io.BufferedReader(self.store.open(key, ahead=False), buffer_size=1 << 20) as reader:
            index = index_of_block(reader, key, self.store.uri(key))
            reader.seek(0)
            return index, _End.from_footer(pq.ParquetFile(reader).metadata.metadata[_RAW_KEY.encode()])

    def _rows(self, reader: _Reader, counts: TokenCounts) -> Iterator[TokenRow]:
        """The rows of one segment; the reader's ``end`` is moved along."""
        uri, left, end, allowed = reader.uri, SEGMENT_ROWS, reader.end, reader.allowed
        while batch := list(islice(reader.rows, min(_AT_ONCE, left))):
            left -= len(batch)
            for (position, messages), row in zip(
                batch, self._renderer.render_many([messages for _, messages in batch]), strict=True
            ):
                where = f"row {position.place.row}, before offset {position.place.offset}"
                if isinstance(row, RenderError):
                    end.set_aside(BadRow(uri=uri, position=where, offset=None, why=str(row)), allowed)
                    continue
                try:
                    kept = self._policy.apply(row, messages, self._renderer, counts)
                except (RenderError, StreamError) as error:
                    raise StreamError(f"{uri}: {where}: {error}") from error
                yield from ((one, (self._source.name, RAW_STAGE, "", "")) for one in kept)
            end.next = batch[-1][0]
        if left:
            end.next = None

    def _report(self, bad: Sequence[dict[str, Any]]) -> None:
        if len(bad) > self._source.bad_rows:
            raise SourceError(
                f"{self._source.name!r}: {len(bad)} rows of all objects are no conversations, bad_rows allows "
                f"{self._source.bad_rows}; the first: {BadRow(**bad[0])}"
            )
        if bad:
            logger.warning(f"{self._source.name!r}: {len(bad)} rows set aside, the first: {BadRow(**bad[0])}")
