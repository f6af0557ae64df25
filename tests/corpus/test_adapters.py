"""Whose words are whose: the one thing a mapping must never get wrong."""

from __future__ import annotations

import pytest

from training_ready.corpus.adapters import InvalidRow, map_row

HELLO = [("user", "I cannot sleep."), ("assistant", "What keeps you awake?")]


@pytest.mark.parametrize(
    "row",
    [
        {
            "messages": [
                {"role": "user", "content": "I cannot sleep."},
                {"role": "assistant", "content": "What keeps you awake?"},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "I cannot sleep."},
                {"from": "gpt", "value": "What keeps you awake?"},
            ]
        },
        {
            "conversations": [
                {"role": "user", "content": "I cannot sleep."},
                {"role": "assistant", "content": "What keeps you awake?"},
            ]
        },
        {
            "conversation": [
                {"role": "client", "content": "I cannot sleep."},
                {"role": "Therapist", "content": "What keeps you awake?"},
            ]
        },
        {"conversation": {"client": "I cannot sleep.", "therapist": "What keeps you awake?"}},
        {"conversation": [{"client": "I cannot sleep.", "therapist": "What keeps you awake?"}]},
        {"input": "I cannot sleep.", "output": "What keeps you awake?"},
        {"question": "I cannot sleep.", "answer": "What keeps you awake?"},
        {"instruction": "I cannot sleep.", "input": "", "output": "What keeps you awake?"},
        {"instruction": "I cannot sleep.", "output": "What keeps you awake?"},
        {"Context": "I cannot sleep.", "Response": "What keeps you awake?"},
        {"prompt": "I cannot sleep.", "response": "What keeps you awake?"},
    ],
)
def test_known_forms_give_the_same_turns(row: dict[str, object]) -> None:
    mapped = map_row(row, columns=None)
    assert mapped.turns == HELLO
    assert mapped.used == set(row)


def test_instruction_and_input_are_paragraphs_of_one_turn() -> None:
    mapped = map_row({"instruction": "Listen.", "input": "I am sad.", "output": "I hear you."}, columns=None)
    assert mapped.turns == [("user", "Listen.\n\nI am sad."), ("assistant", "I hear you.")]


def test_columns_join_and_keep_the_written_order_of_turns() -> None:
    row = {"title": " Sleep ", "text": "<p>Awake</p>", "reply": "Since when?", "rules": ""}
    mapped = map_row(row, columns={"user": ["title", "text"], "assistant": ["reply"], "system": ["rules"]})
    assert mapped.turns == [("user", "Sleep\n\nAwake"), ("assistant", "Since when?")]
    therapist_first = map_row(
        {"prompt": "How are you?", "response": "Fine, leave me."},
        columns={"assistant": ["prompt"], "user": ["response"]},
    )
    assert therapist_first.turns == [("assistant", "How are you?"), ("user", "Fine, leave me.")]


def test_a_system_text_opens_wherever_it_is_written() -> None:
    mapped = map_row(
        {"a": "hi", "b": "hello", "s": "Be kind."},
        columns={"user": ["a"], "assistant": ["b"], "system": ["s"]},
    )
    assert [turn.role for turn in mapped.turns] == ["system", "user", "assistant"]


def test_blank_turns_stay_for_the_gates_to_see() -> None:
    assert map_row({"question": "\u00a0", "answer": "yes"}, columns=None).turns == [
        ("user", ""),
        ("assistant", "yes"),
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "How was it?", "response": "Go away.", "purpose": "difficult_client"}, "edge case"),
        ({"dialogue": "x"}, "no known form"),
        ({"messages": "hello"}, "list of turns"),
        ({"messages": ["hello"]}, "object with role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "known speaker"),
        ({"messages": [{"role": "user"}]}, "no role and content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "should be text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "system turn"),
        ({"question": 3, "answer": "x"}, "should be text"),
        ({"question": "b\udcffd", "answer": "x"}, "UTF-8"),
    ],
)
def test_rows_of_another_shape_are_refused(row: dict[str, object], why: str) -> None:
    with pytest.raises(InvalidRow, match=why):
        map_row(row, columns=None)


def test_a_refusal_never_quotes_the_conversation() -> None:
    with pytest.raises(InvalidRow) as refused:
        map_row({"messages": [{"role": "user", "content": {"secret": "my name is"}}]}, columns=None)
    assert "my name is" not in str(refused.value)
