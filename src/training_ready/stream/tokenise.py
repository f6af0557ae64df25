"""One corpus shard becomes one token shard: rendered, cut to length, written in blocks. Here, or in spawned processes.

A process can take any shard, since a token shard depends on its corpus shard and on nothing before it.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from training_ready.storage.embedded import die_with_parent
from training_ready.storage.objects import ObjectStore
from training_ready.stream.blocks import BLOCK_ROWS, CELL_COLUMNS, COUNTS_KEY, TOKEN_SCHEMA, runs_of_mask
from training_ready.stream.index import Cell, TokenIndex
from training_ready.stream.lengths import LengthPolicy, TokenCounts
from training_ready.stream.render import ChatRenderer, RenderedConversation, RenderError
from training_ready.stream.shards import CorpusShard, StreamError, read_corpus_shard

_BETWEEN = "\x1f"  # the unit separator stands in no name
_COLUMNS = ["content_hash", "messages", "target_role", "source_family", "stage", "metadata", "domain"]
_ROWS_PER_WORKER = 10_000  # fewer are done sooner than a process has imported what it needs

# A row of a block: its tokens, and the values of the cell columns.
TokenRow = tuple[RenderedConversation, tuple[str, str, str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTokeniser:
    """Turns corpus shards of one bucket into token shards in it. Can be pickled."""

    store: ObjectStore
    renderer: ChatRenderer
    policy: LengthPolicy

    def run(self, shard: CorpusShard, key: str, advance: Callable[[int], None] | None = None) -> TokenIndex:
        """Writes the token shard of ``shard`` under ``key``; its index.

        Raises:
            StreamError: the corpus shard is not what its manifest says, or a row cannot be trained.
        """
        counts = TokenCounts()
        return write_token_shard(self.store, key, self._rows(shard, counts, advance), counts)

    def run_all(
        self,
        todo: Sequence[tuple[CorpusShard, str]],
        *,
        workers: int = 1,
        advance: Callable[[int], None] | None = None,
    ) -> dict[str, TokenIndex]:
        """The same for several, ``(shard, key)`` each; in up to ``workers`` processes where that is worth their start.

        Raises:
            StreamError: as :meth:`run`; what the other processes finished is kept.
        """
        workers = min(workers, len(todo), sum(shard.records for shard, _ in todo) // _ROWS_PER_WORKER)
        if workers < 2:
            return {key: self.run(shard, key, advance) for shard, key in todo}
        done: dict[str, TokenIndex] = {}
        with ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),  # this process has threads by now
            initializer=_begin,
            initargs=(self,),
        ) as pool:
            futures = {pool.submit(_in_worker, shard, key): shard for shard, key in todo}
            try:
                for future in as_completed(futures):
                    index = future.result()
                    done[index.shards[0]] = index
                    if advance:
                        advance(futures[future].records)
            except BrokenProcessPool as error:
                raise StreamError(
                    f"one of {workers} tokenising processes was killed, most likely for lack of memory. Take fewer "
                    "(stream.tokenise_workers; `workers` of load) and start again: finished shards are kept"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return done

    def _rows(
        self, shard: CorpusShard, counts: TokenCounts, advance: Callable[[int], None] | None
    ) -> Iterator[TokenRow]:
        for records in read_corpus_shard(self.store, shard, _COLUMNS):
            rendered = self.renderer.render_many([record["messages"] for record in records])
            for record, row in zip(records, rendered, strict=True):
                where = f"record {record['content_hash']} of {self.store.uri(shard.key)}"
                if record["target_role"] != self.renderer.target_role:
                    raise StreamError(
                        f"{where}: its target role is {record['target_role']!r}, the recipe's data.target_role is "
                        f"{self.renderer.target_role!r}. A therapist and a simulated client are different datasets: "
                        "build one corpus for each, or change data.target_role."
                    )
                try:
                    if isinstance(row, RenderError):
                        raise row
                    kept = self.policy.apply(row, record["messages"], self.renderer, counts)
                except (RenderError, StreamError) as error:
                    raise StreamError(f"{where}: {error}") from error
                cell = _cell(record)
                yield from ((one, cell) for one in kept)
            if advance:
                advance(len(records))


def write_token_shard(
    store: ObjectStore,
    key: str,
    rows: Iterator[TokenRow],
    counts: TokenCounts,
    more: Callable[[], dict[str, str]] = dict,
) -> TokenIndex:
    """Writes rows as the token shard ``key``; its index.

    Args:
        counts: of the rows, complete when the last one has come.
        more: entries for the footer, asked for after the last row.
    """
    with tempfile.NamedTemporaryFile(suffix=".parquet") as out:
        # The footer is written at closing, so it can carry what is known only after the last row.
        with pq.ParquetWriter(out.name, TOKEN_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            for block in _blocks(rows):
                writer.write_table(_table(block), row_group_size=BLOCK_ROWS)
            counted = {COUNTS_KEY.decode(): json.dumps(dataclasses.asdict(counts))}
            writer.add_key_value_metadata(counted | more())
        index = index_of_shard(out.file, key, store.uri(key))
        store.keep_on_disk(store.put_file(key, Path(out.name)), Path(out.name))
    return index


_tokeniser: ShardTokeniser | None = None  # of a worker process


def _begin(tokeniser: ShardTokeniser) -> None:
    global _tokeniser
    die_with_parent(signal.SIGKILL)
    _tokeniser = tokeniser


def _in_worker(shard: CorpusShard, key: str) -> TokenIndex:
    assert _tokeniser is not None  # noqa: S101
    return _tokeniser.run(shard, key)


def index_of_shard(source: IO[bytes], key: str, where: str) -> TokenIndex:
    """The index of one token shard.

    Raises:
        StreamError: it cannot be read.
    """
    try:
        file = pq.ParquetFile(source, page_checksum_verification=True)
        metadata = file.metadata
        table = file.read(columns=["length", "learned_tokens", *CELL_COLUMNS])
    except (pa.ArrowException, OSError) as error:
        raise StreamError(
            f"{where}: cannot be read up to byte {source.tell()}: {error}. Delete it; it is made again."
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
        cell_of_row=coded.indices.to_numpy().astype(np.int32),
        cells=tuple(
            Cell(source, stage, tuple(filter(None, parts.split(","))), domain)
            for source, stage, parts, domain in found
        ),
        counts=TokenCounts(**json.loads(metadata.metadata[COUNTS_KEY])),
    )


def _cell(record: dict[str, Any]) -> tuple[str, str, str, str]:
    metadata = record["metadata"]
    components = sorted(json.loads(metadata).get("components", [])) if metadata != "{}" else []
    return record["source_family"], record["stage"], ",".join(components), record["domain"] or ""


def _table(block: Sequence[TokenRow]) -> pa.Table:
    """The rows as Arrow, straight from their arrays."""
    runs = [runs_of_mask(row.learned) for row, _ in block]
    columns: list[Any] = [
        _lists([row.input_ids for row, _ in block]),
        _lists(runs),
        pa.array([len(row.input_ids) for row, _ in block], pa.int32()),
        pa.array([int((run[1::2] - run[::2]).sum()) for run in runs], pa.int32()),
        *(pa.array([cell[number] for _, cell in block], pa.string()) for number in range(len(CELL_COLUMNS))),
    ]
    return pa.Table.from_arrays(columns, schema=TOKEN_SCHEMA)


def _lists(arrays: Sequence[npt.NDArray[np.int32]]) -> pa.ListArray:
    starts = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(np.concatenate(arrays)))


def _blocks(rows: Iterator[TokenRow]) -> Iterator[list[TokenRow]]:
    block: list[TokenRow] = []
    for row in rows:
        block.append(row)
        if len(block) == BLOCK_ROWS:
            yield block
            block = []
    if block:
        yield block
