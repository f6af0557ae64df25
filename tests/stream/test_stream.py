"""Packs from a real bucket: every row once an epoch, equal on every number of ranks, resumed exactly anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import pytest
from datasets import IterableDataset

from training_ready.storage.objects import ObjectStore
from training_ready.stream import load
from training_ready.stream.assemble import Order, Part, pack_reader
from training_ready.stream.dataset import pack_stream
from training_ready.stream.groups import PackReader
from training_ready.stream.order import block_groups
from training_ready.stream.shards import StreamError
from training_ready.stream.sight import StreamSight

from ..corpora import blocks_in, put_corpus, put_shard
from .conftest import numbered_conversation

CAPACITY = 128
ReadPacks = Callable[..., PackReader]


def rows_in(packs: Iterable[dict[str, Any]], tokenizer: Any) -> list[int]:
    return [
        int(n)
        for pack in packs
        for n in re.findall(r"row (\d+) :", tokenizer.decode(pack["input_ids"].tolist()))
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_two_epochs_hold_every_row_exactly_twice(
    read_packs: ReadPacks, tokenizer: Any, packing: bool
) -> None:
    packs = read_packs(packing=packing, epochs=2, lanes=3)
    rows = rows_in(pack_stream(packs, global_batch=9), tokenizer)
    assert sorted(rows) == sorted([*range(100), *range(100)])
    assert rows[:100] != sorted(rows[:100])


def test_the_last_batch_is_filled_with_empty_packs(read_packs: ReadPacks) -> None:
    packs = read_packs(epochs=1)
    full = packs.plan.packs_per_pass
    found = list(pack_stream(packs, global_batch=full - 1))
    assert len(found) == 2 * (full - 1)
    assert all((pack["labels"] == -100).all() for pack in found[full:])
    assert [len(pack["input_ids"]) for pack in found[full:]] == [1] * (full - 2)
    assert len(list(pack_stream(packs, global_batch=full - 1, fill_last_batch=False))) == full


def test_labels_positions_and_lengths_agree(read_packs: ReadPacks) -> None:
    for pack in islice(pack_stream(read_packs()), 20):
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) == len(pack["labels"]) <= CAPACITY
        learned = pack["labels"] != -100
        assert learned.any()
        assert (pack["labels"][learned] == pack["input_ids"][learned]).all()


def test_another_seed_is_another_order_and_the_same_seed_the_same(
    read_packs: ReadPacks, tokenizer: Any
) -> None:
    orders = [rows_in(islice(pack_stream(read_packs(seed=s)), 9), tokenizer) for s in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(
    read_packs: ReadPacks, tokenizer: Any, world_size: int
) -> None:
    packs = read_packs(lanes=4)
    expected = list(islice(pack_stream(packs, global_batch=12), 36))
    ranks = [
        list(islice(pack_stream(packs, global_batch=12, rank=r, world_size=world_size), 36 // world_size))
        for r in range(world_size)
    ]
    mine = 12 // world_size
    for step in range(3):
        together = [pack for rank in ranks for pack in rank[step * mine : (step + 1) * mine]]
        assert rows_in(together, tokenizer) == rows_in(expected[step * 12 : (step + 1) * 12], tokenizer)


@pytest.mark.parametrize("position", [0, 1, 7, 19, 20, 21, 55, 140, 10_000_000])
def test_a_stream_from_a_position_goes_on_exactly(
    read_packs: ReadPacks, tokenizer: Any, position: int
) -> None:
    stream = iter(pack_stream(read_packs(), position=position))
    first = rows_in(islice(stream, 5), tokenizer)
    rest = rows_in(islice(stream, 7), tokenizer)
    assert rows_in(islice(pack_stream(read_packs(), position=position), 12), tokenizer) == first + rest
    assert rows_in(islice(pack_stream(read_packs(), position=position + 5), 7), tokenizer) == rest


def test_state_dict_resumes_and_is_small(read_packs: ReadPacks, tokenizer: Any) -> None:
    stream = pack_stream(read_packs(), global_batch=4)
    assert isinstance(stream, IterableDataset)
    iterator = iter(stream)
    list(islice(iterator, 11))
    state = stream.state_dict()
    expected = rows_in(islice(iterator, 10), tokenizer)
    fresh = pack_stream(read_packs(), global_batch=4)
    fresh.load_state_dict(state)
    assert rows_in(islice(fresh, 10), tokenizer) == expected
    assert len(str(state)) < 400


def test_a_state_between_global_batches_serves_another_number_of_ranks(
    read_packs: ReadPacks, tokenizer: Any
) -> None:
    packs = read_packs(lanes=2)
    whole = rows_in(islice(pack_stream(packs, global_batch=4), 4, 8), tokenizer)
    half = pack_stream(packs, global_batch=4, rank=0, world_size=2)
    list(islice(iter(half), 2))
    alone = pack_stream(packs, global_batch=4)
    alone.load_state_dict(half.state_dict())
    assert rows_in(islice(alone, 4), tokenizer) == whole

    list(islice(iter(half), 1))
    torn = pack_stream(packs, global_batch=4)
    torn.load_state_dict(half.state_dict())
    with pytest.raises(StreamError, match="only between global batches"):
        next(iter(torn))


def test_the_state_of_another_stream_is_refused(read_packs: ReadPacks) -> None:
    stream = pack_stream(read_packs())
    next(iter(stream))
    other = pack_stream(read_packs(seed=9))
    other.load_state_dict(stream.state_dict())
    with pytest.raises(StreamError, match="belongs to another stream"):
        next(iter(other))


def test_a_second_split_is_refused(read_packs: ReadPacks) -> None:
    stream = pack_stream(read_packs())
    assert stream.num_shards == 1
    with pytest.raises(StreamError, match="a second time"):
        next(iter(stream.shard(2, 0)))
    with pytest.raises(StreamError, match="shuffled already"):
        next(iter(stream.shuffle(seed=1)))


def test_datasets_own_verbs_work(read_packs: ReadPacks) -> None:
    stream = pack_stream(read_packs()).map(lambda pack: {"tokens": len(pack["input_ids"])}).take(3)
    assert [item["tokens"] for item in stream] == [len(p["input_ids"]) for p in stream]


def test_groups_stay_in_memory_while_a_lane_stands_in_them(read_packs: ReadPacks) -> None:
    packs = read_packs(lanes=2, epochs=3)
    for _ in pack_stream(packs, global_batch=2):
        pass
    # Two groups, of two blocks and of one; nothing is fetched again while a lane needs it.
    assert sum(reader.blocks_read for reader in packs._readers) <= 3 * 3


def test_the_packs_of_a_plan_are_counted_once_and_remembered(
    read_packs: ReadPacks, store: ObjectStore
) -> None:
    first = read_packs().plan
    [kept] = [info.key for info in store.list("final_dataset/numbers/tokens/packs-")]
    assert read_packs().plan.fingerprint == first.fingerprint
    store.put_bytes(kept, b"[1, 1]")
    with pytest.raises(StreamError, match=r"a count in the bucket says 1\. Delete"):
        list(islice(pack_stream(read_packs()), 3))


def test_the_figures_of_a_log_are_those_of_its_packs(read_packs: ReadPacks) -> None:
    packs = read_packs()
    sight = StreamSight(packs, CAPACITY, 0)
    seen = list(islice(pack_stream(packs), 12))
    figures = sight.since_last_log(12)
    tokens = sum(len(pack["input_ids"]) for pack in seen)
    assert figures["stream/tokens/numbers"] == tokens
    assert figures["stream/fill"] == round(tokens / (12 * CAPACITY), 4)
    assert figures["stream/epochs/data"] == round(12 / packs.plan.packs_per_pass, 4)
    assert figures["stream/fetched_mb"] == round(packs.bytes_read / 1e6, 3) > 0
    assert 0 < figures["stream/wait_share"] <= 1
    assert figures["stream/retries"] == figures["stream/cache_hits"] == 0


def test_every_block_is_read_once_an_epoch() -> None:
    import numpy as np

    groups = block_groups(np.arange(11), 4, seed=5)
    assert sorted(block for group in groups for block in group) == list(range(11))
    assert [len(group) for group in groups] == [4, 4, 3]


def test_the_first_packs_come_when_a_block_is_tokenised(
    store: ObjectStore, make_cache: Callable[..., Any], tokenizer: Any
) -> None:
    shards = [
        put_shard(
            store, f"early/train/{i}.parquet", [numbered_conversation(50 * i + n) for n in range(50)], 10
        )
        for i in range(2)
    ]
    order = Order(max_length=CAPACITY, seed=3, blocks_per_group=2, lanes=2)

    def packs() -> PackReader:
        tokens = make_cache().begin("numbers", shards, 3)
        return pack_reader({"data": Part(tokens=tokens)}, order)

    def tokenised() -> int:
        return blocks_in(store, "numbers")

    first = packs()
    stream = iter(pack_stream(first, global_batch=2))
    seen = list(islice(stream, 1))
    assert tokenised() < 10
    seen += islice(stream, 150)
    assert tokenised() == 10
    per_pass = first.plan.packs_per_pass
    assert sorted(rows_in(seen[:per_pass], tokenizer)) == list(range(100))
    assert sorted(rows_in(seen[per_pass : 2 * per_pass], tokenizer)) == list(range(100))
    # From the tokens in the bucket, and resumed in the middle of a round, the same packs come.
    for start in (0, 6):
        again = islice(pack_stream(packs(), global_batch=2, position=start), 151 - start)
        assert [pack["input_ids"].tolist() for pack in again] == [
            pack["input_ids"].tolist() for pack in seen[start:]
        ]


def test_load_begins_early_where_nothing_has_to_be_counted(store: ObjectStore, tokenizer: Any) -> None:
    manifest = put_corpus(store, "early", {"train": [numbered_conversation(n) for n in range(60)]}, 10)
    early = load(manifest, tokenizer, max_length=CAPACITY, settings=store.settings)
    next(iter(early))
    assert 1 <= blocks_in(store, "early") < 6
    counted = load(manifest, tokenizer, max_length=CAPACITY, settings=store.settings, epochs=1)
    assert sorted(rows_in(counted, tokenizer)) == list(range(60))
