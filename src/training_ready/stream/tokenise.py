"""Row groups of a corpus become blocks of tokens: rendered, cut to length, written. Here, or in spawned processes.

A process can take any row group, since a block depends on its rows and on nothing before them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Any

from training_ready.corpus.manifest import RowGroup, Shard
from training_ready.storage.embedded import die_with_parent
from training_ready.storage.objects import ObjectStore
from training_ready.stream.blocks import TokenRow, write_block
from training_ready.stream.index import TokenIndex
from training_ready.stream.lengths import LengthPolicy, TokenCounts
from training_ready.stream.render import ChatRenderer, RenderError
from training_ready.stream.shards import CorpusReader, StreamError

_COLUMNS = ["content_hash", "messages", "target_role", "source_family", "stage", "metadata", "domain"]
_IN_FLIGHT = 2  # row groups for every process: the one it is at, and the next


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusBlock:
    """A row group of a corpus, and the key of its tokens."""

    shard: Shard
    number: int
    key: str

    @property
    def row_group(self) -> RowGroup:
        return self.shard.row_groups[self.number]


class BlockTokeniser:
    """Turns row groups of corpora of one bucket into blocks of tokens in it. Can be pickled."""

    def __init__(self, store: ObjectStore, renderer: ChatRenderer, policy: LengthPolicy) -> None:
        self._store, self._renderer, self._policy = store, renderer, policy
        self._reader = CorpusReader(store)

    def __reduce__(self) -> tuple[Callable[..., BlockTokeniser], tuple[Any, ...]]:
        return BlockTokeniser, (self._store, self._renderer, self._policy)

    def run(self, block: CorpusBlock) -> TokenIndex:
        """Writes the block; its index.

        Raises:
            StreamError: the corpus shard is not what its manifest says, or a row cannot be trained.
        """
        counts = TokenCounts()
        return write_block(self._store, block.key, self._rows(block, counts), counts, {})

    def _rows(self, block: CorpusBlock, counts: TokenCounts) -> list[TokenRow]:
        rows: list[TokenRow] = []
        for records in self._reader.row_group(block.shard, block.number, _COLUMNS):
            rendered = self._renderer.render_many([record["messages"] for record in records])
            for record, row in zip(records, rendered, strict=True):
                where = f"record {record['content_hash']} of {self._store.uri(block.shard.key)}"
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
                rows += [(one, _cell(record)) for one in kept]
        return rows


class Ahead:
    """Tokenises in spawned processes, in the order given, whether somebody asks for the result or not yet."""

    def __init__(self, tokeniser: BlockTokeniser, blocks: Sequence[CorpusBlock], workers: int) -> None:
        self._workers, self._lock = workers, threading.Lock()
        self._results: dict[str, Future[TokenIndex]] = {block.key: Future() for block in blocks}
        self._waiting = deque((block, self._results[block.key]) for block in blocks)
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),  # this process has threads by now
            initializer=_begin,
            initargs=(tokeniser, os.getpid()),
        )
        # Few at a time: an interpreter that exits waits for what was submitted.
        for _ in range(_IN_FLIGHT * workers):
            self._submit_next()

    def result(self, block: CorpusBlock) -> TokenIndex:
        """
        Raises:
            StreamError: as :meth:`BlockTokeniser.run`; what other processes finished is kept.
        """
        try:
            return self._results.pop(block.key).result()
        except BrokenProcessPool as error:
            raise StreamError(
                f"one of {self._workers} tokenising processes was killed, most likely for lack of memory. Take fewer "
                "(stream.tokenise_workers; `workers` of load) and start again: finished blocks are kept"
            ) from error

    def close(self) -> None:
        """Begins nothing more."""
        with self._lock:
            self._waiting.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit_next(self) -> None:
        with self._lock:
            if not self._waiting:
                return
            block, result = self._waiting.popleft()
        try:
            self._pool.submit(_in_worker, block).add_done_callback(partial(self._finished, result))
        except RuntimeError as error:  # broken, or shut down
            self._give_up(result, error)

    def _finished(self, result: Future[TokenIndex], done: Future[TokenIndex]) -> None:
        error = CancelledError() if done.cancelled() else done.exception()
        if isinstance(error, CancelledError | BrokenProcessPool):
            self._give_up(result, error)  # and do not touch the pool: it may hold its lock while it says so
            return
        self._submit_next()
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(done.result())

    def _give_up(self, result: Future[TokenIndex], error: Exception) -> None:
        """Nobody may wait for what never comes."""
        with self._lock:
            left = [one for _, one in self._waiting]
            self._waiting.clear()
        for one in (result, *left):
            one.set_exception(error)


_tokeniser: BlockTokeniser | None = None  # of a worker process


def _begin(tokeniser: BlockTokeniser, parent: int) -> None:
    global _tokeniser
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it died while this process imported what it needs
        os._exit(1)
    os.setsid()  # a signal to the run is the run's affair: it decides what is finished first
    os.nice(10)  # whoever trains goes first
    _tokeniser = tokeniser


def _in_worker(block: CorpusBlock) -> TokenIndex:
    assert _tokeniser is not None  # noqa: S101
    return _tokeniser.run(block)


def _cell(record: dict[str, Any]) -> tuple[str, str, str, str]:
    metadata = record["metadata"]
    components = sorted(json.loads(metadata).get("components", [])) if metadata != "{}" else []
    return record["source_family"], record["stage"], ",".join(components), record["domain"] or ""
