"""Splits: groups stay together, the most held-out publisher's split wins, and nothing depends on the order of rows."""

from __future__ import annotations

import hashlib
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from training_ready.corpus.candidates import Candidate, Facts
from training_ready.corpus.record import SPLITS, Split
from training_ready.corpus.split import SplitPlan

SHARES: dict[Split, float] = {"train": 0.9, "val": 0.05, "test": 0.05}


def candidate(*groups: str, published: Split | None = None, family: str = "family") -> Candidate:
    return Candidate(
        position="line 1",
        turns=[],
        content_hash="sha256:" + "0" * 64,
        facts=Facts(stage="stage1_foundation", target_role="assistant"),
        extra={},
        groups=tuple(hashlib.sha256(group.encode()).digest()[:16] for group in groups),
        family=family,
        publisher_split=published,
        withheld_columns=(),
        unused=frozenset(),
    )


def plan(seed: int = 0) -> SplitPlan:
    return SplitPlan(SHARES, seed=seed, holdout_families=["sarcasm"])


ROWS = st.lists(
    st.tuples(
        st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3, unique=True),
        st.sampled_from([None, *SPLITS]),
    ),
    min_size=1,
    max_size=12,
)


@given(rows=ROWS, data=st.data())
def test_rows_that_share_a_group_share_a_split_in_any_order(
    rows: list[tuple[list[str], Split | None]], data: st.DataObject
) -> None:
    everyone = [candidate(*groups, published=published) for groups, published in rows]
    first, second = plan(), plan()
    for one in everyone:
        first.observe(one)
    for one in data.draw(st.permutations(everyone)):
        second.observe(one)
    found = [first.split_of(one) for one in everyone]
    assert found == [second.split_of(one) for one in everyone]
    for one, split in zip(everyone, found, strict=True):
        for other, other_split in zip(everyone, found, strict=True):
            if set(one.groups) & set(other.groups):
                assert split == other_split
        if one.publisher_split:
            assert SPLITS.index(split) >= SPLITS.index(one.publisher_split)


def test_shares_are_about_what_was_asked_for() -> None:
    found = Counter(plan().split_of(candidate(str(number))) for number in range(20_000))
    # five standard deviations of a binomial with p = .05
    assert abs(found["val"] - 1000) < 154
    assert abs(found["test"] - 1000) < 154


def test_the_seed_changes_who_is_held_out_and_nothing_else_does() -> None:
    groups = [str(number) for number in range(500)]
    once = [plan(1).split_of(candidate(group)) for group in groups]
    assert once == [plan(1).split_of(candidate(group)) for group in groups]
    assert once != [plan(2).split_of(candidate(group)) for group in groups]
    alone = plan(1)
    assert alone.split_of(candidate("77")) == once[77]


def test_a_holdout_family_only_tests() -> None:
    held = plan()
    rows = [candidate(str(number), published="train", family="sarcasm") for number in range(50)]
    for row in rows:
        held.observe(row)
    assert {held.split_of(row) for row in rows} == {"test"}
