"""How do records lie in the bucket? Parquet shards, one split each, in the order in which records arrive."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from training_ready.corpus.manifest import RowGroup, Shard
from training_ready.corpus.record import Record, Split
from training_ready.storage.objects import ObjectStore, StorageError

SHARD_SCHEMA = pa.schema(
    [
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field(
            "messages",
            pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])),
            nullable=False,
        ),
        pa.field("source_family", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("target_role", pa.string(), nullable=False),
        pa.field("domain", pa.string()),
        pa.field("metadata", pa.string(), nullable=False),
    ]
)


def shard_row(record: Record) -> dict[str, Any]:
    """A record as one row of :data:`SHARD_SCHEMA`."""
    metadata = record.metadata
    return {
        "content_hash": metadata.content_hash,
        "messages": [{"role": message.role, "content": message.content} for message in record.messages],
        "source_family": metadata.source_family,
        "stage": metadata.stage,
        "target_role": metadata.target_role,
        "domain": metadata.domain,
        "metadata": metadata.canonical_json(),
    }


class ShardWriter:
    """Writes the records of one split; holds one row group in memory and one shard on disk."""

    def __init__(
        self,
        store: ObjectStore,
        folder: Path,
        *,
        prefix: str,
        split: Split,
        suffix: str,
        row_group_records: int,
        shard_records: int,
    ) -> None:
        """
        Args:
            folder: local folder for the shard being written.
            prefix: key of the corpus with its final slash; shards are
                ``<prefix><split>/shard-<number><suffix>.parquet``.
        """
        self._store, self._path = store, folder / f"{split}.parquet"
        self._prefix, self._split, self._suffix = prefix, split, suffix
        self._row_group_records, self._shard_records = row_group_records, shard_records
        self._rows: list[dict[str, Any]] = []
        self._written = 0  # records of the open shard
        self._writer: pq.ParquetWriter | None = None
        self._shards: list[Shard] = []

    def add(self, record: Record) -> None:
        self._rows.append(shard_row(record))
        written = self._written + len(self._rows)
        if len(self._rows) == self._row_group_records or written == self._shard_records:
            self._write_row_group()
        if written == self._shard_records:
            self._finish_shard()

    def close(self) -> list[Shard]:
        """Writes what is left. Returns all shards, each read back from the bucket and found equal."""
        self._write_row_group()
        self._finish_shard()
        return self._shards

    def _write_row_group(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._path, SHARD_SCHEMA, compression="zstd", write_page_checksum=True, store_schema=True
            )
        self._writer.write_table(
            pa.Table.from_pylist(self._rows, SHARD_SCHEMA), row_group_size=len(self._rows)
        )
        self._written += len(self._rows)
        self._rows = []

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        key = f"{self._prefix}{self._split}/shard-{len(self._shards):05}{self._suffix}.parquet"
        put_verified(self._store, key, self._path)
        self._shards.append(describe_shard(self._path, key, self._split))
        self._path.unlink()
        self._writer, self._written = None, 0


def describe_shard(path: Path, key: str, split: Split) -> Shard:
    """What a manifest says of a shard, from its file."""
    metadata, groups, footer = pq.read_metadata(path), [], 0
    with path.open("rb") as file:
        for number in range(metadata.num_row_groups):
            begin, footer = row_group_span(metadata, number)
            file.seek(begin)
            digest = hashlib.sha256(file.read(footer - begin)).hexdigest()
            records = metadata.row_group(number).num_rows
            groups.append(RowGroup(records=records, offset=begin, bytes=footer - begin, sha256=digest))
        file.seek(footer)
        end = hashlib.sha256(file.read()).hexdigest()
        file.seek(0)
        whole = hashlib.file_digest(file, "sha256").hexdigest()
    return Shard(
        key=key,
        bytes=path.stat().st_size,
        sha256=whole,
        records=metadata.num_rows,
        split=split,
        row_groups=groups,
        footer_sha256=end,
    )


def row_group_span(metadata: pq.FileMetaData, number: int) -> tuple[int, int]:
    """Where the columns of a row group lie in the file: [begin, end)."""
    group = metadata.row_group(number)
    columns = [group.column(n) for n in range(group.num_columns)]
    first, last = columns[0], columns[-1]
    begin = first.dictionary_page_offset or first.data_page_offset
    return begin, (last.dictionary_page_offset or last.data_page_offset) + last.total_compressed_size


def put_verified(store: ObjectStore, key: str, path: Path) -> tuple[int, str]:
    """Uploads a file, reads the object back and compares. Returns size and SHA-256 (hex).

    Raises:
        StorageError: the object in the bucket is not the file that was sent.
    """
    with path.open("rb") as file:
        sent = hashlib.file_digest(file, "sha256").hexdigest()
    store.put_file(key, path)
    size, found = object_sha256(store, key)
    if found != sent:
        raise StorageError(
            f"{store.uri(key)}: read back {size:,} bytes with sha256 {found}, sent were {path.stat().st_size:,} bytes "
            f"with {sent}. The corpus was not finished; build again"
        )
    return size, found


def object_sha256(store: ObjectStore, key: str) -> tuple[int, str]:
    """Size and SHA-256 (hex) of the bytes that the bucket gives for ``key``."""
    digest, size = hashlib.sha256(), 0
    with store.open(key) as reader:
        while chunk := reader.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()
