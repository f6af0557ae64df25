"""The order of packs as pure arithmetic: for any corpus, mixture, number of ranks and place to stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training_ready.stream.assemble import Order, Part, pack_reader
from training_ready.stream.index import Cell, TokenIndex
from training_ready.stream.lengths import TokenCounts
from training_ready.stream.order import early_rounds
from training_ready.stream.plan import PackPlan, lanes_for, positions
from training_ready.stream.shards import StreamError
from training_ready.stream.token_set import TokenSet

CAPACITY = 64


def index_of(rows_per_block: Sequence[int], *, cells: int = 1, name: str = "x", seed: int = 0) -> TokenIndex:
    random = np.random.default_rng(seed)
    rows = sum(rows_per_block)
    lengths = random.integers(1, CAPACITY + 1, rows).astype(np.int32)
    return TokenIndex(
        blocks=tuple(f"{name}-{number}" for number in range(len(rows_per_block))),
        block_rows=np.asarray(rows_per_block, dtype=np.int64),
        block_bytes=np.asarray(rows_per_block, dtype=np.int64) * 100,
        lengths=lengths,
        learned=(lengths // 2).astype(np.int32),
        cell_of_row=np.arange(rows).astype(np.int16) % cells,
        cells=tuple(Cell(f"source{n}", "stage1_foundation") for n in range(cells)),
        counts=TokenCounts(rows=rows, tokens=int(lengths.sum())),
    )


def part_of(index: TokenIndex, **choice: Any) -> Part:
    return Part(tokens=TokenSet(name="x", store=None, prefix="x", index=index), **choice)


class _NoBucket:
    def get_bytes(self, key: str) -> bytes:
        from training_ready.storage.objects import ObjectNotFound

        raise ObjectNotFound(key)


def plan_of(parts: dict[str, Part], **order: Any) -> PackPlan:
    for part in parts.values():
        part.tokens.store = _NoBucket()  # type: ignore[assignment]
    settled = Order(**{"max_length": CAPACITY, "seed": 3, "blocks_per_group": 2, **order})
    return pack_reader(parts, settled, remember=False).plan


def rows_at(plan: PackPlan, many: Sequence[int]) -> list[tuple[int, int]]:
    """(part, row) of every row of the packs at these positions."""
    found = []
    for position in many:
        address = plan.address(position)
        if address is not None:
            found += [(address.part, row) for row in plan.rows(address).tolist()]
    return found


blocks = st.lists(st.integers(1, 40), min_size=1, max_size=12)
world = st.integers(1, 64)


@st.composite
def mixtures(draw: st.DrawFn) -> dict[str, Part]:
    """One to four parts, some of one corpus and disjoint, some of several, some of them limited."""
    parts = {}
    shared = index_of(draw(blocks), cells=2, name="shared")
    weighted = draw(st.booleans())
    for number in range(draw(st.integers(1, 4))):
        weight = draw(st.floats(0.1, 5)) if weighted else None
        limit = draw(st.one_of(st.none(), st.floats(0.5, 2)))
        if number < 2 and len(shared.lengths) > 1:
            chosen = part_of(shared, sources=[f"source{number}"], weight=weight, max_epochs=limit)
        else:
            own = index_of(draw(blocks), name=f"own{number}", seed=number)
            chosen = part_of(own, weight=weight, max_epochs=limit)
        parts[f"part{number}"] = chosen
    return parts


@given(blocks, st.integers(1, 3), st.booleans(), st.sampled_from([1, 2, 3, 8, 16]), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_epochs_hold_every_row_exactly_as_often(
    per_block: list[int], epochs: int, packing: bool, lanes: int, batches: int
) -> None:
    index = index_of(per_block)
    plan = plan_of({"data": part_of(index)}, lanes=lanes, packing=packing, epochs=epochs)
    global_batch = lanes * batches
    steps = plan.steps(global_batch)
    assert steps is not None
    seen = Counter(rows_at(plan, range(steps * global_batch)))
    assert seen == {(0, row): epochs for row in range(index.rows)}
    # The last global batch is begun only if there is something to train in it.
    assert plan.address((steps - 1) * global_batch) is not None


@given(mixtures(), world, st.integers(1, 4), st.integers(0, 5), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_ranks_share_out_each_global_batch_and_a_stop_changes_nothing(
    parts: dict[str, Part], world_size: int, per_rank: int, step: int, far: int
) -> None:
    global_batch = world_size * per_rank
    plan = plan_of(parts, lanes=lanes_for(global_batch))
    for at in (step, far):
        batch = [
            position
            for rank in range(world_size)
            for position in plan.share(at, rank=rank, world_size=world_size, global_batch=global_batch)
        ]
        assert sorted(batch) == list(range(at * global_batch, (at + 1) * global_batch))
    # Resumed at a step = uninterrupted, from plans that know nothing of each other.
    fresh = plan_of(parts, lanes=lanes_for(global_batch))
    for rank in (0, world_size - 1):
        share = {"rank": rank, "world_size": world_size, "global_batch": global_batch}
        whole = islice(positions(plan, start=0, **share), step * per_rank, (step + 2) * per_rank)
        resumed = islice(positions(fresh, start=step * global_batch, **share), 2 * per_rank)
        assert [plan.address(p) for p in whole] == [fresh.address(p) for p in resumed]


@given(mixtures(), st.sampled_from([1, 2, 4, 12]), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_counts_are_those_of_the_packs(parts: dict[str, Part], lanes: int, position: int) -> None:
    plan = plan_of(parts, lanes=lanes)
    counts = plan.count(position)
    seen = Counter(rows_at(plan, range(position)))
    packs = Counter(address.part for p in range(position) if (address := plan.address(p)))
    for number, (name, line) in enumerate(plan.parts.items()):
        rows = [row for (part, row), times in seen.items() for _ in range(times) if part == number]
        assert counts[name].packs == packs[number]
        assert counts[name].rows == len(rows)
        assert counts[name].tokens == int(line.index.lengths[rows].sum())
        assert counts[name].learned_tokens == int(line.index.learned[rows].sum())


@given(mixtures(), st.sampled_from([1, 3, 8]))
@settings(max_examples=40, deadline=None)
def test_a_limited_part_is_used_up_exactly(parts: dict[str, Part], lanes: int) -> None:
    limited = {name: part for name, part in parts.items() if part.max_epochs is not None}
    if not limited:
        return
    plan = plan_of(limited, lanes=lanes)
    last = plan.last_position()
    assert last is not None
    packs = Counter(address.part for p in range(last + 2 * lanes) if (address := plan.address(p)))
    for number, (part, line) in enumerate(zip(limited.values(), plan.lines, strict=True)):
        assert packs[number] == np.ceil(float(part.max_epochs or 0) * line.packs_per_epoch)
    assert plan.address(last - 1) is not None


@given(
    st.lists(st.floats(0.02, 1), min_size=2, max_size=6),
    st.integers(0, 30_000),
    st.sampled_from([1, 2, 5, 8, 16, 55, 64]),
    st.sampled_from(["tokens", "rows"]),
)
@settings(max_examples=30, deadline=None)
def test_any_thousand_packs_hold_the_wanted_shares(
    weights: list[float], start: int, lanes: int, by: str
) -> None:
    parts = {f"p{n}": part_of(index_of([400], name=f"p{n}", seed=n), weight=w) for n, w in enumerate(weights)}
    plan = plan_of(parts, lanes=lanes, by=by)
    before, after = (plan.count(p).values() for p in (start, start + 1000))
    column = {"rows": 0, "tokens": 1}[by]
    per_pack = [line.epoch_counts[:, column].sum() / line.packs_per_epoch for line in plan.lines]
    packs = np.array([b.packs - a.packs for a, b in zip(before, after, strict=True)])
    amounts = packs * per_pack
    assert packs.sum() == 1000
    assert np.abs(amounts / amounts.sum() - np.array(weights) / sum(weights)).max() < 0.01


def test_a_thousand_packs_hold_their_share_of_real_tokens() -> None:
    parts = {
        name: part_of(index_of([40] * 200, name=name, seed=n), weight=w)
        for n, (name, w) in enumerate([("a", 0.30), ("b", 0.25), ("c", 0.45)])
    }
    plan = plan_of(parts, lanes=8)
    for start in (0, 777, 5_000):
        before, after = plan.count(start), plan.count(start + 1000)
        tokens = np.array([after[name].tokens - before[name].tokens for name in parts])
        assert np.abs(tokens / tokens.sum() - [0.30, 0.25, 0.45]).max() < 0.01


def test_a_curriculum_changes_the_shares_at_its_step() -> None:
    parts = {name: part_of(index_of([300], name=name), weight=1.0) for name in ("plain", "hard")}
    plan = plan_of(parts, lanes=4, curriculum=[(1000, {"hard": 0.0}), (2000, {"plain": 0.0, "hard": 1.0})])
    drawn = [
        Counter(plan.address(p).part for p in range(start, start + 1000))  # type: ignore[union-attr]
        for start in (0, 1000, 2000)
    ]
    assert drawn[0][0] == pytest.approx(500, abs=10)
    assert drawn[1] == {0: 1000}
    assert drawn[2] == {1: 1000}


def test_temperature_evens_parts_out() -> None:
    parts = {"big": part_of(index_of([900], name="b")), "small": part_of(index_of([100], name="s"))}

    def small(temperature: float) -> int:
        plan = plan_of(parts, temperature=temperature)
        return Counter(plan.address(p).part for p in range(1000))[1]  # type: ignore[union-attr]

    assert small(1.0) == pytest.approx(100, abs=20)
    assert small(2.0) == pytest.approx(250, abs=30)
    assert small(100.0) == pytest.approx(497, abs=20)


def test_each_rank_reads_about_its_share() -> None:
    index = index_of([10] * 640)
    plan = plan_of({"data": part_of(index)}, lanes=16, epochs=1)
    steps = plan.steps(64)
    assert steps is not None
    for world_size in (2, 4, 16):
        for rank in range(world_size):
            groups = {
                address.group
                for step in range(steps)
                for p in plan.share(step, rank=rank, world_size=world_size, global_batch=64)
                if (address := plan.address(p))
            }
            assert len(groups) <= 320 / world_size + 2


def test_parts_that_share_rows_are_refused() -> None:
    index = index_of([20], cells=2)
    with pytest.raises(StreamError, match=r"'all' and 'some' both hold the rows of source 'source1'"):
        plan_of({"all": part_of(index), "some": part_of(index, sources=["source1"])})


def test_weights_are_for_all_parts_or_for_none() -> None:
    parts = {"a": part_of(index_of([20], name="a"), weight=1.0), "b": part_of(index_of([20], name="b"))}
    with pytest.raises(StreamError, match="b has no weight and the others have"):
        plan_of(parts)


def test_a_part_that_would_never_be_drawn_is_refused() -> None:
    parts = {name: part_of(index_of([20], name=name), weight=w) for name, w in (("a", 1.0), ("b", 1e-6))}
    with pytest.raises(StreamError, match="b would be less than one pack of 10007"):
        plan_of(parts)


def test_an_empty_part_names_what_there_is() -> None:
    with pytest.raises(StreamError, match=r"nothing: no row is left.*\('source0', 'stage1_foundation'\)"):
        plan_of({"nothing": part_of(index_of([20]), sources=["misspelt"])})


def test_what_does_not_divide_is_refused_with_the_arithmetic() -> None:
    plan = plan_of({"data": part_of(index_of([20]))}, lanes=4)
    with pytest.raises(StreamError, match=r"ranks \(3\) must divide .* 8 = 2 x 3 \+ 2"):
        plan.share(0, rank=0, world_size=3, global_batch=8)
    with pytest.raises(StreamError, match=r"stream.lanes \(4\) must divide"):
        plan.share(0, rank=0, world_size=3, global_batch=6)


def test_the_index_survives_its_bytes() -> None:
    index = index_of([7, 3, 12], cells=3)
    again = TokenIndex.from_bytes(index.to_bytes())
    assert again.cells == index.cells
    assert again.counts == index.counts
    assert again.fingerprint == index.fingerprint
    for name in ("lengths", "learned", "cell_of_row", "block_rows", "block_bytes"):
        assert (getattr(again, name) == getattr(index, name)).all()
        assert getattr(again, name).dtype == getattr(index, name).dtype


def early_tokens(index: TokenIndex, seed: int = 3, *, there: int | None = None) -> TokenSet:
    """The index as a set that grows round by round, of which ``there`` rounds came at once; None: all."""
    order = early_rounds(len(index.blocks), seed=seed)
    there = len(order) if there is None else min(there, len(order))
    return TokenSet(
        name="x",
        store=_NoBucket(),  # type: ignore[arg-type]
        prefix="x",
        index=index.in_order(np.concatenate(order[:there])),
        rounds=np.cumsum([len(one) for one in order[:there]]).tolist(),
        coming=(index.in_order(one) for one in order[there:]),
        blocks=len(index.blocks),
        fingerprint=index.fingerprint,
    )


@given(blocks, st.sampled_from([1, 2, 4, 12]), st.integers(1, 4), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_an_early_order_does_not_depend_on_what_is_there(
    per_block: list[int], lanes: int, there: int, position: int
) -> None:
    index = index_of(per_block, cells=3)
    whole = plan_of({"data": Part(tokens=early_tokens(index))}, lanes=lanes)
    growing = plan_of({"data": Part(tokens=early_tokens(index, there=there))}, lanes=lanes)
    assert growing.fingerprint == whole.fingerprint
    assert growing.address(position) == whole.address(position)
    assert rows_at(growing, range(position)) == rows_at(whole, range(position))
    counted, expected = growing.count(position)["data"], whole.count(position)["data"]
    assert (counted.packs, counted.rows, counted.tokens) == (expected.packs, expected.rows, expected.tokens)


@given(blocks, st.integers(1, 3), st.sampled_from([1, 3, 8]))
@settings(max_examples=40, deadline=None)
def test_early_epochs_hold_every_row_exactly_as_often(per_block: list[int], epochs: int, lanes: int) -> None:
    index = index_of(per_block)
    plan = plan_of({"data": Part(tokens=early_tokens(index, there=1))}, lanes=lanes)
    for epoch in range(epochs):
        first = epoch * plan.packs_per_pass
        rows = rows_at(plan, range(first, first + plan.packs_per_pass))
        assert sorted(rows) == [(0, row) for row in range(index.rows)]


@given(mixtures(), st.sampled_from([1, 3, 8]))
@settings(max_examples=20, deadline=None)
def test_a_choice_of_rows_can_begin_early(parts: dict[str, Part], lanes: int) -> None:
    chosen = parts["part0"]
    tokens = early_tokens(chosen.tokens.index, there=1)
    plan = plan_of({"data": Part(tokens=tokens, sources=chosen.sources)}, lanes=lanes)
    rows = rows_at(plan, range(plan.packs_per_pass))
    names = {tokens.index.cells[tokens.index.cell_of_row[row]].source for _, row in rows}
    assert chosen.sources is None or names == set(chosen.sources)
    assert len(rows) == len(set(rows)) == plan.count(plan.packs_per_pass)["data"].rows


def test_a_pack_waits_for_no_later_round() -> None:
    tokens = early_tokens(index_of([20] * 64), there=1)
    plan = plan_of({"data": Part(tokens=tokens)}, lanes=4)
    assert tokens.rounds == [1]
    asked = []
    for position in range(plan.packs_per_pass if tokens.complete else 10_000):
        address = plan.address(position)
        assert address is not None
        asked.append((position, max(plan.lines[0].groups[address.group]), tokens.rounds[-1]))
        if tokens.complete:
            break
    # What is there when a pack is found is never more than twice the blocks that its round begins with.
    assert all(block < there <= max(1, 2 * block) for _, block, there in asked)
    assert [there for _, _, there in asked] == sorted(there for _, _, there in asked)


def test_what_needs_counts_cannot_begin_early() -> None:
    index = index_of([20] * 4)
    for order, choice in (({"epochs": 1}, {}), ({"shuffle": False}, {}), ({}, {"max_epochs": 2.0})):
        with pytest.raises(StreamError, match="need every pack counted"):
            plan_of({"data": Part(tokens=early_tokens(index), **choice)}, **order)
    two = {name: Part(tokens=early_tokens(index_of([20], name=name))) for name in "ab"}
    with pytest.raises(StreamError, match="need every pack counted"):
        plan_of(two)
