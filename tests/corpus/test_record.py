"""The record: what its hash covers, and what it refuses."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from training_ready.corpus.record import Message, Record, RecordMetadata, Turn, content_hash

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
TURNS = st.lists(st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=5)


@given(one=TURNS, other=TURNS)
def test_only_the_same_conversation_has_the_same_hash(one: list[Turn], other: list[Turn]) -> None:
    assert (content_hash(one) == content_hash(other)) == (one == other)


@pytest.mark.parametrize(
    "other",
    [
        [Turn("assistant", "b"), Turn("user", "a")],  # order
        [Turn("user", "b"), Turn("assistant", "a")],  # texts exchanged
        [Turn("assistant", "a"), Turn("user", "b")],  # roles exchanged
        [Turn("user", "ab")],
        [Turn("user", 'a"],["assistant","b')],  # text that looks like a border
        [Turn("user", "a"), Turn("assistant", "b ")],
    ],
)
def test_order_role_and_text_each_change_the_hash(other: list[Turn]) -> None:
    assert content_hash([Turn("user", "a"), Turn("assistant", "b")]) != content_hash(other)


def metadata(**changes: object) -> dict[str, object]:
    return {
        "source_family": "family",
        "source_key": "raw/x.csv#line 2",
        "content_hash": content_hash([Turn("user", "hello"), Turn("assistant", "welcome")]),
        "pii_status": "requires_review",
        "license_tag": "MIT",
        "split": "train",
        "stage": "stage1_foundation",
        "target_role": "assistant",
        "provenance": {
            "original_s3_key": "raw/x.csv",
            "pipeline_version": "1",
            "processed_at": datetime(2026, 1, 1, tzinfo=UTC),
            "steps": ["text normalised"],
        },
        **changes,
    }


MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "welcome"}]


def test_a_record_survives_its_own_json() -> None:
    record = Record.model_validate({"messages": MESSAGES, "metadata": metadata(extra={"topic": "sleep"})})
    stored = record.metadata.canonical_json()
    assert RecordMetadata.model_validate_json(stored) == record.metadata
    assert list(json.loads(stored)) == sorted(json.loads(stored))
    assert "null" not in stored


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"stage": "stage5"}, "stage"),
        ({"target_role": "system"}, "target_role"),
        ({"pii_status": "clean"}, "pii_status"),
        ({"split": "validation"}, "split"),
        ({"content_hash": "sha256:" + "A" * 64}, "content_hash"),
        ({"license_tag": " "}, "license_tag"),
        ({"crisis": {"level": "bad", "type": "self_harm"}}, "crisis"),
        ({"total_tokens": 0}, "total_tokens"),
        ({"therapist": "somebody"}, "therapist"),
    ],
)
def test_metadata_refuses_what_it_does_not_know(changes: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        RecordMetadata.model_validate(metadata(**changes))


@pytest.mark.parametrize(
    "field", ["source_family", "license_tag", "split", "stage", "target_role", "provenance"]
)
def test_required_metadata_is_required(field: str) -> None:
    given_metadata = metadata()
    del given_metadata[field]
    with pytest.raises(ValidationError, match=field):
        RecordMetadata.model_validate(given_metadata)


def test_text_changed_after_hashing_is_refused() -> None:
    changed = [MESSAGES[0], {"role": "assistant", "content": "welcome!"}]
    with pytest.raises(ValidationError, match="changed after it was hashed"):
        Record.model_validate({"messages": changed, "metadata": metadata()})


def test_a_blank_message_is_refused() -> None:
    with pytest.raises(ValidationError):
        Message(role="user", content=" \n")
