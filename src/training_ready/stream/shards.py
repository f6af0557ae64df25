"""Reads a corpus shard from the bucket, proving that it is the one its manifest lists."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any, Protocol

import pyarrow.parquet as pq

from training_ready import TrainingReadyError
from training_ready.storage.objects import ObjectNotFound, ObjectStore

_BATCH_ROWS = 64


class StreamError(TrainingReadyError):
    """The stream cannot deliver what the recipe asks for."""


class CorpusShard(Protocol):
    """The part of a manifest's shard entry that reading needs."""

    @property
    def key(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def records(self) -> int: ...


def read_corpus_shard(
    store: ObjectStore, shard: CorpusShard, columns: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """The records of one shard in batches, after its sha256 was compared with the manifest's.

    The shard passes through a temporary file (64-256 MB), so memory stays bounded and nothing unverified is read.

    Raises:
        StreamError: the object is gone, or is not the one that the manifest promises.
    """
    seen = 0
    with tempfile.TemporaryFile() as copy:
        _copy_verified(store, shard, copy)
        for batch in pq.ParquetFile(copy).iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
            seen += batch.num_rows
            yield batch.to_pylist()
    if seen != shard.records:
        raise StreamError(f"{store.uri(shard.key)} holds {seen} records, its manifest says {shard.records}")


def _copy_verified(store: ObjectStore, shard: CorpusShard, out: IO[bytes]) -> None:
    digest, uri = hashlib.sha256(), store.uri(shard.key)
    try:
        with store.open(shard.key, whole=True) as reader:
            while chunk := reader.read(1 << 22):
                digest.update(chunk)
                out.write(chunk)
    except ObjectNotFound as error:
        raise StreamError(
            f"{uri} is in the manifest but not in the bucket; build the corpus again"
        ) from error
    if digest.hexdigest() != shard.sha256.removeprefix("sha256:"):
        raise StreamError(
            f"{uri} has sha256 {digest.hexdigest()}, its manifest says {shard.sha256}: the object was changed after "
            "the build. Build the corpus again."
        )
    out.seek(0)
