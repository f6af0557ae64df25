"""Tokenising once: every row counted, reused by the next run, refused when the corpus is not what it should be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from training_ready.storage.disk_cache import DiskCache
from training_ready.storage.objects import ObjectStore
from training_ready.stream.assemble import Order, Part, pack_reader
from training_ready.stream.blocks import BLOCK_ROWS, BlockReader
from training_ready.stream.dataset import pack_stream
from training_ready.stream.index import TokenIndex, wanted_cells
from training_ready.stream.shards import StreamError
from training_ready.stream.token_set import TokenSet
from training_ready.stream.tokens import Share, TokenCache

from ..corpora import blocks_in, put_shard
from .conftest import numbered_conversation

KEY = "final_dataset/numbers/train/shard-0.parquet"


def tokens_of(store: ObjectStore, index: TokenIndex) -> TokenSet:
    return TokenSet(name="numbers", store=store, prefix="final_dataset/numbers/tokens", index=index)


def test_rows_come_back_as_they_were_rendered(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    rows = [numbered_conversation(n) for n in range(BLOCK_ROWS + 5)]
    cache = make_cache()
    index = cache.ensure([put_shard(store, KEY, rows)])
    assert index.block_rows.tolist() == [BLOCK_ROWS, 5]
    reader = BlockReader(store, tokens_of(store, index))
    read = [reader.read(block).row(row) for block in (0, 1) for row in range(index.block_rows[block])]
    for row, conversation in zip(rows[::97], read[::97], strict=True):
        rendered = cache._renderer.render(row["messages"])
        assert conversation.input_ids.tolist() == rendered.input_ids.tolist()
        assert conversation.learned.tolist() == rendered.learned.tolist()
    assert index.counts.rows == len(rows)
    assert index.counts.tokens == index.lengths.sum() == sum(len(row.input_ids) for row in read)
    assert index.learned.tolist() == [int(row.learned.sum()) for row in read]


def test_rows_know_where_they_come_from(store: ObjectStore, make_cache: Callable[..., TokenCache]) -> None:
    marked = '{"components": ["voice_blending", "bias_detection"]}'
    shards = [
        put_shard(store, KEY, [numbered_conversation(1), numbered_conversation(2, source="other")]),
        put_shard(store, f"{KEY}.b", [numbered_conversation(3, source="other", metadata=marked)]),
    ]
    index = make_cache().ensure(shards)
    found = [index.cells[cell] for cell in index.cell_of_row]
    assert [cell.source for cell in found] == ["numbers", "other", "other"]
    assert found[2].components == ("bias_detection", "voice_blending")
    assert [found[2]] == [index.cells[cell] for cell in wanted_cells(index, components=["voice_blending"])]
    assert wanted_cells(index, sources=["other"], components=["journaling_system"]) == frozenset()


def test_the_second_run_reads_tokens_and_writes_nothing(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    shard = put_shard(store, KEY, [numbered_conversation(n) for n in range(10)])
    make_cache().ensure([shard])
    first = {info.key: info.etag for info in store.list("final_dataset/numbers/tokens/")}
    store.delete(KEY)  # a second run does not even need the text
    make_cache().ensure([shard])
    assert {info.key: info.etag for info in store.list("final_dataset/numbers/tokens/")} == first
    assert len(first) == 2  # the tokens, and the index of their rows


def test_a_node_with_a_disk_cache_never_fetches_what_it_wrote(
    store: ObjectStore, make_cache: Callable[..., TokenCache], tmp_path: Path
) -> None:
    cached = store.with_cache(DiskCache(folder=tmp_path, budget_bytes=1 << 28))
    cache = make_cache()
    shard = put_shard(store, KEY, [numbered_conversation(n) for n in range(50)])
    cache = TokenCache(
        store=cached,
        corpus_prefix="final_dataset/numbers",
        renderer=cache._renderer,
        policy=cache._policy,
    )
    index = cache.ensure([shard])
    fetched = cached.traffic.cost().bytes
    assert fetched >= shard.bytes
    assert len(BlockReader(cached, tokens_of(cached, index)).read(0)) == 50
    assert cached.traffic.cost().bytes == fetched


def test_a_block_costs_its_own_bytes_once(store: ObjectStore, make_cache: Callable[..., TokenCache]) -> None:
    shard = put_shard(store, KEY, [numbered_conversation(n) for n in range(2 * BLOCK_ROWS)])
    index = make_cache().ensure([shard])
    reader = BlockReader(store, tokens_of(store, index))
    reader.read(0)
    before = store.traffic.cost()
    reader.read(1)
    after = store.traffic.cost()
    assert after.bytes - before.bytes == index.block_bytes[1] == reader.bytes_read - index.block_bytes[0]
    assert after.requests - before.requests == 1


def test_another_length_policy_or_role_means_other_tokens(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    shard = put_shard(store, KEY, [numbered_conversation(1)])
    caches = [make_cache(), make_cache(max_length=64), make_cache(overlong="drop"), make_cache(role="user")]
    assert len({cache.blocks_of([shard])[0].key for cache in caches}) == 4


def test_long_rows_are_counted_whatever_becomes_of_them(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    shard = put_shard(store, KEY, [numbered_conversation(n) for n in range(40)])
    lengths = make_cache(max_length=4096).ensure([shard]).lengths
    limit = int(sorted(lengths)[20])
    over = [int(n) for n in lengths if n > limit]
    assert over

    cut = make_cache(max_length=limit).ensure([shard])
    assert (cut.counts.truncated_rows, cut.counts.truncated_tokens) == (
        len(over),
        sum(over) - limit * len(over),
    )
    assert max(cut.lengths) == limit
    dropped = make_cache(max_length=limit, overlong="drop").ensure([shard]).counts
    assert (dropped.dropped_rows, dropped.dropped_tokens) == (len(over), sum(over))
    assert dropped.rows + dropped.dropped_rows == 40
    with pytest.raises(StreamError, match=f"more than max_length {limit}"):
        make_cache(max_length=limit, overlong="error").ensure([shard])


def test_a_row_cut_before_its_first_learned_token_is_dropped_not_trained(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    counts = make_cache(max_length=4).ensure([put_shard(store, KEY, [numbered_conversation(1)])]).counts
    assert (counts.rows, counts.dropped_rows) == (0, 1)


def test_a_changed_shard_is_refused(store: ObjectStore, make_cache: Callable[..., TokenCache]) -> None:
    shard = put_shard(store, KEY, [numbered_conversation(1)])
    put_shard(store, KEY, [numbered_conversation(2)])
    with pytest.raises(StreamError, match=r"the object was changed after the build"):
        make_cache().ensure([shard])


def test_a_missing_shard_is_named(store: ObjectStore, make_cache: Callable[..., TokenCache]) -> None:
    shard = put_shard(store, KEY, [numbered_conversation(1)])
    store.delete(KEY)
    with pytest.raises(StreamError, match=KEY):
        make_cache().ensure([shard])


def test_a_client_among_therapists_is_refused(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    rows = [numbered_conversation(1), numbered_conversation(2, role="user")]
    with pytest.raises(StreamError, match=r"its target role is 'user'"):
        make_cache().ensure([put_shard(store, KEY, rows)])


def test_ranks_share_the_work_and_wait_for_each_other(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    shards = [put_shard(store, f"{KEY}.{i}", [numbered_conversation(i)]) for i in range(3)]
    done: list[int] = []
    share = Share(world_size=2, advance=done.append, patience_seconds=0)
    with pytest.raises(StreamError, match="waited 0 s for another rank"):
        make_cache().ensure(shards, share)
    assert len(done) == 2  # shards 0 and 2 are rank 0's
    with pytest.raises(StreamError, match="index of the tokens"):  # which rank 0 writes
        make_cache().ensure(shards, replace(share, rank=1))
    assert len(done) == 3
    assert make_cache().ensure(shards, Share(world_size=2)).block_rows.tolist() == [1, 1, 1]
    assert make_cache().ensure(shards, Share(rank=1, world_size=2)).rows == 3


def test_the_corpus_room_needs_no_torch() -> None:
    code = "import sys, training_ready.corpus.manifest; sys.exit(any(m in sys.modules for m in ('torch', 'trl')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_early_beginning_tokenises_what_is_asked_for(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    shards = [
        put_shard(store, f"{KEY}.{i}", [numbered_conversation(20 * i + n) for n in range(20)], 5)
        for i in range(3)
    ]
    early = make_cache().begin("numbers", shards, 3)
    assert (blocks_in(store, "numbers"), early.rounds, early.blocks, early.complete) == (1, [1], 12, False)
    early.grow()
    early.grow()
    assert (blocks_in(store, "numbers"), early.rounds) == (4, [1, 2, 4])
    while not early.complete:
        early.grow()
    assert early.rounds == [1, 2, 4, 8, 12]
    # The next run finds all of it, in the same order; and so does one that wants it in the corpus's order.
    again = make_cache().begin("numbers", shards, 3)
    assert (again.complete, again.rounds, again.fingerprint) == (True, early.rounds, early.fingerprint)
    assert again.index.blocks == early.index.blocks
    assert again.index.lengths.tolist() == early.index.lengths.tolist()
    for info in list(store.list(KEY)):
        store.delete(info.key)
    whole = make_cache().ensure(shards)
    assert whole.fingerprint == early.fingerprint
    assert sorted(whole.lengths.tolist()) == sorted(early.index.lengths.tolist())
    assert whole.counts == early.index.counts


def test_ranks_that_begin_early_find_the_same_rounds(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    shards = [put_shard(store, f"{KEY}.{i}", [numbered_conversation(i)] * 4, 1) for i in range(3)]

    def rank(number: int) -> list[list[int]]:
        tokens = make_cache().begin(
            "numbers", shards, 5, Share(rank=number, world_size=3, patience_seconds=60)
        )
        while not tokens.complete:
            tokens.grow()
        return [tokens.rounds, tokens.index.lengths.tolist()]

    with ThreadPoolExecutor(3) as ranks:
        one, two, three = ranks.map(rank, range(3))
    assert one == two == three
    assert one[0] == [1, 2, 4, 8, 12]


def test_a_row_that_cannot_be_trained_stops_the_round_it_is_in(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    rows = [numbered_conversation(n, role="user" if n == 29 else "assistant") for n in range(40)]
    shard = put_shard(store, KEY, rows, 5)
    packs = pack_reader(
        {"data": Part(tokens=make_cache().begin("numbers", [shard], 3))}, Order(max_length=128, seed=3)
    )
    with pytest.raises(StreamError, match="its target role is 'user'"):
        list(islice(pack_stream(packs), 100))


def test_a_block_whose_rows_were_all_dropped_is_no_gap(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    lengths = make_cache(max_length=4096).ensure(
        [put_shard(store, KEY, [numbered_conversation(n) for n in range(9)])]
    )
    limit = int(min(lengths.lengths[3:6])) - 1
    shard = put_shard(store, f"{KEY}.b", [numbered_conversation(n) for n in range(9)], 3)
    index = make_cache(max_length=limit, overlong="drop").ensure([shard])
    assert index.block_rows[1] == 0
    assert index.rows + index.counts.dropped_rows == 9
    again = make_cache(max_length=limit, overlong="drop").find([shard])
    assert again is not None
    assert again.block_rows.tolist() == index.block_rows.tolist()
