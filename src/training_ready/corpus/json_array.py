"""Where does the next item of a JSON array end? Items one by one, with their byte offsets, in bounded memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from difflib import get_close_matches
from typing import BinaryIO, NamedTuple, NoReturn

_BLANKS = " \t\n\r"
_CUT = 16
"""An error this close to the end of the window may be a token cut in two ("-Infinity" is 9 characters long)."""


class JsonArrayError(ValueError):
    """The text is not the JSON it should be; the message names the byte offset."""


class Item(NamedTuple):
    """One item: the bytes of the file before it and up to its end, and whether its array is inside an object."""

    offset: int
    end: int
    value: object
    nested: bool


def read_json_array(
    stream: BinaryIO,
    records_key: str,
    *,
    after: tuple[int, bool] | None = None,
    chunk_bytes: int = 1 << 20,
    max_item_chars: int = 64 << 20,
) -> Iterator[Item]:
    """Items of ``[…]``, or of the array under ``records_key`` of ``{…}``.

    ``after`` (``end`` and ``nested`` of an item) goes on behind that item; the stream must stand at its ``end``.

    Keeps one window of text: the item at hand plus one chunk. Bytes that are not UTF-8 arrive as lone surrogates, for
    the caller to refuse row by row. Raises :class:`JsonArrayError` on anything else that is not JSON.
    """
    window = _Window(stream, chunk_bytes, max_item_chars, offset=after[0] if after else 0)
    first = "" if after else window.peek()
    if after:
        yield from window.array(nested=after[1], opened=True)
        if after[1]:
            yield from _rest_of_object(window, records_key, [records_key])
    elif first == "[":
        yield from window.array(nested=False)
    elif first == "{":
        yield from _array_of_object(window, records_key)
    else:
        window.fail(f"expected '[' or '{{', found {first!r}" if first else "the file is empty")
    if rest := window.peek():
        window.fail(f"expected the end of the file, found {rest!r} (one record per line is format: jsonl)")


def _array_of_object(window: _Window, records_key: str) -> Iterator[Item]:
    seen: list[str] = []
    window.take("{")
    if window.peek() == "}":
        window.take("}")
    else:
        yield from _member(window, records_key, seen)
        yield from _rest_of_object(window, records_key, seen)
    if records_key not in seen:
        near = get_close_matches(records_key, seen, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        window.fail(
            f"no key {records_key!r} at the top; it has {seen}.{hint} "
            "Set records_key in the specification, or format: jsonl if every line is a record"
        )


def _rest_of_object(window: _Window, records_key: str, seen: list[str]) -> Iterator[Item]:
    while window.take(",}") == ",":
        yield from _member(window, records_key, seen)


def _member(window: _Window, records_key: str, seen: list[str]) -> Iterator[Item]:
    _, key = window.value()
    if not isinstance(key, str):
        window.fail(f"expected a key, found {key!r}")
    window.take(":")
    if key in seen:
        window.fail(f"the key {key!r} appears twice")
    seen.append(key)
    if key != records_key:
        window.value()
    elif window.peek() == "[":
        yield from window.array(nested=True)
    else:
        window.fail(f"{key!r} should hold an array of records")


class _Window:
    """A moving view of decoded text that knows its byte offset."""

    def __init__(self, stream: BinaryIO, chunk_bytes: int, max_item_chars: int, *, offset: int = 0) -> None:
        self._stream = stream
        self._chunk_bytes = chunk_bytes
        self._max_item_chars = max_item_chars
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._counted = 0
        self._bytes_before = offset  # bytes of the file in front of self._text[self._counted]
        self._ended = False
        while not self._text and not self._ended:
            self._grow()
        if not offset and self._text.startswith("\ufeff"):  # byte-order mark
            self._at = 1

    @property
    def offset(self) -> int:
        """Bytes of the file before the cursor."""
        passed = self._text[self._counted : self._at]
        self._bytes_before += len(passed.encode("utf-8", "surrogateescape"))
        self._counted = self._at
        return self._bytes_before

    def fail(self, why: str) -> NoReturn:
        raise JsonArrayError(f"byte {self.offset}: {why}")

    def peek(self) -> str:
        """The next character that is not a blank, "" at the end of the file."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANKS:
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._grow()

    def take(self, expected: str) -> str:
        found = self.peek()
        if not found or found not in expected:
            self.fail(
                f"expected {' or '.join(map(repr, expected))}, found {found or 'the end of the file'!r}"
            )
        self._at += 1
        return found

    def array(self, *, nested: bool, opened: bool = False) -> Iterator[Item]:
        """The items of the array at the cursor, or behind an item of one that was ``opened`` before."""
        if not opened:
            self.take("[")
            if self.peek() == "]":
                self.take("]")
                return
            offset, value = self.value()
            yield Item(offset, self.offset, value, nested)
        while self.take(",]") == ",":
            offset, value = self.value()
            yield Item(offset, self.offset, value, nested)

    def value(self) -> tuple[int, object]:
        """The whole JSON value at the cursor and the byte offset where it starts."""
        self.peek()
        start = self.offset
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    why = f"{error.msg} (byte {start + self._bytes_between(error.pos)})"
                    raise JsonArrayError(f"byte {start}: not JSON: {why}") from error
            except RecursionError as error:
                raise JsonArrayError(f"byte {start}: nested too deeply to be a record") from error
            else:
                # A number that touches the end of the window may go on in the next chunk: "1" of "1.5".
                after = self._text[end : end + 1]
                if self._ended or (after and after in _BLANKS + ",:]}"):
                    self._at = end
                    return start, value
                if after and len(self._text) - end > _CUT:
                    raise JsonArrayError(f"byte {start}: not JSON: {after!r} follows a value")
            if len(self._text) - self._at > self._max_item_chars:
                self.fail(f"an item longer than {self._max_item_chars:,} characters, or a quote never closed")
            self._grow()

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        if error.msg.startswith("Unterminated string"):
            return True
        return len(self._text[error.pos :].strip(_BLANKS)) < _CUT

    def _bytes_between(self, position: int) -> int:
        return len(self._text[self._at : position].encode("utf-8", "surrogateescape"))

    def _grow(self) -> None:
        """Drops the text that was consumed and reads more: at least as much as is kept, so that a long item is
        parsed a logarithmic number of times."""
        self._bytes_before = self.offset
        kept = self._text[self._at :]
        data = self._stream.read(max(self._chunk_bytes, len(kept)))
        self._ended = not data
        self._text = kept + self._decode(data, self._ended)
        self._at = self._counted = 0
