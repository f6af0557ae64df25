from __future__ import annotations

import io
import os
import threading
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training_ready.storage.errors import ObjectChanged, StorageError
from training_ready.storage.objects import ObjectStore

DATA = os.urandom(300_000)
SMALL = {"range_bytes": 20_000, "in_flight": 3}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(
        st.one_of(
            st.tuples(st.just("read"), st.integers(0, 120_000)),
            st.tuples(st.just("start"), st.integers(0, 310_000)),
            st.tuples(st.just("end"), st.integers(-300_000, 10)),
            st.tuples(st.just("by"), st.integers(-1000, 1000)),
        ),
        max_size=12,
    ),
    ahead=st.booleans(),
    whole=st.booleans(),
    range_bytes=st.sampled_from([7_000, 65_536, 4 << 20]),
)
def test_it_reads_as_a_file_does(
    store: ObjectStore, moves: list[tuple[str, int]], ahead: bool, whole: bool, range_bytes: int
) -> None:
    if not store.exists("data"):
        store.put_bytes("data", DATA)
    expected = io.BytesIO(DATA)
    with store.open("data", ahead=ahead, whole=whole, range_bytes=range_bytes, in_flight=3) as reader:
        for move, amount in moves:
            if move == "read":
                assert reader.read(amount) == expected.read(amount)
            elif move == "by":
                place = max(0, expected.tell() + amount)
                assert reader.seek(place - expected.tell(), io.SEEK_CUR) == expected.seek(place)
            else:
                whence = io.SEEK_END if move == "end" else io.SEEK_SET
                assert reader.seek(amount, whence) == expected.seek(amount, whence)
            assert reader.tell() == expected.tell()
        assert reader.read_range(5, 100_000) == DATA[5:100_000]
        assert reader.read() == expected.read()


def test_it_is_a_file_to_the_standard_library(store: ObjectStore) -> None:
    text = "".join(f"line {number} äöü\n" for number in range(20_000))
    store.put_bytes("text", text.encode())
    with io.TextIOWrapper(io.BufferedReader(store.open("text", **SMALL)), encoding="utf-8") as lines:
        assert list(lines) == text.splitlines(keepends=True)
    reader = store.open("text")
    assert (reader.readable(), reader.seekable(), reader.writable()) == (True, True, False)
    with pytest.raises(ValueError, match="cannot seek"):
        reader.seek(-1)
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read(1)


def test_parquet_through_it(proxied: ObjectStore, proxy: Any) -> None:
    table = pa.table(
        {"number": list(range(50_000)), "text": [f"row {number}" * 3 for number in range(50_000)]}
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=5_000)
    proxied.put_bytes("t.parquet", sink.getvalue())
    proxy.seen.clear()
    proxy.faults = ["cut", "busy", "reset", "cut"]
    file = pq.ParquetFile(pa.PythonFile(proxied.open("t.parquet", **SMALL), mode="r"))
    assert file.read().equals(table)
    assert file.read_row_group(7).equals(table.slice(35_000, 5_000))
    assert proxy.faults == []
    assert sum(seen.method == "HEAD" for seen in proxy.seen) == 1


def test_in_order_no_byte_is_fetched_twice(proxied: ObjectStore, proxy: Any) -> None:
    proxied.put_bytes("data", DATA)
    proxy.seen.clear()
    with io.BufferedReader(proxied.open("data", **SMALL), buffer_size=5_000) as reader:
        assert b"".join(iter(lambda: reader.read(777), b"")) == DATA
    assert [seen.method for seen in proxy.seen].count("HEAD") == 1
    assert sum(seen.answered for seen in proxy.seen) == len(DATA)


def test_a_jump_fetches_only_what_was_asked_for(proxied: ObjectStore, proxy: Any) -> None:
    proxied.put_bytes("data", DATA)
    proxy.seen.clear()
    with proxied.open("data", ahead=False) as reader:
        reader.seek(100_000)
        assert reader.read(80_000) == DATA[100_000:180_000]
    assert [seen.range for seen in proxy.seen if seen.range] == ["bytes=100000-179999"]


@pytest.mark.parametrize("fault", ["cut", "reset", "nothing", "busy"])
@pytest.mark.parametrize("ahead", [True, False])
def test_what_a_bad_network_cuts_off_is_asked_for_again(
    proxied: ObjectStore, proxy: Any, fault: str, ahead: bool
) -> None:
    proxied.put_bytes("data", DATA)
    proxy.faults = [fault] * 4
    with proxied.open("data", ahead=ahead, **SMALL) as reader:
        assert reader.read() == DATA
    assert proxy.faults == []


def test_it_goes_on_from_the_last_byte(proxied: ObjectStore, proxy: Any) -> None:
    proxied.put_bytes("data", DATA)
    proxy.seen.clear()
    proxy.faults = ["cut", "cut"]
    with proxied.open("data", ahead=False) as reader:
        assert reader.read() == DATA
    ranges = [seen.range for seen in proxy.seen if seen.range]
    assert ranges == ["bytes=0-299999", "bytes=150000-299999", "bytes=225000-299999"]


def test_patience_ends_with_the_key_and_the_offset(proxied: ObjectStore, proxy: Any) -> None:
    proxied.put_bytes("data", DATA)
    proxy.always = "nothing"
    with (
        proxied.open("data", patience=0.5) as reader,
        pytest.raises(
            StorageError, match=rf"s3://{proxied.bucket}/data: no byte for 0.5 s at offset 0 of 300000"
        ),
    ):
        reader.read()
    proxy.always = None
    with proxied.open("data", patience=0.5) as reader:
        proxy.faults = ["nothing"] * 20
        with pytest.raises(StorageError, match="no byte"):
            reader.read(10)
        proxy.faults = []
        assert reader.read() == DATA  # a failed read leaves the reader usable, at its place


def test_a_store_that_answered_before_is_waited_for(proxied: ObjectStore, proxy: Any) -> None:
    proxied.put_bytes("data", DATA)
    proxy.down = True
    threading.Timer(1.0, lambda: setattr(proxy, "down", False)).start()
    with proxied.open("data", patience=60) as reader:
        assert reader.read() == DATA
    proxy.down = True
    with pytest.raises(StorageError, match="HTTP 503"):
        proxied.open("data", patience=0.2)


@pytest.mark.parametrize("fault", ["short", "elsewhere", "whole"])
def test_an_answer_to_another_question_is_refused(proxied: ObjectStore, proxy: Any, fault: str) -> None:
    proxied.put_bytes("data", DATA)
    proxy.faults = [fault]
    with (
        proxied.open("data", ahead=False) as reader,
        pytest.raises(StorageError, match="asked for 'bytes 0-"),
    ):
        reader.read()


@pytest.mark.parametrize("kind", ["store", "moto_store"])
@pytest.mark.parametrize("same_size", [True, False])
def test_two_versions_are_never_mixed(request: pytest.FixtureRequest, kind: str, same_size: bool) -> None:
    """The embedded store ignores If-Match, so the reply is compared; the other answers 412."""
    store: ObjectStore = request.getfixturevalue(kind)
    store.put_bytes("data", DATA)
    before = store.head("data").etag
    with store.open("data", ahead=False, **SMALL) as reader:
        assert reader.read(70_000) == DATA[:70_000]
        store.put_bytes("data", os.urandom(300_000 if same_size else 100_000))
        with pytest.raises(
            ObjectChanged, match=rf"s3://{store.bucket}/data changed.*{before}.*offset \d+ of 300000"
        ) as caught:
            reader.read()
    if kind == "store" and same_size:
        assert store.head("data").etag in str(caught.value)


def test_an_object_that_goes_away_is_noticed(store: ObjectStore) -> None:
    store.put_bytes("data", DATA)
    with store.open("data", ahead=False, **SMALL) as reader:
        reader.read(10)
        store.delete("data")
        with pytest.raises(ObjectChanged, match="now gone"):
            reader.read()


def test_replaced_while_it_is_read_ahead(proxied: ObjectStore, proxy: Any, store: ObjectStore) -> None:
    """Whatever the moment: the rows of one version, or an error."""
    versions = [bytes([version]) * 300_000 for version in (1, 2)]
    store.put_bytes("data", versions[0])
    stop = threading.Event()

    def replace() -> None:
        turn = 1
        while not stop.is_set():
            store.put_bytes("data", versions[turn % 2])
            turn += 1

    writer = threading.Thread(target=replace)
    writer.start()
    outcomes = set()
    try:
        for _ in range(15):
            with proxied.open("data", **SMALL) as reader:
                try:
                    data = reader.read()
                except ObjectChanged:
                    outcomes.add("refused")
                else:
                    assert data in versions
                    outcomes.add("read")
    finally:
        stop.set()
        writer.join()
    assert "refused" in outcomes


def test_it_survives_a_fork_in_the_middle(store: ObjectStore) -> None:
    store.put_bytes("data", DATA)
    with store.open("data", **SMALL) as reader:
        start = reader.read(120_000)
        out, into = os.pipe()
        child = os.fork()
        if child == 0:
            with os.fdopen(into, "wb") as pipe:
                pipe.write(reader.read())
            os._exit(0)
        os.close(into)
        with os.fdopen(out, "rb") as pipe:
            theirs = pipe.read()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert start + theirs == DATA
        assert start + reader.read() == DATA


@pytest.mark.parametrize("bad", [{"range_bytes": 0}, {"in_flight": 0}])
def test_settings_that_cannot_be_are_refused(store: ObjectStore, bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        store.open("data", **bad)
