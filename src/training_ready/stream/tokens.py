"""A corpus as tokens: tokenised once, kept beside the corpus in the bucket, read by every later run and node.

A block (:mod:`.blocks`) is named by what it depends on (its row group's sha256, tokenizer, chat template, target role,
length policy), so that it can be reused without asking and never needs invalidation. When all blocks of a split are
there, their :mod:`.index` is written: it alone is asked for by the next run.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np

from training_ready.corpus.manifest import Shard
from training_ready.storage.objects import ObjectNotFound, ObjectStore
from training_ready.stream.blocks import index_of_block
from training_ready.stream.index import TokenIndex, fingerprint_of
from training_ready.stream.lengths import LengthPolicy
from training_ready.stream.order import early_rounds
from training_ready.stream.render import ChatRenderer
from training_ready.stream.shards import StreamError
from training_ready.stream.token_set import TokenSet
from training_ready.stream.tokenise import Ahead, BlockTokeniser, CorpusBlock

logger = logging.getLogger(__name__)

FORMAT_VERSION = 4
_FOOTERS_AT_ONCE = 16
_ROWS_PER_WORKER = 10_000  # fewer are done sooner than a process has imported what it needs
_ROUNDS_HERE = 2  # of an early beginning: they are done while the processes start


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Who tokenises: this rank of how many, in how many processes.

    ``ahead``: go on while nobody waits, in at least one process of its own where that is worth its start. ``advance``
    is called with the number of this rank's conversations that became available.
    """

    rank: int = 0
    world_size: int = 1
    workers: int = 1
    ahead: bool = False
    advance: Callable[[int], None] | None = None
    patience_seconds: float = 3600


class TokenCache:
    """Finds or makes the tokens of corpus shards; each rank makes its share and waits for the others'.

    Waiting polls the bucket instead of a collective, so tokenising before the first step can never trip a collective's
    time-out (https://github.com/huggingface/accelerate/issues/2528); a round that is not ready when it is trained can.
    """

    def __init__(
        self, *, store: ObjectStore, corpus_prefix: str, renderer: ChatRenderer, policy: LengthPolicy
    ) -> None:
        self.store, self.prefix = store, f"{corpus_prefix.rstrip('/')}/tokens"
        identity = name_of([renderer.fingerprint, policy.max_length, policy.overlong])
        self._folder = f"{self.prefix}/{identity[:16]}"
        self._renderer, self._policy = renderer, policy

    def blocks_of(self, shards: Sequence[Shard]) -> list[CorpusBlock]:
        """The row groups of the shards, and where their tokens are or will be."""
        return [
            CorpusBlock(shard=shard, number=number, key=f"{self._folder}/{group.sha256[:40]}.parquet")
            for shard in shards
            for number, group in enumerate(shard.row_groups)
        ]

    def ensure(self, shards: Sequence[Shard], share: Share | None = None) -> TokenIndex:
        """All rows of ``shards`` as tokens in the bucket.

        Raises:
            StreamError: a corpus shard differs from its manifest, or another rank's share did not appear in time.
        """
        index = self.find(shards)
        if index is not None:
            logger.info(f"the tokens of all {len(shards)} shards are there: nothing is tokenised")
            return index
        tokeniser = BlockTokeniser(self.store, self._renderer, self._policy)
        [index] = self._made(tokeniser, [self.blocks_of(shards)], share or Share())
        return index

    def begin(self, name: str, shards: Sequence[Shard], seed: int, share: Share | None = None) -> TokenSet:
        """The tokens in rounds, of which the first is there.

        Raises:
            StreamError: as :meth:`ensure`.
        """
        blocks, share = self.blocks_of(shards), share or Share()
        index = self.find(shards)
        if index is not None:
            return TokenSet.early(name=name, store=self.store, prefix=self.prefix, index=index, seed=seed)
        order = early_rounds(len(blocks), seed=seed)
        coming = self._coming([[blocks[number] for number in one] for one in order], share, blocks)
        return TokenSet(
            name=name,
            store=self.store,
            prefix=self.prefix,
            index=next(coming),
            rounds=[1],
            coming=coming,
            blocks=len(blocks),
            fingerprint=fingerprint_of([block.key for block in blocks]),
        )

    def find(self, shards: Sequence[Shard]) -> TokenIndex | None:
        """The index of shards that were tokenised before, or None."""
        try:
            return TokenIndex.from_bytes(self.store.get_bytes(self._index_key(self.blocks_of(shards))))
        except ObjectNotFound:
            return None

    def _coming(
        self, rounds: Sequence[Sequence[CorpusBlock]], share: Share, whole: Sequence[CorpusBlock]
    ) -> Iterator[TokenIndex]:
        """The index of each round: made when it is asked for, or in a thread that waits for nobody's question."""
        # A thread, because whoever waits for another rank's share must not be what that rank waits for. It has a
        # tokenizer of its own: another thread could set a truncation between two calls.
        alone = not share.ahead and share.world_size == share.workers == 1
        renderer = self._renderer if alone else copy.deepcopy(self._renderer)
        made = self._made(BlockTokeniser(self.store, renderer, self._policy), rounds, share, whole)
        return made if alone else _in_background(made)

    def _made(
        self,
        tokeniser: BlockTokeniser,
        rounds: Sequence[Sequence[CorpusBlock]],
        share: Share,
        whole: Sequence[CorpusBlock] = (),
    ) -> Iterator[TokenIndex]:
        """The index of each round, when its blocks are there. ``whole``: all blocks in the order of the corpus."""
        in_all = [block for one in rounds for block in one]
        mine = {block.key: block for block in in_all[share.rank :: share.world_size]}
        there = {info.key for info in self.store.list(self._folder)}
        todo = {key: block for key, block in mine.items() if key not in there}
        logger.info(f"{len(mine) - len(todo)} of {len(mine)} blocks are there, the others are tokenised")
        here = {block.key for one in rounds[:_ROUNDS_HERE] for block in one} if len(rounds) > 1 else set()
        ahead = _ahead(tokeniser, [block for key, block in todo.items() if key not in here], share)
        known: list[TokenIndex] = []
        try:
            for one in rounds:
                made: dict[str, TokenIndex] = {}
                for block in one:
                    if todo.pop(block.key, None) is not None:
                        if ahead is None or block.key in here:
                            made[block.key] = tokeniser.run(block)
                        else:
                            made[block.key] = ahead.result(block)
                    if share.advance and block.key in mine:
                        share.advance(block.row_group.records)
                known.append(self._round(one, made, share))
                if share.rank == 0 and whole and len(known) == len(rounds):
                    self._put_index(whole, _by_key(TokenIndex.joined(known), whole))
                yield known[-1]
        finally:
            if ahead is not None:
                ahead.close()

    def _round(self, blocks: Sequence[CorpusBlock], made: dict[str, TokenIndex], share: Share) -> TokenIndex:
        """The index of blocks of which this rank has made some; rank 0 collects, the others read what it collected."""
        deadline = time.monotonic() + share.patience_seconds
        key = self._index_key(blocks)
        if share.rank:
            wait_for(self.store, key, deadline, "index of the tokens")
            return TokenIndex.from_bytes(self.store.get_bytes(key))
        missing = {block.key: block for block in blocks if block.key not in made}
        if len(missing) == len({block.key for block in blocks}):  # all of a run before, perhaps its index too
            with suppress(ObjectNotFound):
                return TokenIndex.from_bytes(self.store.get_bytes(key))
        there = {info.key for info in self.store.list(self._folder)} if missing else set()
        for block in missing.values():
            if block.key not in there:
                wait_for(self.store, block.key, deadline, f"tokens of {self.store.uri(block.shard.key)}")
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE, thread_name_prefix="footers") as threads:
            found = dict(zip(missing, threads.map(self._footer, missing), strict=True))
        index = TokenIndex.joined([made.get(block.key) or found[block.key] for block in blocks])
        self._put_index(blocks, index)
        return index

    def _index_key(self, blocks: Sequence[CorpusBlock]) -> str:
        return f"{self.prefix}/index-{name_of([block.key for block in blocks])}.parquet"

    def _put_index(self, blocks: Sequence[CorpusBlock], index: TokenIndex) -> None:
        self.store.put_bytes(self._index_key(blocks), index.to_bytes())

    def _footer(self, key: str) -> TokenIndex:
        """The index of a block that another process wrote."""
        with io.BufferedReader(self.store.open(key, ahead=False), buffer_size=1 << 20) as reader:
            return index_of_block(reader, key, self.store.uri(key))


def _ahead(tokeniser: BlockTokeniser, blocks: Sequence[CorpusBlock], share: Share) -> Ahead | None:
    """Processes for these blocks, where they are worth their start."""
    workers = min(share.workers, sum(block.row_group.records for block in blocks) // _ROWS_PER_WORKER)
    return Ahead(tokeniser, blocks, workers) if workers >= (1 if share.ahead else 2) else None


def _in_background(source: Iterator[TokenIndex]) -> Iterator[TokenIndex]:
    """The same items, made in a thread of their own whether anybody asks for them or not yet."""
    made: SimpleQueue[TokenIndex | BaseException] = SimpleQueue()
    process = os.getpid()

    def make() -> None:
        try:
            for one in source:
                made.put(one)
        except BaseException as error:
            made.put(error)

    # A daemon: a run may end before its first pass does.
    threading.Thread(target=make, name="tokenising", daemon=True).start()
    while True:
        if os.getpid() != process:
            raise StreamError(
                f"the corpus is being tokenised by process {process}, this is its fork {os.getpid()}: read the stream "
                "in the process that opened it (num_workers=0 of a DataLoader), or wait until all is tokenised"
            )
        one = made.get()
        if isinstance(one, BaseException):
            raise one
        yield one


def _by_key(index: TokenIndex, blocks: Sequence[CorpusBlock]) -> TokenIndex:
    """The index in the order of ``blocks``."""
    place = {key: number for number, key in enumerate(index.blocks)}
    return index.in_order(np.asarray([place[block.key] for block in blocks]))


def wait_for(store: ObjectStore, key: str, deadline: float, what: str) -> None:
    """Until another rank has written an object.

    Raises:
        StreamError: it did not come before the deadline, on the clock of ``time.monotonic``.
    """
    began, pause = time.monotonic(), 0.05
    while not store.exists(key):
        if time.monotonic() > deadline:
            raise StreamError(
                f"waited {max(0, deadline - began):.0f} s for another rank to write the {what} ({store.uri(key)}); "
                "look at the other ranks' logs, then start again: finished blocks are kept"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.5)


def name_of(identity: Sequence[Any]) -> str:
    """The name of an object that depends on exactly this."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *identity]).encode()).hexdigest()[:40]
