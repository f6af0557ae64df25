"""Long conversations: cut, split between turns, dropped or refused, and every token counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training_ready.stream.lengths import LengthPolicy, TokenCounts
from training_ready.stream.render import ChatRenderer

SYSTEM = {"role": "system", "content": "night"}


def conversation(words: list[int]) -> list[dict[str, str]]:
    turns = [
        {"role": ["user", "assistant"][n % 2], "content": " ".join([f"t{n}"] + ["work"] * many)}
        for n, many in enumerate(words)
    ]
    return [SYSTEM, *turns]


def learned_turns(rows: list[Any], tokenizer: Any) -> list[str]:
    texts = [tokenizer.decode(row.input_ids[row.learned].tolist()) for row in rows]
    return [turn for text in texts for turn in text.split("<|im_end|>") if turn]


@given(st.lists(st.integers(0, 8), min_size=2, max_size=14))
@settings(max_examples=60, deadline=None)
def test_split_turns_learns_every_turn_once(tokenizer: Any, words: list[int]) -> None:
    renderer, counts = ChatRenderer(tokenizer, "assistant"), TokenCounts()
    messages = conversation(words[: len(words) // 2 * 2])
    policy = LengthPolicy(max_length=60, overlong="split_turns")
    rows = policy.apply(renderer.render(messages), messages, renderer, counts)
    assert not counts.truncated_rows
    assert learned_turns(rows, tokenizer) == [m["content"] for m in messages if m["role"] == "assistant"]
    assert all(len(row.input_ids) <= 60 for row in rows)
    assert all(
        tokenizer.decode(row.input_ids.tolist()).startswith("<|im_start|>system\nnight") for row in rows
    )
    assert counts.rows == len(rows)
    assert counts.split_pieces == (len(rows) if counts.split_rows else 0)
    assert counts.split_rows == (len(rows) > 1)


def test_an_exchange_that_is_too_long_by_itself_is_cut_and_counted(tokenizer: Any) -> None:
    renderer, counts = ChatRenderer(tokenizer, "assistant"), TokenCounts()
    messages = conversation([1, 1, 1, 90, 1, 1])
    policy = LengthPolicy(max_length=60, overlong="split_turns")
    rows = policy.apply(renderer.render(messages), messages, renderer, counts)
    assert [len(row.input_ids) == 60 for row in rows] == [False, True, False]
    assert (counts.rows, counts.split_rows, counts.split_pieces, counts.truncated_rows) == (3, 1, 3, 1)
    assert counts.tokens == sum(len(row.input_ids) for row in rows)


def test_closing_words_of_the_client_stay_with_the_last_exchange(tokenizer: Any) -> None:
    renderer = ChatRenderer(tokenizer, "assistant")
    messages = conversation([8, 8, 8, 8, 2])
    policy = LengthPolicy(max_length=60, overlong="split_turns")
    rows = policy.apply(renderer.render(messages), messages, renderer, TokenCounts())
    assert "t4" in tokenizer.decode(rows[-1].input_ids.tolist())
    assert np.concatenate([row.learned for row in rows]).any()


@pytest.mark.parametrize("overlong", ["truncate", "split_turns", "drop", "error"])
def test_what_fits_is_left_alone(tokenizer: Any, overlong: str) -> None:
    renderer, counts = ChatRenderer(tokenizer, "assistant"), TokenCounts()
    messages = conversation([1, 1])
    row = renderer.render(messages)
    assert LengthPolicy(max_length=60, overlong=overlong).apply(row, messages, renderer, counts) == [row]
    assert counts == TokenCounts(rows=1, tokens=len(row.input_ids), learned_tokens=int(row.learned.sum()))
