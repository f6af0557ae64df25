"""Best-fit-decreasing packing: every row once, no pack too long, and a good fill."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_ready.stream.packs import best_fit_decreasing


@given(st.lists(st.integers(1, 50), max_size=200))
def test_every_row_stands_in_exactly_one_pack_that_holds_it(lengths: list[int]) -> None:
    packs = best_fit_decreasing(lengths, 50)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in pack) <= 50 for pack in packs)


def test_rows_go_where_they_fit_best() -> None:
    # 6 leaves 4, 5 leaves 5; the 4 belongs beside the 6, where nothing is left over.
    assert best_fit_decreasing([6, 5, 4], 10) == [[0, 2], [1]]


def test_real_lengths_fill_their_packs() -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(5.5, 0.8, size=8000).astype(int), 8, 4096)
    packs = best_fit_decreasing(lengths, 4096)
    assert lengths.sum() / (len(packs) * 4096) > 0.98


def test_a_row_longer_than_a_pack_is_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 has 11 tokens, more than the pack's 10"):
        best_fit_decreasing([3, 11], 10)
