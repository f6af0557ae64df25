"""Which objects is a corpus made of, and are they still the same? Opens them and hashes what was read."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, cast

from training_ready.corpus.candidates import Candidate, Unusable, candidates
from training_ready.corpus.readers import SourceError, format_of, read_table
from training_ready.corpus.spec import CorpusSpec, Source
from training_ready.storage.objects import ObjectNotFound, ObjectStore
from training_ready.storage.reader import RangedReader
from training_ready.storage.uri import parse_s3_uri

Advance = Callable[[int], None]
_CHUNK = 1 << 20


@dataclass(kw_only=True, slots=True)
class Input:
    """One object of one source, as it was when the build began. ``sha256`` is known once it was read to its end."""

    source: Source
    store: ObjectStore
    key: str
    size: int
    etag: str
    sha256: str = field(default="")

    @property
    def uri(self) -> str:
        return self.store.uri(self.key)

    def read(self, advance: Advance) -> Iterator[Candidate | Unusable]:
        """Every row of the object in order; ``advance`` is told the bytes read.

        Raises:
            SourceError: the object changed since the build began, or cannot be read to its end.
        """
        with self.store.open(self.key) as reader:
            if reader.info.etag != self.etag:
                raise SourceError(f"{self.uri} was changed while the build was reading; build again")
            hashed = _HashedStream(reader, advance)
            stream: BinaryIO = io.BufferedReader(hashed, _CHUNK)
            if self._is_parquet():  # read from its end: hash it first
                _drain(stream)
                reader.seek(0)
                stream = cast(BinaryIO, reader)
            table = read_table(
                stream, self.uri, format=self.source.format, records_key=self.source.records_key
            )
            yield from candidates(table, self.source, self.uri)
            if not self._is_parquet():
                _drain(stream)
            self.sha256 = hashed.sha256

    def hash(self, advance: Advance) -> str:
        """SHA-256 (hex) of the object, reading nothing else of it."""
        with self.store.open(self.key) as reader:
            hashed = _HashedStream(reader, advance)
            _drain(io.BufferedReader(hashed, _CHUNK))
        self.sha256 = hashed.sha256
        return self.sha256

    def _is_parquet(self) -> bool:
        return (format_of(self.key)[0] if self.source.format == "auto" else self.source.format) == "parquet"


def find_inputs(spec: CorpusSpec, store: ObjectStore) -> list[Input]:
    """The objects of all sources, all of them there. Raises :class:`SourceError` naming every one that is not."""
    found: list[Input] = []
    missing: list[str] = []
    for source in spec.sources:
        for path in source.path:
            uri = parse_s3_uri(path)
            home = (
                store
                if uri is None or uri.bucket == store.bucket
                else ObjectStore(store.settings, uri.bucket)
            )
            key = store.settings.root_prefix + path if uri is None else uri.key
            try:
                info = home.head(key)
            except ObjectNotFound:
                missing.append(f"  {home.uri(key)} (source {source.name!r})")
                continue
            if not info.size:
                raise SourceError(f"{home.uri(key)}: source {source.name!r} is an empty object (0 bytes)")
            found.append(Input(source=source, store=home, key=key, size=info.size, etag=info.etag))
    if missing:
        raise SourceError(
            "\n".join(["not in the bucket:", *missing, "Upload them, or correct path: in the specification"])
        )
    return found


class _HashedStream(io.RawIOBase):
    """The bytes of a reader in order, hashed and reported as they pass."""

    def __init__(self, reader: RangedReader, advance: Advance) -> None:
        self._reader, self._advance, self._digest = reader, advance, hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(cast(bytearray, buffer)).cast("B")
        count = self._reader.readinto(view)
        self._digest.update(view[:count])
        self._advance(count)
        return count


def _drain(stream: BinaryIO) -> None:
    while stream.read(_CHUNK):
        pass
