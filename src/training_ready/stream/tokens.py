"""Corpus shards as tokens: tokenised once, kept beside the corpus in the bucket, read by every later run and node.

A token shard (:mod:`.blocks`) is named by what it depends on (corpus shard's sha256, tokenizer, chat template, target
role, length policy), so that it can be reused without asking and never needs invalidation. When all shards of a split
are there, their :mod:`.index` is written: it alone is asked for by the next run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training_ready.storage.objects import ObjectNotFound, ObjectStore
from training_ready.stream.blocks import (
    BLOCK_ROWS,
    CELL_COLUMNS,
    COUNTS_KEY,
    TOKEN_SCHEMA,
    runs_of_mask,
)
from training_ready.stream.index import Cell, TokenIndex
from training_ready.stream.lengths import LengthPolicy, TokenCounts
from training_ready.stream.render import ChatRenderer, RenderedConversation, RenderError
from training_ready.stream.shards import CorpusShard, StreamError, read_corpus_shard

FORMAT_VERSION = 2
_FOOTERS_AT_ONCE = 16
_BETWEEN = "\x1f"  # the unit separator stands in no name
_COLUMNS = ["content_hash", "messages", "target_role", "source_family", "stage", "metadata"]


class TokenCache:
    """Finds or makes the token shards of corpus shards."""

    def __init__(
        self, *, store: ObjectStore, corpus_prefix: str, renderer: ChatRenderer, policy: LengthPolicy
    ) -> None:
        self.store = store
        self._prefix = f"{corpus_prefix.rstrip('/')}/tokens"
        self._renderer = renderer
        self._policy = policy
        self._fingerprint = renderer.fingerprint

    def key_of(self, shard: CorpusShard) -> str:
        identity = [shard.sha256, self._fingerprint, self._policy.max_length, self._policy.overlong]
        return f"{self._prefix}/{_name(identity)}.parquet"

    def index_key(self, shards: Sequence[CorpusShard]) -> str:
        return f"{self._prefix}/index-{_name([self.key_of(shard) for shard in shards])}.parquet"

    def ensure(
        self,
        shards: Sequence[CorpusShard],
        *,
        rank: int = 0,
        world_size: int = 1,
        advance: Callable[[int], None] | None = None,
        patience_seconds: float = 3600,
    ) -> TokenIndex:
        """The rows of ``shards`` as tokens in the bucket; each rank makes its share and waits for the others'.

        Waiting polls the bucket instead of a collective, so tokenising can never trip a collective's time-out
        (https://github.com/huggingface/accelerate/issues/2528).

        Args:
            advance: called with the number of conversations that became available.

        Raises:
            StreamError: a corpus shard differs from its manifest, or another rank's share did not appear in time.
        """
        index = self.find(shards)
        if index is not None:
            return index
        for number, shard in enumerate(shards):
            if number % world_size == rank:
                if not self.store.exists(self.key_of(shard)):
                    self._tokenise(shard, advance)
                elif advance:
                    advance(shard.records)
        deadline = time.monotonic() + patience_seconds
        if rank == 0:
            for shard in shards:
                self._await(
                    self.key_of(shard), deadline, f"tokens of {self.store.uri(shard.key)}", patience_seconds
                )
            index = self._indexed(shards)
            self.store.put_bytes(self.index_key(shards), index.to_bytes())
        else:
            self._await(self.index_key(shards), deadline, "index of the tokens", patience_seconds)
            index = TokenIndex.from_bytes(self.store.get_bytes(self.index_key(shards)))
        return index

    def find(self, shards: Sequence[CorpusShard]) -> TokenIndex | None:
        """The index of shards that were tokenised before, or None."""
        try:
            return TokenIndex.from_bytes(self.store.get_bytes(self.index_key(shards)))
        except ObjectNotFound:
            return None

    def _await(self, key: str, deadline: float, what: str, patience_seconds: float) -> None:
        while not self.store.exists(key):
            if time.monotonic() > deadline:
                raise StreamError(
                    f"waited {patience_seconds:.0f} s for another rank to write the {what} ({self.store.uri(key)}); "
                    "look at the other ranks' logs, then start again: finished shards are kept"
                )
            time.sleep(0.5)

    def _indexed(self, shards: Sequence[CorpusShard]) -> TokenIndex:
        keys = [self.key_of(shard) for shard in shards]
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE, thread_name_prefix="footers") as threads:
            parts = list(threads.map(self._footer, keys))
        counts, cells = TokenCounts(), dict[Cell, int]()
        cell_of_row = []
        for part in parts:
            counts.add(part.counts)
            numbers = [cells.setdefault(cell, len(cells)) for cell in part.cells]
            cell_of_row.append(np.asarray(numbers, dtype=np.int16)[part.cell_of_row])
        return TokenIndex(
            shards=tuple(keys),
            shard_blocks=tuple(len(part.block_rows) for part in parts),
            block_rows=np.concatenate([part.block_rows for part in parts]),
            block_bytes=np.concatenate([part.block_bytes for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            learned=np.concatenate([part.learned for part in parts]),
            cell_of_row=np.concatenate(cell_of_row),
            cells=tuple(cells),
            counts=counts,
        )

    def _footer(self, key: str) -> TokenIndex:
        """The index of one token shard."""
        with io.BufferedReader(self.store.open(key, ahead=False), buffer_size=1 << 20) as reader:
            try:
                file = pq.ParquetFile(reader, page_checksum_verification=True)
                metadata = file.metadata
                table = file.read(columns=["length", "learned_tokens", *CELL_COLUMNS])
            except (pa.ArrowException, OSError) as error:
                raise StreamError(
                    f"{self.store.uri(key)}: cannot be read up to byte {reader.tell()}: {error}. Delete it; it is made "
                    "again."
                ) from error
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        stored = [sum(group.column(c).total_compressed_size for c in range(2)) for group in groups]
        names = pc.binary_join_element_wise(*(table[column] for column in CELL_COLUMNS), _BETWEEN)
        coded = names.combine_chunks().dictionary_encode()
        found = [name.split(_BETWEEN) for name in coded.dictionary.to_pylist()]
        return TokenIndex(
            shards=(key,),
            shard_blocks=(len(groups),),
            block_rows=np.asarray([group.num_rows for group in groups], dtype=np.int64),
            block_bytes=np.asarray(stored, dtype=np.int64),
            lengths=table["length"].to_numpy(),
            learned=table["learned_tokens"].to_numpy(),
            cell_of_row=coded.indices.to_numpy().astype(np.int16),
            cells=tuple(Cell(source, stage, tuple(filter(None, c.split(",")))) for source, stage, c in found),
            counts=TokenCounts(**json.loads(metadata.metadata[COUNTS_KEY])),
        )

    def _tokenise(self, shard: CorpusShard, advance: Callable[[int], None] | None) -> None:
        counts = TokenCounts()
        with tempfile.NamedTemporaryFile(suffix=".parquet") as out:
            # The footer is written at closing, so it can carry counts that are known only after the last row.
            with pq.ParquetWriter(
                out.name, TOKEN_SCHEMA, compression="zstd", write_page_checksum=True
            ) as writer:
                for block in _blocks(self._rows(shard, counts, advance)):
                    writer.write_table(
                        pa.Table.from_pylist(block, schema=TOKEN_SCHEMA), row_group_size=BLOCK_ROWS
                    )
                writer.add_key_value_metadata({COUNTS_KEY.decode(): json.dumps(dataclasses.asdict(counts))})
            self.store.put_file(self.key_of(shard), Path(out.name))

    def _rows(
        self, shard: CorpusShard, counts: TokenCounts, advance: Callable[[int], None] | None
    ) -> Iterator[dict[str, Any]]:
        for records in read_corpus_shard(self.store, shard, _COLUMNS):
            rendered = self._renderer.render_many([record["messages"] for record in records])
            for record, row in zip(records, rendered, strict=True):
                where = f"record {record['content_hash']} of {self.store.uri(shard.key)}"
                if record["target_role"] != self._renderer.target_role:
                    raise StreamError(
                        f"{where}: its target role is {record['target_role']!r}, the recipe's data.target_role is "
                        f"{self._renderer.target_role!r}. A therapist and a simulated client are different datasets: "
                        "build one corpus for each, or change data.target_role."
                    )
                try:
                    if isinstance(row, RenderError):
                        raise row
                    kept = self._policy.apply(row, record["messages"], self._renderer, counts)
                except (RenderError, StreamError) as error:
                    raise StreamError(f"{where}: {error}") from error
                yield from (_token_row(one, record) for one in kept)
            if advance:
                advance(len(records))


def _name(identity: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *identity]).encode()).hexdigest()[:40]


def _token_row(row: RenderedConversation, record: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_ids": row.input_ids,
        "learned": runs_of_mask(row.learned),
        "length": len(row.input_ids),
        "learned_tokens": int(row.learned.sum()),
        "source": record["source_family"],
        "stage": record["stage"],
        "components": ",".join(sorted(json.loads(record["metadata"]).get("components", []))),
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
