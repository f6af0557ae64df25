"""The order of packs: every row once an epoch, equal on every number of ranks, resumed exactly at any position."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import pytest
from datasets import IterableDataset

from training_ready.storage.objects import ObjectStore
from training_ready.stream.dataset import pack_stream
from training_ready.stream.order import block_groups
from training_ready.stream.plan import PackPlan
from training_ready.stream.shards import StreamError
from training_ready.stream.tokens import TokenCache, TokenShard

from .conftest import numbered_conversation, put_shard

CAPACITY = 128


def plan_of(shards: list[TokenShard], **changes: Any) -> PackPlan:
    return PackPlan(shards, **{"max_length": CAPACITY, "seed": 3, "blocks_per_group": 2, **changes})


def rows_in(packs: Iterable[dict[str, Any]], tokenizer: Any) -> list[int]:
    return [
        int(n)
        for pack in packs
        for n in re.findall(r"row (\d+) :", tokenizer.decode(pack["input_ids"].tolist()))
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_two_epochs_hold_every_row_exactly_twice(
    token_shards: list[TokenShard], tokenizer: Any, packing: bool
) -> None:
    plan = plan_of(token_shards, packing=packing)
    stream = iter(pack_stream(plan))
    epochs = [rows_in(islice(stream, plan.packs_in_epoch(epoch)), tokenizer) for epoch in (0, 1)]
    assert [sorted(rows) for rows in epochs] == [list(range(100))] * 2
    assert epochs[0] != epochs[1] != sorted(epochs[1])


def test_labels_positions_and_lengths_agree(token_shards: list[TokenShard]) -> None:
    for pack in islice(pack_stream(plan_of(token_shards)), 20):
        assert sum(pack["seq_lengths"]) == len(pack["input_ids"]) == len(pack["labels"]) <= CAPACITY
        learned = pack["labels"] != -100
        assert learned.any()
        assert (pack["labels"][learned] == pack["input_ids"][learned]).all()


def test_another_seed_is_another_order_and_the_same_seed_the_same(
    token_shards: list[TokenShard], tokenizer: Any
) -> None:
    orders = [rows_in(islice(pack_stream(plan_of(token_shards, seed=s)), 9), tokenizer) for s in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(
    token_shards: list[TokenShard], tokenizer: Any, world_size: int
) -> None:
    plan = plan_of(token_shards)
    expected = rows_in(islice(pack_stream(plan), 24), tokenizer)
    ranks = [
        list(islice(pack_stream(plan, rank=r, world_size=world_size, micro_batch=2), 24 // world_size))
        for r in range(world_size)
    ]
    together = [
        pack
        for micro in range(24 // world_size // 2)
        for rank in ranks
        for pack in rank[2 * micro : 2 * micro + 2]
    ]
    assert rows_in(together, tokenizer) == expected


@pytest.mark.parametrize("position", [0, 1, 7, 19, 20, 21, 55, 140])
def test_a_stream_from_a_position_goes_on_exactly(
    token_shards: list[TokenShard], tokenizer: Any, position: int
) -> None:
    plan = plan_of(token_shards)
    expected = rows_in(islice(pack_stream(plan), position, position + 12), tokenizer)
    assert rows_in(islice(pack_stream(plan, position=position), 12), tokenizer) == expected


def test_state_dict_resumes_and_is_small(token_shards: list[TokenShard], tokenizer: Any) -> None:
    plan = plan_of(token_shards)
    stream = pack_stream(plan)
    assert isinstance(stream, IterableDataset)
    iterator = iter(stream)
    list(islice(iterator, 11))
    state = stream.state_dict()
    expected = rows_in(islice(iterator, 10), tokenizer)
    fresh = pack_stream(plan)
    fresh.load_state_dict(state)
    assert rows_in(islice(fresh, 10), tokenizer) == expected
    assert len(str(state)) < 400


def test_the_state_of_another_stream_is_refused(token_shards: list[TokenShard]) -> None:
    stream = pack_stream(plan_of(token_shards))
    next(iter(stream))
    other = pack_stream(plan_of(token_shards, seed=9))
    other.load_state_dict(stream.state_dict())
    with pytest.raises(StreamError, match="belongs to another stream"):
        next(iter(other))


def test_a_second_split_is_refused(token_shards: list[TokenShard]) -> None:
    stream = pack_stream(plan_of(token_shards))
    assert stream.num_shards == 1
    with pytest.raises(StreamError, match="a second time"):
        next(iter(stream.shard(2, 0)))
    with pytest.raises(StreamError, match="shuffled already"):
        next(iter(stream.shuffle(seed=1)))


def test_datasets_own_verbs_work(token_shards: list[TokenShard]) -> None:
    stream = pack_stream(plan_of(token_shards)).map(lambda pack: {"tokens": len(pack["input_ids"])}).take(3)
    assert [item["tokens"] for item in stream] == [len(p["input_ids"]) for p in stream]


def test_counts_of_a_stretch_are_those_of_its_packs(token_shards: list[TokenShard], tokenizer: Any) -> None:
    plan = plan_of(token_shards)
    packs = list(islice(pack_stream(plan), 70))
    counts = plan.count(70)
    assert counts.packs == 70
    assert counts.rows == len(rows_in(packs, tokenizer))
    assert counts.tokens == sum(len(pack["input_ids"]) for pack in packs)
    assert counts.learned_tokens == sum(int((pack["labels"] != -100).sum()) for pack in packs)


def test_only_the_wanted_stages(
    store: ObjectStore, make_cache: Callable[..., TokenCache], tokenizer: Any
) -> None:
    rows = [
        numbered_conversation(n, stage=["stage1_foundation", "stage4_voice_persona"][n % 2])
        for n in range(30)
    ]
    shards = make_cache().ensure([put_shard(store, "final_dataset/numbers/train/s.parquet", rows)])
    plan = plan_of(shards, stages=["stage4_voice_persona"])
    seen = rows_in(islice(pack_stream(plan), plan.packs_in_epoch(0)), tokenizer)
    assert sorted(seen) == list(range(1, 30, 2))
    with pytest.raises(StreamError, match="no row to train on"):
        plan_of(shards, stages=["stage3_edge_stress_test"])


def test_every_block_is_read_once_an_epoch() -> None:
    for epoch in range(3):
        groups = block_groups(11, 4, seed=5, epoch=epoch)
        assert sorted(block for group in groups for block in group) == list(range(11))
        assert [len(group) for group in groups] == [4, 4, 3]
