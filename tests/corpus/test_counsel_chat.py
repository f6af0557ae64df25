"""Real data: 2,129 questions and answers as somebody published them."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from training_ready.corpus.build import build_corpus
from training_ready.corpus.manifest import Manifest
from training_ready.corpus.record import Record
from training_ready.corpus.spec import load_spec
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore

FOLDER = os.environ.get("TRAINING_READY_REAL_DATA")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="set TRAINING_READY_REAL_DATA to the folder that holds counsel_chat/"
)


@pytest.fixture(scope="module")
def published() -> list[dict[str, str]]:
    assert FOLDER is not None
    path = Path(FOLDER) / "counsel_chat" / "20200325_counsel_chat.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def built(store_server: EmbeddedStore) -> tuple[Manifest, list[dict[str, Any]]]:
    assert FOLDER is not None
    store = ObjectStore(store_server.settings("counsel-chat"))
    store.create_bucket_if_missing()
    path = Path(FOLDER) / "counsel_chat" / "20200325_counsel_chat.csv"
    store.put_file("acquired/counsel_chat.csv", path)
    manifest = build_corpus(load_spec(Path(__file__).with_name("counsel_chat.yaml")), store).manifest
    rows = [
        {**row, "shard_split": shard.split}
        for shard in manifest.shards
        for row in pq.read_table(store.open(shard.key)).to_pylist()
    ]
    return manifest, rows


def test_counsel_chat_becomes_a_corpus(
    published: list[dict[str, str]], built: tuple[Manifest, list[dict[str, Any]]]
) -> None:
    manifest, rows = built
    counts = manifest.sources[0]
    assert counts.records_in == len(published) == 2129
    assert counts.kept + sum(counts.rejected.values()) == 2129
    assert counts.kept == len(rows)
    distinct = {
        (" ".join((row["questionTitle"] + row["questionText"]).split()), " ".join(row["answerText"].split()))
        for row in published
    }
    assert counts.kept + counts.rejected["withheld_value"] <= len(distinct) + 18  # signed answers may repeat

    # Nobody is named: no therapist's name or address in the metadata, a message, or any part of one.
    names = {re.split(",", row["therapistInfo"])[0].strip() for row in published}
    links = {row["therapistURL"].strip() for row in published} | {
        row["questionLink"].strip() for row in published
    }
    for row in rows:
        said = json.dumps(row["messages"], ensure_ascii=False) + row["metadata"]
        assert not any(link in said for link in links)
        assert not any(name in said for name in names)

    # Text is plain, and no question or answer lost a letter.
    letters = {re.sub(r"\W", "", row["answerText"]) for row in published}
    for row in rows:
        record = Record.model_validate({"messages": row["messages"], "metadata": json.loads(row["metadata"])})
        assert [message.role for message in record.messages] == ["user", "assistant"]
        assert not re.search(
            "[\u00a0\t\r]|  |\n\n\n", "".join(message.content for message in record.messages)
        )
        assert re.sub(r"\W", "", record.messages[1].content) in letters
        assert record.metadata.extra.keys() == {"topic", "question_id"}


def test_no_question_crosses_splits_and_the_publishers_split_is_respected(
    published: list[dict[str, str]], built: tuple[Manifest, list[dict[str, Any]]]
) -> None:
    manifest, rows = built
    by_question, by_id = defaultdict(set), defaultdict(set)
    for row in rows:
        by_question[row["messages"][0]["content"]].add(row["shard_split"])
        by_id[json.loads(row["metadata"])["extra"]["question_id"]].add(row["shard_split"])
    assert all(len(splits) == 1 for splits in [*by_question.values(), *by_id.values()])

    rank = ["train", "val", "test"]
    wanted = {row["questionID"]: row["split"] for row in published}
    moved = 0
    for row in rows:
        said = wanted[json.loads(row["metadata"])["extra"]["question_id"]]
        assert rank.index(row["shard_split"]) >= rank.index(said)
        moved += row["shard_split"] != said
    assert moved == manifest.sources[0].moved
    assert moved < 0.05 * len(rows)  # the same question under two numbers, once in train and once held out
