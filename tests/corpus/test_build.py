"""From a bucket to a corpus: what is counted, what is written when, and what is refused."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from training_ready.corpus.assemble import BuildError
from training_ready.corpus.build import build_corpus
from training_ready.corpus.manifest import Manifest, ManifestError
from training_ready.corpus.readers import SourceError
from training_ready.corpus.record import Record
from training_ready.corpus.shards import SHARD_SCHEMA
from training_ready.corpus.spec import CorpusSpec
from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectNotFound, ObjectStore

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def pair(number: int, **changes: object) -> dict[str, object]:
    return {"id": str(number), "question": f"Question {number}?", "answer": f"Answer {number}.", **changes}


def put_jsonl(store: ObjectStore, key: str, rows: list[Any]) -> None:
    store.put_bytes(key, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def put_csv(store: ObjectStore, key: str, rows: list[dict[str, object]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    store.put_bytes(key, text.getvalue().encode())


def source(name: str = "one", **changes: object) -> dict[str, object]:
    return {
        "name": name,
        "path": f"raw/{name}.jsonl",
        "stage": "stage1_foundation",
        "target_role": "assistant",
        "license": "MIT",
        **changes,
    }


def spec(*sources: dict[str, object], **changes: object) -> CorpusSpec:
    return CorpusSpec.model_validate(
        {"name": "small", "allowed_licenses": ["MIT"], "sources": list(sources) or [source()], **changes}
    )


def rows_of(store: ObjectStore, manifest: Manifest) -> list[dict[str, Any]]:
    return [
        {**row, "shard_split": shard.split}
        for shard in manifest.shards
        for row in pq.read_table(store.open(shard.key)).to_pylist()
    ]


def record_of(row: dict[str, Any]) -> Record:
    return Record.model_validate({"messages": row["messages"], "metadata": json.loads(row["metadata"])})


# --------------------------------------------------------------------------- what a build gives


def test_every_row_is_kept_or_rejected_with_a_reason(store: ObjectStore) -> None:
    good = [pair(number, license="MIT") for number in range(20)]
    bad = [
        pair(3, id="another id", license="mit"),
        pair(30, answer=" \u00a0", license="MIT"),
        pair(31),
        pair(32, license="CC-BY-NC-4.0"),
        pair(33, license="MIT", stage="stage7"),
        "not an object",
    ]
    put_jsonl(store, "raw/one.jsonl", good + bad)
    fields = {"license": None, "row_fields": ["license", "stage"], "metadata": {"id": "id"}}
    manifest = build_corpus(spec(source(**fields)), store).manifest
    counts = manifest.sources[0]
    assert counts.records_in == 26
    assert counts.kept == 20
    assert counts.rejected == {
        "duplicate": 1,
        "empty": 1,
        "invalid_row": 2,
        "license_missing": 1,
        "license_not_allowed": 1,
    }
    assert manifest.rejected_rows is not None
    listed = [json.loads(line) for line in store.get_bytes(manifest.rejected_rows.key).splitlines()]
    assert [one["position"] for one in listed] == [f"line {number}" for number in range(21, 27)]
    assert not any("Question" in json.dumps(one) for one in listed)


def test_shards_hold_whole_records_in_the_promised_schema(store: ObjectStore) -> None:
    put_jsonl(store, "raw/one.jsonl", [pair(number, topic="sleep") for number in range(200)])
    wanted = spec(
        source(metadata={"topic": "topic"}, domain="psychology", language="en"),
        row_group_records=20,
        shard_records=50,
    )
    manifest = build_corpus(wanted, store, processed_at=NOW).manifest
    assert [shard.key for shard in manifest.shards_of("train")] == [
        f"final_dataset/small/train/shard-{number:05}.parquet" for number in range(4)
    ]
    assert [group.records for group in manifest.shards_of("train")[0].row_groups] == [20, 20, 10]
    for shard in manifest.shards:
        data = store.get_bytes(shard.key)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        assert file.schema_arrow.equals(SHARD_SCHEMA)
        found = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        assert found == [group.records for group in shard.row_groups]
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    rows = rows_of(store, manifest)
    assert len(rows) == 200 == manifest.records
    for row in rows:
        metadata = record_of(row).metadata
        assert metadata.split == row["shard_split"]
        assert metadata.content_hash == row["content_hash"]
        assert (metadata.domain, metadata.language, metadata.extra) == (
            "psychology",
            "en",
            {"topic": "sleep"},
        )
        assert metadata.provenance.original_s3_key == "raw/one.jsonl"
        assert metadata.provenance.processed_at == NOW
        assert metadata.pii_status == "requires_review"
        assert metadata.total_tokens is None


def test_the_manifest_says_what_a_source_declares_about_people(store: ObjectStore) -> None:
    for name in ("one", "two"):
        put_jsonl(
            store,
            f"raw/{name}.jsonl",
            [pair(number, id=f"{name}{number}", question=f"{name} {number}?") for number in range(9)],
        )
    declared = source("two", pii_status="scrubbed", consent="signed by every client, 2025")
    wanted = CorpusSpec.model_validate(
        {"name": "people", "allowed_licenses": ["MIT"], "sources": [source("one"), declared]}
    )
    build_corpus(wanted, store, processed_at=NOW)
    one, two = Manifest.load(store, "final_dataset/people/manifest.json").sources
    assert (one.pii_status, one.consent) == ("requires_review", None)
    assert (two.pii_status, two.consent) == ("scrubbed", "signed by every client, 2025")


def test_the_manifest_names_its_inputs_and_knows_its_own_hash(store: ObjectStore) -> None:
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(30)])
    packed = gzip.compress(b"".join(json.dumps(pair(n)).encode() + b"\n" for n in range(30, 60)))
    store.put_bytes("raw/two.jsonl.gz", packed)
    wanted = spec(source(path=["raw/one.jsonl", store.uri("raw/two.jsonl.gz")]))
    manifest = build_corpus(wanted, store).manifest
    stored = {one.uri: one for one in manifest.inputs}
    assert stored[store.uri("raw/two.jsonl.gz")].sha256 == hashlib.sha256(packed).hexdigest()
    assert stored[store.uri("raw/two.jsonl.gz")].bytes == len(packed)
    data = store.get_bytes("final_dataset/small/manifest.json")
    for key in ("final_dataset/small/manifest.json", store.uri("final_dataset/small/manifest.json")):
        loaded = Manifest.load(store, key)
        assert loaded == manifest
        assert loaded.sha256 == hashlib.sha256(data).hexdigest()


def test_the_same_inputs_and_time_give_the_same_bytes(store: ObjectStore) -> None:
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(100)])
    first = build_corpus(spec(), store, processed_at=NOW).manifest
    second = build_corpus(spec(name="again"), store, processed_at=NOW).manifest
    assert [shard.sha256 for shard in first.shards] == [shard.sha256 for shard in second.shards]


def test_parquet_and_csv_sources(store: ObjectStore) -> None:
    put_csv(store, "raw/table.csv", [pair(number) for number in range(20)])
    once = build_corpus(spec(source(path="raw/table.csv")), store).manifest
    shard = once.shards_of("train")[0]
    manifest = build_corpus(
        spec(source(path=shard.key), name="from_parquet", splits={"train": 1.0}), store
    ).manifest
    assert manifest.records == shard.records
    assert manifest.inputs[0].sha256 == shard.sha256


def test_of_equal_conversations_the_later_stage_keeps_its_copy(store: ObjectStore) -> None:
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(10)])
    put_jsonl(store, "raw/voice.jsonl", [pair(number) for number in range(5, 12)])
    wanted = spec(source(), source("voice", stage="stage4_voice_persona"))
    first, voice = build_corpus(wanted, store).manifest.sources
    assert (first.kept, first.rejected) == (5, {"duplicate": 5})
    assert (voice.kept, voice.rejected) == (7, {})


def test_a_rejected_crisis_is_counted_on_its_own(store: ObjectStore) -> None:
    crisis = {"level": "emergency", "type": "self_harm"}
    rows = [
        pair(1, crisis=crisis),
        pair(1, crisis=crisis),
        pair(2, crisis={"level": "very bad", "type": "x"}),
        pair(3),
    ]
    put_jsonl(store, "raw/one.jsonl", rows)
    manifest = build_corpus(spec(source(row_fields=["crisis"]), splits={"train": 1.0}), store).manifest
    assert manifest.sources[0].crisis_rejected == 2
    kept = record_of(rows_of(store, manifest)[0]).metadata
    assert kept.crisis is not None
    assert kept.crisis.level == "emergency"


def test_a_target_role_that_contradicts_its_source_is_rejected(store: ObjectStore) -> None:
    put_jsonl(
        store, "raw/one.jsonl", [pair(1, target_role="assistant"), pair(2, target_role="user"), pair(3)]
    )
    manifest = build_corpus(spec(source(row_fields=["target_role"]), splits={"train": 1.0}), store).manifest
    assert manifest.sources[0].rejected == {"invalid_row": 1}
    assert manifest.target_roles == {"assistant": 2}


# --------------------------------------------------------------------------- splits and what is withheld


def test_answers_to_one_question_share_a_split_and_the_most_held_out_wins(store: ObjectStore) -> None:
    rows = [
        pair(n, group=str(n // 4), question=f"Question {n // 4}?", split="dev" if n % 40 == 3 else "train")
        for n in range(200)
    ]
    rows += [pair(n, group=f"again {n}", question="Question 0?", split="test") for n in range(200, 203)]
    put_csv(store, "raw/table.csv", rows)
    wanted = spec(
        source(
            path="raw/table.csv",
            group_by=["group", "question"],
            split_column="split",
            metadata={"group": "group"},
        )
    )
    manifest = build_corpus(wanted, store).manifest
    assert manifest.splits == {"train": 180, "val": 16, "test": 7}
    assert (
        manifest.sources[0].moved == 3 * 4 + 4
    )  # three of each held-out four, and the four that met test's question
    splits = defaultdict(set)
    for row in rows_of(store, manifest):
        splits[row["messages"][0]["content"]].add(row["shard_split"])
    assert all(len(found) == 1 for found in splits.values())
    assert splits["Question 0?"] == {"test"}


def test_an_unknown_word_for_a_split_costs_its_row(store: ObjectStore) -> None:
    put_csv(store, "raw/table.csv", [pair(1, part="train"), pair(2, part="maybe"), pair(3, part="")])
    manifest = build_corpus(spec(source(path="raw/table.csv", split_column="part")), store).manifest
    assert manifest.sources[0].rejected == {"invalid_row": 1}


def test_what_is_withheld_never_reaches_a_record(store: ObjectStore) -> None:
    put_csv(
        store,
        "raw/table.csv",
        [
            pair(1, who="Ada Quill, LMFT", answer="Rest first."),
            pair(2, who="Ada Quill, LMFT", answer="Take care, ADA QUILL"),
            pair(3, who="", answer="Signed by nobody."),
        ],
    )
    wanted = spec(source(path="raw/table.csv", withhold={"who": "^[^,]+"}), splits={"train": 1.0})
    manifest = build_corpus(wanted, store).manifest
    assert manifest.sources[0].rejected == {"withheld_value": 1}
    assert manifest.rejected_rows is not None
    written = [store.get_bytes(manifest.rejected_rows.key), json.dumps(rows_of(store, manifest)).encode()]
    assert not any(b"quill" in data.lower() for data in written)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        (b"question,answer\n", {}, "source 'one' is empty: no row"),
        (b"", {}, "empty object"),
        (b"question,answer\n ,\n", {}, r"none of its 1 rows was kept \(empty 1\)"),
        (
            b"question,answr\na,b\n",
            {"columns": {"user": "question", "assistant": "answer"}},
            r"columns\.assistant names the column 'answer' \(nearest: 'answr'\)",
        ),
        (b"question,answer\na,b\n", {"group_by": "qid"}, "group_by names the column 'qid'"),
        (b"frage,antwort\na,b\n", {}, "no known form of conversation in the columns 'frage', 'antwort'"),
        (b'question,answer\n"a,b\n', {}, "cannot be read after the start of the file: line 2"),
    ],
)
def test_unusable_sources_are_named(
    store: ObjectStore, data: bytes, changes: dict[str, object], message: str
) -> None:
    store.put_bytes("raw/table.csv", data)
    with pytest.raises((SourceError, BuildError), match=message):
        build_corpus(spec(source(path="raw/table.csv", **changes)), store)
    assert not store.exists("final_dataset/small/manifest.json")


def test_all_missing_objects_are_named(store: ObjectStore) -> None:
    with pytest.raises(SourceError) as refused:
        build_corpus(spec(source(), source("two")), store)
    assert store.uri("raw/one.jsonl") in str(refused.value)
    assert store.uri("raw/two.jsonl") in str(refused.value)


def test_a_manifest_that_is_not_there_or_does_not_add_up(store: ObjectStore) -> None:
    with pytest.raises(ManifestError, match="there is no manifest"):
        Manifest.load(store, "final_dataset/small/manifest.json")
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(5)])
    build_corpus(spec(), store)
    stored = json.loads(store.get_bytes("final_dataset/small/manifest.json"))
    stored["sources"][0]["records_in"] += 1
    store.put_bytes("final_dataset/small/manifest.json", json.dumps(stored).encode())
    with pytest.raises(ManifestError, match=r"kept \+ rejected: 5 = 5, expected 6"):
        Manifest.load(store, "final_dataset/small/manifest.json")


# --------------------------------------------------------------------------- the second build


def test_the_same_build_is_found_and_nothing_is_written(store: ObjectStore) -> None:
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(50)])
    first = build_corpus(spec(), store)
    before = {one.key: one.etag for one in store.list("final_dataset/")}
    again = build_corpus(spec(), store)
    assert (first.reused, again.reused) == (False, True)
    assert again.manifest.sha256 == first.manifest.sha256
    assert {one.key: one.etag for one in store.list("final_dataset/")} == before


def test_a_different_build_needs_to_be_asked_for_and_leaves_the_old_one_readable(store: ObjectStore) -> None:
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(50)])
    old = build_corpus(spec(), store).manifest
    old_bytes = {shard.key: store.get_bytes(shard.key) for shard in old.shards}
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(60)])
    with pytest.raises(BuildError, match=r"raw/one\.jsonl has .* bytes, had .*--replace"):
        build_corpus(spec(), store)
    assert Manifest.load(store, "final_dataset/small/manifest.json") == old
    new = build_corpus(spec(), store, replace=True)
    assert new.manifest.records == 60
    assert sorted(new.superseded) == sorted(old_bytes)
    assert {key: store.get_bytes(key) for key in old_bytes} == old_bytes
    assert not old_bytes.keys() & {shard.key for shard in new.manifest.shards}
    kept = Manifest.load(store, f"final_dataset/small/manifest.{old.sha256[:12]}.json")
    assert kept.sha256 == old.sha256
    assert build_corpus(spec(), store).reused


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 5}, "the specification changed in seed"), ({"holdout_families": ["one"]}, "holdout_families")],
)
def test_a_changed_specification_is_another_build(
    store: ObjectStore, change: dict[str, object], message: str
) -> None:
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(50)])
    build_corpus(spec(), store)
    with pytest.raises(BuildError, match=message):
        build_corpus(spec(**change), store)


def test_a_lost_shard_is_noticed(store: ObjectStore) -> None:
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(50)])
    manifest = build_corpus(spec(), store).manifest
    store.delete(manifest.shards[0].key)
    with pytest.raises(BuildError, match=r"shard-00000\.parquet is missing"):
        build_corpus(spec(), store)
    assert build_corpus(spec(), store, replace=True).manifest.records == 50


def test_a_root_prefix_holds_inputs_and_corpus(store_server: EmbeddedStore, store: ObjectStore) -> None:
    from dataclasses import replace

    rooted = ObjectStore(replace(store.settings, root_prefix="datasets"), store.bucket)
    put_jsonl(store, "datasets/raw/one.jsonl", [pair(number) for number in range(9)])
    manifest = build_corpus(spec(), rooted).manifest
    assert manifest.uri == store.uri("datasets/final_dataset/small/manifest.json")
    assert len(rows_of(store, manifest)) == 9


def test_a_build_killed_half_way_leaves_no_corpus_and_can_be_repeated(
    store_server: EmbeddedStore, store: ObjectStore, tmp_path: Path
) -> None:
    put_jsonl(store, "raw/one.jsonl", [pair(number) for number in range(3000)])
    path = tmp_path / "corpus.yaml"
    path.write_text(spec(splits={"train": 1.0}, shard_records=3).model_dump_json(exclude_none=True))
    environment = {**os.environ, **store_server.environment(), "OVH_S3_BUCKET": store.bucket}
    program = (
        "import sys; from pathlib import Path; from training_ready.corpus.commands import data_build; "
        "data_build(Path(sys.argv[1]))"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(path)], env=environment, cwd=tmp_path)
    while child.poll() is None and not any(True for _ in store.list("final_dataset/small/train/")):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with pytest.raises(ObjectNotFound):
        store.head("final_dataset/small/manifest.json")
    manifest = build_corpus(spec(splits={"train": 1.0}, row_group_records=1000), store).manifest
    assert len(rows_of(store, manifest)) == 3000
