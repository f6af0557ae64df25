"""Raw objects in a mixture: every row as often as any other part's, resumed exactly, bad rows named or set aside."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from training_ready.corpus.raw import RawSource
from training_ready.corpus.raw_objects import find_objects
from training_ready.corpus.readers import SourceError
from training_ready.storage.objects import ObjectStore
from training_ready.stream import RawPart, load, raw_tokens
from training_ready.stream.lengths import LengthPolicy
from training_ready.stream.raw_tokens import RawTokenCache
from training_ready.stream.render import ChatRenderer

from .conftest import numbered_conversation


def lines(numbers: range) -> bytes:
    rows = [{"messages": numbered_conversation(number)["messages"]} for number in numbers]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def rows_in(packs: Any, tokenizer: Any) -> list[int]:
    texts = [tokenizer.decode(pack["input_ids"].tolist()) for pack in packs]
    return [int(number) for text in texts for number in re.findall(r"row (\d+) :", text)]


@pytest.fixture
def objects(store: ObjectStore, tmp_path: Path) -> dict[str, RawPart]:
    """Rows 0..89: in a bucket as plain and compressed lines, and on this disk as an array in an object."""
    store.put_bytes("notes/a.jsonl", lines(range(30)))
    store.put_bytes("notes/b.jsonl.gz", gzip.compress(lines(range(30, 60))))
    rows = [{"messages": numbered_conversation(number)["messages"]} for number in range(60, 90)]
    (tmp_path / "c.json").write_text(json.dumps({"items": rows}))
    return {
        "bucket": RawPart(paths=["notes/*.jsonl*"], weight=2, max_epochs=2),
        "disk": RawPart(paths=[str(tmp_path / "c.json")], records_key="items", weight=1, max_epochs=2),
    }


def test_a_mixture_of_raw_objects_holds_every_row_and_goes_on_exactly(
    objects: dict[str, RawPart], store: ObjectStore, tokenizer: Any
) -> None:
    options = {"max_length": 128, "global_batch": 4, "settings": store.settings}
    whole = list(load(objects, tokenizer, **options))
    assert Counter(rows_in(whole, tokenizer)) == dict.fromkeys(range(90), 2)
    stream = load(objects, tokenizer, **options)
    list(islice(iter(stream), 8))
    ranks = []
    for rank in range(2):
        fresh = load(objects, tokenizer, **options, rank=rank, world_size=2)
        fresh.load_state_dict(stream.state_dict())
        ranks.append(list(fresh))
    batches = [
        half for step in range(len(ranks[0]) // 2) for rank in ranks for half in rank[2 * step : 2 * step + 2]
    ]
    assert [pack["input_ids"].tolist() for pack in batches] == [
        pack["input_ids"].tolist() for pack in whole[8:]
    ]


def test_tokenising_goes_on_with_the_segment_that_is_missing(
    store: ObjectStore, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_tokens, "SEGMENT_ROWS", 40)
    store.put_bytes("notes/a.jsonl", lines(range(100)))

    def cache() -> RawTokenCache:
        source = RawSource(name="notes", objects=find_objects(["notes/a.jsonl"], store))
        renderer, policy = ChatRenderer(tokenizer, "assistant"), LengthPolicy(max_length=128)
        return RawTokenCache(store=store, prefix="t", renderer=renderer, policy=policy, source=source)

    whole = cache().ensure()
    assert whole.block_rows.tolist() == [40, 40, 20]
    made = {info.key: info.etag for info in store.list("t/")}
    [index] = [key for key in made if "/index-" in key]
    for lost in (index, *whole.blocks[1:]):
        store.delete(lost)
    store.traffic._reset()
    assert cache().ensure().lengths.tolist() == whole.lengths.tolist()
    assert {info.key: info.etag for info in store.list("t/")} == made
    one_read = store.head("notes/a.jsonl").size
    assert store.traffic.cost().bytes < one_read + sum(store.head(key).size for key in made)


def test_ranks_take_whole_objects_and_find_the_same_rows(store: ObjectStore, tokenizer: Any) -> None:
    for number in range(3):
        store.put_bytes(f"notes/{number}.jsonl", lines(range(10 * number, 10 * number + 10)))

    def lengths(rank: int, world_size: int, prefix: str) -> list[int]:
        source = RawSource(name="notes", objects=find_objects(["notes/*.jsonl"], store))
        renderer, policy = ChatRenderer(tokenizer, "assistant"), LengthPolicy(max_length=128)
        cache = RawTokenCache(store=store, prefix=prefix, renderer=renderer, policy=policy, source=source)
        found: list[int] = cache.ensure(
            rank=rank, world_size=world_size, patience_seconds=60
        ).lengths.tolist()
        return found

    with ThreadPoolExecutor(2) as ranks:
        one, two = ranks.map(lambda rank: lengths(rank, 2, "t"), range(2))
    assert one == two == lengths(0, 1, "alone")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b'{"messages": [}\n', "not JSON"),
        (b'{"messages": [{"role": "user", "content": "alone"}]}\n', "no turn of the target role"),
    ],
)
def test_a_bad_row_stops_with_its_place_or_is_set_aside(
    store: ObjectStore, tokenizer: Any, bad: bytes, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.put_bytes("notes/a.jsonl", lines(range(5)) + bad + lines(range(5, 9)) + bad)
    options = {"max_length": 128, "epochs": 1, "settings": store.settings}
    with pytest.raises(SourceError, match=rf"s3://{store.bucket}/notes/a\.jsonl.*\d") as refused:
        load(RawPart(paths=["notes/a.jsonl"]), tokenizer, **options)
    assert why in str(refused.value)
    with pytest.raises(SourceError, match="bad"):
        load(RawPart(paths=["notes/a.jsonl"], bad_rows=1), tokenizer, **options)
    packs = load(RawPart(paths=["notes/a.jsonl"], bad_rows=2), tokenizer, **options)
    assert sorted(rows_in(packs, tokenizer)) == list(range(9))
    assert "2 rows set aside" in caplog.text


def test_a_changed_object_is_another_stream(store: ObjectStore, tokenizer: Any) -> None:
    store.put_bytes("notes/a.jsonl", lines(range(20)))
    options = {"max_length": 128, "settings": store.settings}
    before = load(RawPart(paths=["notes/a.jsonl"]), tokenizer, **options)
    next(iter(before))
    store.put_bytes("notes/a.jsonl", lines(range(1, 21)))
    after = load(RawPart(paths=["notes/a.jsonl"]), tokenizer, **options)
    after.load_state_dict(before.state_dict())
    with pytest.raises(Exception, match="belongs to another stream"):
        next(iter(after))
