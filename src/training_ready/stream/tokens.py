"""Corpus shards as tokens: tokenised once, kept beside the corpus in the bucket, read by every later run and node.

A token shard (:mod:`.blocks`) is named by what it depends on (corpus shard's sha256, tokenizer, chat template, target
role, length policy), so that it can be reused without asking and never needs invalidation. When all shards of a split
are there, their :mod:`.index` is written: it alone is asked for by the next run.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from training_ready.storage.objects import ObjectNotFound, ObjectStore
from training_ready.stream.index import TokenIndex
from training_ready.stream.lengths import LengthPolicy
from training_ready.stream.render import ChatRenderer
from training_ready.stream.shards import CorpusShard, StreamError
from training_ready.stream.tokenise import ShardTokeniser, index_of_shard

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
_FOOTERS_AT_ONCE = 16


class TokenCache:
    """Finds or makes the token shards of corpus shards."""

    def __init__(
        self, *, store: ObjectStore, corpus_prefix: str, renderer: ChatRenderer, policy: LengthPolicy
    ) -> None:
        self.store = store
        self._prefix = f"{corpus_prefix.rstrip('/')}/tokens"
        self._renderer, self._policy = renderer, policy
        self._tokeniser = ShardTokeniser(store=store, renderer=renderer, policy=policy)
        self._fingerprint = renderer.fingerprint

    def key_of(self, shard: CorpusShard) -> str:
        identity = [shard.sha256, self._fingerprint, self._policy.max_length, self._policy.overlong]
        return f"{self._prefix}/{name_of(identity)}.parquet"

    def index_key(self, shards: Sequence[CorpusShard]) -> str:
        return f"{self._prefix}/index-{name_of([self.key_of(shard) for shard in shards])}.parquet"

    def ensure(
        self,
        shards: Sequence[CorpusShard],
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 1,
        advance: Callable[[int], None] | None = None,
        patience_seconds: float = 3600,
    ) -> TokenIndex:
        """The rows of ``shards`` as tokens in the bucket; each rank makes its share and waits for the others'.

        Waiting polls the bucket instead of a collective, so tokenising can never trip a collective's time-out
        (https://github.com/huggingface/accelerate/issues/2528).

        Args:
            workers: processes that tokenise this rank's share.
            advance: called with the number of conversations that became available.

        Raises:
            StreamError: a corpus shard differs from its manifest, or another rank's share did not appear in time.
        """
        index = self.find(shards)
        if index is not None:
            logger.info(f"the tokens of all {len(shards)} shards are there: nothing is tokenised")
            return index
        todo = []
        for shard in shards[rank::world_size]:
            if not self.store.exists(self.key_of(shard)):
                todo.append((shard, self.key_of(shard)))
            elif advance:
                advance(shard.records)
        made = self._tokeniser.run_all(todo, workers=workers, advance=advance)
        logger.info(f"tokenised {len(todo)} shards of {len(shards[rank::world_size])}, the others were there")
        deadline = time.monotonic() + patience_seconds
        if rank == 0:
            for shard in shards:
                wait_for(self.store, self.key_of(shard), deadline, f"tokens of {self.store.uri(shard.key)}")
            index = self._indexed(shards, made)
            self.store.put_bytes(self.index_key(shards), index.to_bytes())
        else:
            wait_for(self.store, self.index_key(shards), deadline, "index of the tokens")
            index = TokenIndex.from_bytes(self.store.get_bytes(self.index_key(shards)))
        return index

    def find(self, shards: Sequence[CorpusShard]) -> TokenIndex | None:
        """The index of shards that were tokenised before, or None."""
        try:
            return TokenIndex.from_bytes(self.store.get_bytes(self.index_key(shards)))
        except ObjectNotFound:
            return None

    def _indexed(self, shards: Sequence[CorpusShard], made: Mapping[str, TokenIndex]) -> TokenIndex:
        keys = [self.key_of(shard) for shard in shards]
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE, thread_name_prefix="footers") as threads:
            return TokenIndex.joined(list(threads.map(lambda key: made.get(key) or self._footer(key), keys)))

    def _footer(self, key: str) -> TokenIndex:
        """The index of a token shard that another process wrote."""
        with io.BufferedReader(self.store.open(key, ahead=False), buffer_size=1 << 20) as reader:
            return index_of_shard(reader, key, self.store.uri(key))


def wait_for(store: ObjectStore, key: str, deadline: float, what: str) -> None:
    """Until another rank has written an object.

    Raises:
        StreamError: it did not come before the deadline, on the clock of ``time.monotonic``.
    """
    began = time.monotonic()
    while not store.exists(key):
        if time.monotonic() > deadline:
            raise StreamError(
                f"waited {max(0, deadline - began):.0f} s for another rank to write the {what} ({store.uri(key)}); "
                "look at the other ranks' logs, then start again: finished shards are kept"
            )
        time.sleep(0.5)


def name_of(identity: Sequence[Any]) -> str:
    """The name of an object that depends on exactly this."""
    return hashlib.sha256(json.dumps([FORMAT_VERSION, *identity]).encode()).hexdigest()[:40]
