"""Tokenising once: every row counted, reused by the next run, refused when the corpus is not what it should be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from training_ready.storage.disk_cache import DiskCache
from training_ready.storage.objects import ObjectStore
from training_ready.stream.blocks import BLOCK_ROWS, BlockReader
from training_ready.stream.index import wanted_cells
from training_ready.stream.shards import StreamError
from training_ready.stream.tokens import TokenCache

from .conftest import numbered_conversation, put_shard

KEY = "final_dataset/numbers/train/shard-0.parquet"


def test_rows_come_back_as_they_were_rendered(
    store: ObjectStore, make_cache: Callable[..., TokenCache]
) -> None:
    rows = [numbered_conversation(n) for n in range(BLOCK_ROWS + 5)]
    cache = make_cache()
    index = cache.ensure([put_shard(store, KEY, rows)])
    assert index.block_rows.tolist() == [BLOCK_ROWS, 5]
    reader = BlockReader(store, index)
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
        store=cached, corpus_prefix="final_dataset/numbers", renderer=cache._renderer, policy=cache._policy
    )
    index = cache.ensure([shard])
    fetched = cached.traffic.cost().bytes
    assert fetched >= shard.bytes
    assert len(BlockReader(cached, index).read(0)) == 50
    assert cached.traffic.cost().bytes == fetched


def test_a_block_costs_its_own_bytes_once(store: ObjectStore, make_cache: Callable[..., TokenCache]) -> None:
    shard = put_shard(store, KEY, [numbered_conversation(n) for n in range(2 * BLOCK_ROWS)])
    index = make_cache().ensure([shard])
    reader = BlockReader(store, index)
    reader.read(0)
    before = store.traffic.cost()
    reader.read(1)
    after = store.traffic.cost()
    assert after.bytes - before.bytes == index.block_bytes[1] == reader.bytes_read - index.block_bytes[0]
    assert after.requests - before.requests == 1


def test_another_length_policy_or_role_means_other_tokens(make_cache: Callable[..., TokenCache]) -> None:
    class Named:
        key, sha256, records = KEY, "0" * 64, 1

    caches = [make_cache(), make_cache(max_length=64), make_cache(overlong="drop"), make_cache(role="user")]
    assert len({cache.key_of(Named()) for cache in caches}) == 4


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
    with pytest.raises(StreamError, match="waited 0 s for another rank"):
        make_cache().ensure(shards, rank=0, world_size=2, advance=done.append, patience_seconds=0)
    assert len(done) == 2  # shards 0 and 2 are rank 0's
    with pytest.raises(StreamError, match="index of the tokens"):  # which rank 0 writes
        make_cache().ensure(shards, rank=1, world_size=2, advance=done.append, patience_seconds=0)
    assert len(done) == 3
    assert make_cache().ensure(shards, rank=0, world_size=2).shard_blocks == (1, 1, 1)
    assert make_cache().ensure(shards, rank=1, world_size=2).rows == 3


def test_the_corpus_room_needs_no_torch() -> None:
    code = "import sys, training_ready.corpus.manifest; sys.exit(any(m in sys.modules for m in ('torch', 'trl')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
