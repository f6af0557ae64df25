"""Corpus shards as tokens: tokenised once, kept beside the corpus in the bucket, read by every later run and node.

A token shard is one Parquet object per corpus shard, named by what it depends on (corpus shard's sha256, tokenizer,
chat template, target role, length policy), so that it can be reused without asking and never needs invalidation:

========================  ==============================================================================
``input_ids``             list<int32> (T,)
``learned``               list<int32>, flat pairs [start, end) of the learned tokens
``length``                int32, T
``learned_tokens``        int32
``source``, ``stage``     where the row came from
schema metadata           counts of rows and tokens in, kept, truncated, dropped
========================  ==============================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from training_ready.storage.objects import ObjectStore
from training_ready.stream.render import ChatRenderer, RenderedConversation, RenderError
from training_ready.stream.shards import CorpusShard, StreamError, read_corpus_shard

FORMAT_VERSION = 1
BLOCK_ROWS = 1000  # rows per row group: what one shuffled read fetches
_STATS_KEY = b"training_ready.counts"
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("learned", pa.list_(pa.int32())),
        ("length", pa.int32()),
        ("learned_tokens", pa.int32()),
        ("source", pa.string()),
        ("stage", pa.string()),
    ]
)


@dataclass(kw_only=True, slots=True)
class TokenCounts:
    """Rows and tokens through the length policy: in = kept + dropped, and what truncation cut from kept rows."""

    rows: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    dropped_rows: int = 0
    dropped_tokens: int = 0

    def add(self, other: TokenCounts) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthPolicy:
    """What happens to a conversation of more than ``max_length`` tokens: ``truncate | drop | error``."""

    max_length: int
    overlong: str = "truncate"

    def apply(self, row: RenderedConversation, counts: TokenCounts) -> RenderedConversation | None:
        """The row as it will be trained, or None when it is dropped; counted either way.

        Raises:
            StreamError: the row is too long and the policy is ``error``.
        """
        length, excess = len(row.input_ids), len(row.input_ids) - self.max_length
        if excess > 0:
            if self.overlong == "error":
                raise StreamError(
                    f"a conversation has {length} tokens, {excess} more than max_length {self.max_length}; raise "
                    "max_length, or set stream.overlong to truncate or drop"
                )
            cut = RenderedConversation(
                input_ids=row.input_ids[: self.max_length], learned=row.learned[: self.max_length]
            )
            if self.overlong == "drop" or not cut.learned.any():
                counts.dropped_rows += 1
                counts.dropped_tokens += length
                return None
            row = cut
            counts.truncated_rows += 1
            counts.truncated_tokens += excess
        counts.rows += 1
        counts.tokens += len(row.input_ids)
        counts.learned_tokens += int(row.learned.sum())
        return row


class TokenShard:
    """One token shard in the bucket: its counts and per-row lengths at once, its rows block by block."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self.key = key
        self._lock = threading.Lock()
        reader = io.BufferedReader(store.open(key, ahead=False), buffer_size=1 << 20)
        self._file = pq.ParquetFile(reader, page_checksum_verification=True)
        table = self._file.read(columns=["length", "learned_tokens", "source", "stage"])
        self.lengths: npt.NDArray[np.int32] = table["length"].to_numpy()
        self.learned_tokens: npt.NDArray[np.int32] = table["learned_tokens"].to_numpy()
        self.sources: list[str] = table["source"].to_pylist()
        self.stages: list[str] = table["stage"].to_pylist()
        self.counts = TokenCounts(**json.loads(self._file.metadata.metadata[_STATS_KEY]))
        metadata = self._file.metadata
        self.block_rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def read_block(self, block: int) -> list[RenderedConversation]:
        with self._lock:  # two iterators over one stream share the open file
            table = self._file.read_row_group(block, columns=["input_ids", "learned"])
        return [
            RenderedConversation(
                input_ids=ids.values.to_numpy(), learned=_mask(len(ids.values), runs.values.to_numpy())
            )
            for ids, runs in zip(table["input_ids"], table["learned"], strict=True)
        ]


class TokenCache:
    """Finds or makes the token shards of corpus shards."""

    def __init__(
        self, *, store: ObjectStore, corpus_prefix: str, renderer: ChatRenderer, policy: LengthPolicy
    ) -> None:
        self._store = store
        self._prefix = f"{corpus_prefix.rstrip('/')}/tokens"
        self._renderer = renderer
        self._policy = policy
        self._fingerprint = renderer.fingerprint

    def key_of(self, shard: CorpusShard) -> str:
        identity = [
            FORMAT_VERSION,
            shard.sha256,
            self._fingerprint,
            self._policy.max_length,
            self._policy.overlong,
        ]
        return f"{self._prefix}/{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:40]}.parquet"

    def ensure(
        self,
        shards: Sequence[CorpusShard],
        *,
        rank: int = 0,
        world_size: int = 1,
        advance: Callable[[int], None] | None = None,
        patience_seconds: float = 3600,
    ) -> list[TokenShard]:
        """Token shards for ``shards``, in their order; each rank makes its share and waits for the others'.

        Waiting polls the bucket instead of a collective, so tokenising can never trip a collective's time-out
        (https://github.com/huggingface/accelerate/issues/2528).

        Args:
            advance: called with the number of rows that became available.

        Raises:
            StreamError: a corpus shard differs from its manifest, or another rank's share did not appear in time.
        """
        for index, shard in enumerate(shards):
            if index % world_size == rank:
                if not self._store.exists(self.key_of(shard)):
                    self._tokenise(shard, advance)
                elif advance:
                    advance(shard.records)
        deadline = time.monotonic() + patience_seconds
        for shard in shards:
            while not self._store.exists(self.key_of(shard)):
                if time.monotonic() > deadline:
                    raise StreamError(
                        f"rank {rank} of {world_size} waited {patience_seconds:.0f} s for another rank to tokenise "
                        f"{self._store.uri(shard.key)} into {self._store.uri(self.key_of(shard))}; look at that "
                        "rank's log, then start again: finished shards are kept"
                    )
                time.sleep(1)
        return [TokenShard(self._store, self.key_of(shard)) for shard in shards]

    def _tokenise(self, shard: CorpusShard, advance: Callable[[int], None] | None) -> None:
        counts = TokenCounts()
        with tempfile.NamedTemporaryFile(suffix=".parquet") as out:
            # The footer is written at closing, so it can carry counts that are known only after the last row.
            with pq.ParquetWriter(out.name, _SCHEMA, compression="zstd", write_page_checksum=True) as writer:
                for block in _blocks(self._rows(shard, counts, advance)):
                    writer.write_table(pa.Table.from_pylist(block, schema=_SCHEMA), row_group_size=BLOCK_ROWS)
                writer.add_key_value_metadata({_STATS_KEY.decode(): json.dumps(dataclasses.asdict(counts))})
            self._store.put_file(self.key_of(shard), Path(out.name))

    def _rows(
        self, shard: CorpusShard, counts: TokenCounts, advance: Callable[[int], None] | None
    ) -> Iterator[dict[str, Any]]:
        columns = ["content_hash", "messages", "target_role", "source_family", "stage"]
        for records in read_corpus_shard(self._store, shard, columns):
            for record in records:
                row = self._policy_applied(record, self._store.uri(shard.key), counts)
                if row is not None:
                    yield _token_row(row, record)
            if advance:
                advance(len(records))

    def _policy_applied(
        self, record: Mapping[str, Any], uri: str, counts: TokenCounts
    ) -> RenderedConversation | None:
        where = f"record {record['content_hash']} of {uri}"
        if record["target_role"] != self._renderer.target_role:
            raise StreamError(
                f"{where}: its target role is {record['target_role']!r}, the recipe's data.target_role is "
                f"{self._renderer.target_role!r}. A therapist and a simulated client are different datasets: build "
                "one corpus for each, or change data.target_role."
            )
        try:
            return self._policy.apply(self._renderer.render(record["messages"]), counts)
        except (RenderError, StreamError) as error:
            raise StreamError(f"{where}: {error}") from error


def _token_row(row: RenderedConversation, record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_ids": row.input_ids,
        "learned": _runs(row.learned),
        "length": len(row.input_ids),
        "learned_tokens": int(row.learned.sum()),
        "source": record["source_family"],
        "stage": record["stage"],
    }


def _blocks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    block: list[dict[str, Any]] = []
    for row in rows:
        block.append(row)
        if len(block) == BLOCK_ROWS:
            yield block
            block = []
    if block:
        yield block


def _runs(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """Flat [start, end) pairs of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.view(np.int8), [0]])))
    return edges.astype(np.int32)


def _mask(length: int, runs: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """The inverse of :func:`_runs`."""
    mask = np.zeros(length, dtype=np.bool_)
    for start, end in runs.reshape(-1, 2).tolist():
        mask[start:end] = True
    return mask
