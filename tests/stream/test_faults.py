"""Whatever the network and the store do: the packs of a quiet day, or a stop that names the object and the byte.

Each fault strikes the first run (corpus shards are read and tokenised) and a later one (tokens are read), on a server
that ignores If-Match and on one that honours it.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import pytest

from training_ready import TrainingReadyError
from training_ready.corpus.manifest import Shard
from training_ready.storage.objects import ObjectStore
from training_ready.storage.reader import RangedReader
from training_ready.storage.settings import VARIABLES, StorageSettings
from training_ready.stream.assemble import Order, Part, pack_reader
from training_ready.stream.dataset import pack_stream
from training_ready.stream.index import TokenIndex
from training_ready.stream.lengths import LengthPolicy
from training_ready.stream.render import ChatRenderer
from training_ready.stream.token_set import TokenSet
from training_ready.stream.tokens import TokenCache

from ..corpora import put_shard
from ..faulty_network import FaultyProxy, proxy_before
from .conftest import numbered_conversation

PACKS = 90  # more than an epoch: every block is read
PLACE = r"s3://{bucket}/\S+.*(offset|byte|bytes|sha256) \S*\d"


class ShortRanges(ObjectStore):
    """Reads as from objects that are many times larger than a range, and gives up sooner."""

    def open(self, key: str, **reading: Any) -> RangedReader:
        return super().open(key, **{"range_bytes": 2_000, "in_flight": 3, "patience": 20.0, **reading})


@dataclass
class Line:
    """A bucket behind a proxy, with a corpus in it that was never tokenised through the proxy."""

    direct: ObjectStore
    store: ShortRanges
    proxy: FaultyProxy
    shards: list[Shard]
    tokenizer: Any

    def tokens(self, prefix: str, store: ObjectStore | None = None) -> TokenIndex:
        cache = TokenCache(
            store=store or self.store,
            corpus_prefix=prefix,
            renderer=ChatRenderer(self.tokenizer, "assistant"),
            policy=LengthPolicy(max_length=128),
        )
        return cache.ensure(self.shards)

    def packs(self, index: TokenIndex, prefix: str, store: ObjectStore | None = None) -> Iterator[str]:
        tokens = TokenSet(name="numbers", store=store or self.store, prefix=f"{prefix}/tokens", index=index)
        packs = pack_reader({"data": Part(tokens=tokens)}, Order(max_length=128, seed=3, blocks_per_group=2))
        for pack in islice(pack_stream(packs), PACKS):
            yield hashlib.sha256(pack["input_ids"].tobytes() + pack["labels"].tobytes()).hexdigest()

    def run(self) -> list[str]:
        """A first run, from the corpus to packs."""
        prefix = f"runs/{uuid.uuid4().hex}"
        return list(self.packs(self.tokens(prefix), prefix))


@pytest.fixture(params=["store", "moto_store"])
def line(request: pytest.FixtureRequest, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    for name in {name for names in VARIABLES.values() for name in names}:
        monkeypatch.delenv(name, raising=False)
    direct: ObjectStore = request.getfixturevalue(request.param)
    assert direct.settings.endpoint_url is not None
    shards = [
        put_shard(direct, f"corpus/train/shard-{part}.parquet", [numbered_conversation(n) for n in numbers])
        for part, numbers in enumerate((range(57), range(57, 60), range(60, 120)))
    ]
    with proxy_before(direct.settings.endpoint_url) as proxy:
        store = ShortRanges(replace(direct.settings, endpoint_url=proxy.url), direct.bucket)
        yield Line(direct=direct, store=store, proxy=proxy, shards=shards, tokenizer=tokenizer)


@pytest.fixture
def quiet(line: Line) -> list[str]:
    """The packs of a run without faults."""
    index = line.tokens("quiet", line.direct)
    packs = list(line.packs(index, "quiet", line.direct))
    assert len(set(packs)) < len(packs) or index.rows < len(packs), "not a whole epoch"
    return packs


def outcome(line: Line, read: Callable[[], list[str]]) -> list[str] | None:
    """The packs; None for a stop that names the object and the byte."""
    try:
        return read()
    except TrainingReadyError as error:
        expected = pytest.raises(TrainingReadyError, match=PLACE.format(bucket=line.direct.bucket))
        with expected:
            raise error from None
        return None


@pytest.mark.parametrize("fault", ["cut", "reset", "nothing"])
def test_connections_that_break_twenty_times(line: Line, quiet: list[str], fault: str) -> None:
    line.proxy.faults = [fault, fault, "fine", fault] * (2 if fault == "nothing" else 7)
    assert line.run() == quiet
    assert line.proxy.faults == []


def test_a_store_that_is_busy(line: Line, quiet: list[str]) -> None:
    line.proxy.faults = ["busy", "fine", "busy"]
    assert line.run() == quiet


def test_a_stall_in_the_middle_of_an_answer(line: Line, quiet: list[str]) -> None:
    line.proxy.stall_seconds, line.proxy.faults = 1.0, ["fine", "stall", "stall"]
    assert line.run() == quiet


@pytest.mark.parametrize("fault", ["short", "elsewhere", "whole"])
@pytest.mark.parametrize("at", [0, 11])
def test_an_answer_that_is_not_what_was_asked_for_stops(
    line: Line, quiet: list[str], fault: str, at: int
) -> None:
    line.proxy.faults = ["fine"] * at + [fault]
    assert outcome(line, line.run) is None


@pytest.mark.parametrize("at", [0, 8, 40])
def test_a_flipped_bit_on_the_way_is_noticed(line: Line, quiet: list[str], at: int) -> None:
    """Or harmless: the rows are those of a quiet day."""
    line.proxy.faults = ["fine"] * at + ["flip"]
    assert outcome(line, line.run) in (None, quiet)


def test_damage_in_every_answer_stops(line: Line) -> None:
    line.proxy.always = "flip"
    assert outcome(line, line.run) is None


@pytest.mark.slow
def test_a_flipped_bit_is_noticed_wherever_it_falls(line: Line, quiet: list[str]) -> None:
    outcomes = []
    for at in (*range(0, 30, 3), *range(30, 120, 15)):
        line.proxy.faults = ["fine"] * at + ["flip"]
        found = outcome(line, line.run)
        assert found in (None, quiet)
        outcomes.append(found is None)
    assert sum(outcomes) >= 5


def test_a_flipped_bit_in_tokens_at_rest(line: Line, quiet: list[str]) -> None:
    """Damaged in the store, so that every reader gets the same wrong bytes."""
    index = line.tokens("rest")
    key = max(index.blocks, key=lambda shard: line.direct.head(shard).size)
    whole = line.direct.get_bytes(key)
    stops = 0
    for at in range(4, len(whole), len(whole) // 5):
        line.direct.put_bytes(key, whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
        found = outcome(line, lambda: list(line.packs(index, "rest")))
        assert found in (None, quiet)
        stops += found is None
    assert stops >= 2


@pytest.mark.parametrize("at", [1, 9])
def test_a_corpus_shard_replaced_while_it_is_read(line: Line, quiet: list[str], at: int) -> None:
    rows = [numbered_conversation(n) for n in range(500, 557)]
    replaced = threading.Event()

    def replace_it() -> None:
        put_shard(line.direct, line.shards[0].key, rows)
        replaced.set()

    line.proxy.after = [(at, replace_it)]
    # Ranges that were on their way when it happened may all be the old version's: then these are the rows.
    assert outcome(line, line.run) in (None, quiet)
    assert replaced.is_set()


@pytest.mark.parametrize("at", [1, 6])
def test_tokens_replaced_while_they_are_read(line: Line, quiet: list[str], at: int) -> None:
    index = line.tokens("replaced")
    other = Line(**{**vars(line), "shards": [put_shard(line.direct, "corpus/other.parquet", [
        numbered_conversation(n) for n in range(500, 557)])]})  # fmt: skip
    others = line.direct.get_bytes(other.tokens("other", line.direct).blocks[0])
    line.proxy.answered = 0
    line.proxy.after = [(at, lambda: line.direct.put_bytes(index.blocks[0], others))]
    assert outcome(line, lambda: list(line.packs(index, "replaced"))) in (None, quiet)
    assert line.proxy.after == []
    assert line.direct.get_bytes(index.blocks[0]) == others
    assert outcome(line, lambda: list(line.packs(index, "replaced"))) is None, (
        "a new reader compares with the index"
    )


def test_expired_credentials_are_renewed_or_named(
    line: Line, quiet: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    old = line.store.settings
    environment = {
        "AWS_ACCESS_KEY_ID": str(old.access_key_id),
        "AWS_SECRET_ACCESS_KEY": str(old.secret_access_key),
        "AWS_SESSION_TOKEN": "first",
        "AWS_ENDPOINT_URL": line.proxy.url,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = StorageSettings.from_environment(dotenv=False, bucket=line.direct.bucket)
    line.store = ShortRanges(settings)

    def expire() -> None:
        line.proxy.expired_token = "first"
        monkeypatch.setenv("AWS_SESSION_TOKEN", "second")

    line.proxy.after = [(9, expire)]
    assert line.run() == quiet
    assert line.store.settings.session_token == "second"
    line.proxy.expired_token = "second"
    with pytest.raises(
        TrainingReadyError, match=rf"s3://{line.direct.bucket}/.*(AWS_ACCESS_KEY_ID|AWS_SECRET)"
    ):
        line.run()


@pytest.mark.parametrize("at", [0, 3])
def test_a_bucket_that_is_gone(line: Line, quiet: list[str], at: int) -> None:
    index = line.tokens("gone")

    def remove() -> None:
        for info in list(line.direct.list()):
            line.direct.delete(info.key)

    line.proxy.answered = 0
    line.proxy.after = [(at, remove)]
    assert outcome(line, lambda: list(line.packs(index, "gone"))) is None


@pytest.mark.slow
def test_a_minute_of_503(line: Line, quiet: list[str]) -> None:
    index = line.tokens("minute")

    def fail() -> None:
        line.proxy.down = True
        threading.Timer(60, lambda: setattr(line.proxy, "down", False)).start()

    store = LongPatience(line.store.settings, line.store.bucket)
    line.proxy.answered = 0
    line.proxy.after = [(5, fail)]
    assert list(line.packs(index, "minute", store)) == quiet


@pytest.mark.slow
def test_a_stall_of_half_a_minute(line: Line, quiet: list[str]) -> None:
    line.proxy.stall_seconds, line.proxy.faults = 30.0, ["fine"] * 5 + ["stall"] * 3
    line.store = LongPatience(line.store.settings, line.store.bucket)
    assert line.run() == quiet


class LongPatience(ShortRanges):
    """As patient as the readers are by default."""

    def open(self, key: str, **reading: Any) -> RangedReader:
        return super().open(key, **{"patience": 300.0, **reading})
