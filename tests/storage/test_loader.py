from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import orjson
import pytest
import zstandard

from training_ready.storage.errors import ObjectNotFound, SettingsError, StorageError
from training_ready.storage.loader import S3DatasetLoader, load_dataset_from_s3
from training_ready.storage.objects import ObjectStore


def conversation(number: int, size: int) -> dict[str, Any]:
    return {"id": number, "text": f"Gespräch {number} " + "ä\u2028\u0085x" * (size // 8)}


def as_lines(rows: list[Any]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def compress(data: bytes, suffix: str) -> bytes:
    half = len(data) // 2  # two frames, as appending to a log makes them
    if suffix == ".gz":
        return gzip.compress(data[:half]) + gzip.compress(data[half:])
    if suffix == ".zst":
        frames = [
            zstandard.ZstdCompressor(write_checksum=True).compress(part)
            for part in (data[:half], data[half:])
        ]
        return b"".join(frames)
    return data


@pytest.fixture
def loader(store_environment: ObjectStore) -> S3DatasetLoader:
    return S3DatasetLoader()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_records_larger_than_any_buffer_are_never_cut(
    loader: S3DatasetLoader, store: ObjectStore, suffix: str
) -> None:
    """An earlier reader lost every record that crossed one of its 8,192-byte borders."""
    rows = [conversation(number, 9_000) for number in range(1_000)]
    assert min(len(orjson.dumps(row)) for row in rows) > 8_192
    store.put_bytes(f"a.jsonl{suffix}", compress(as_lines(rows), suffix))
    assert list(loader.stream_jsonl(f"a.jsonl{suffix}")) == rows


def test_one_record_of_many_megabytes(loader: S3DatasetLoader, store: ObjectStore) -> None:
    rows = [conversation(1, 20), conversation(2, 12_000_000), conversation(3, 20)]
    store.put_bytes("a.jsonl", as_lines(rows))
    assert list(loader.stream_jsonl("a.jsonl")) == rows


def test_through_a_bad_network_the_rows_are_the_same(proxied: ObjectStore, proxy: Any) -> None:
    rows = [conversation(number, 2_000) for number in range(2_000)]
    proxied.put_bytes("a.jsonl", as_lines(rows))
    settings = proxied.settings
    loader = S3DatasetLoader(
        proxied.bucket, proxy.url, settings.access_key_id, settings.secret_access_key, settings.region
    )
    proxy.faults = ["cut", "reset", "busy", "cut", "nothing", "reset"]
    assert list(loader.stream_jsonl("a.jsonl")) == rows
    assert proxy.faults == []


def test_what_a_line_may_be(loader: S3DatasetLoader, store: ObjectStore) -> None:
    store.put_bytes("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n[2]\nnull\n"last, without an end"')
    assert list(loader.stream_jsonl("a.jsonl")) == [{"a": 1}, [2], None, "last, without an end"]
    store.put_bytes("empty.jsonl", b"")
    assert list(loader.stream_jsonl("empty.jsonl")) == []


@pytest.mark.parametrize("bad", [b'{"a": ', b"{'a': 1}", b'{"a": "\xff"}', b"NaN", b"\x00\x00"])
def test_a_bad_line_is_named_by_number_and_offset(
    loader: S3DatasetLoader, store: ObjectStore, bad: bytes
) -> None:
    good = as_lines([conversation(number, 100) for number in range(3)])
    store.put_bytes("a.jsonl", good + b"\n" + bad + b"\n" + good)
    rows = loader.stream_jsonl("a.jsonl")
    assert [next(rows)["id"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(
        StorageError, match=rf"s3://{store.bucket}/a\.jsonl:5: .*byte offset {len(good) + 1} "
    ):
        next(rows)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_cut_off_frame_is_an_error_wherever_it_is_cut(
    loader: S3DatasetLoader, store: ObjectStore, suffix: str
) -> None:
    """Even between two records, where every line so far is good."""
    rows = [conversation(number, 500) for number in range(50)]
    whole = compress(as_lines(rows), suffix)
    for length in (0, 1, 7, len(whole) // 3, len(whole) - 9, len(whole) - 1):
        store.put_bytes(f"a.jsonl{suffix}", whole[:length])
        with pytest.raises(StorageError, match=rf"a\.jsonl{suffix}: .*(cut off|damaged)"):
            list(loader.stream_jsonl(f"a.jsonl{suffix}"))


def test_a_zst_cut_at_a_record_is_not_taken_for_its_end(loader: S3DatasetLoader, store: ObjectStore) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    written = compressor.compress(as_lines([{"a": 1}] * 10))
    written += compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)  # whole records, but the frame goes on
    store.put_bytes("a.jsonl.zst", written)
    with pytest.raises(StorageError, match="middle of a frame"):
        list(loader.stream_jsonl("a.jsonl.zst"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_flipped_bit_in_a_frame_is_an_error(
    loader: S3DatasetLoader, store: ObjectStore, suffix: str
) -> None:
    whole = bytearray(compress(as_lines([conversation(number, 500) for number in range(50)]), suffix))
    whole[len(whole) // 4] ^= 1
    store.put_bytes(f"a.jsonl{suffix}", bytes(whole))
    with pytest.raises(StorageError):
        list(loader.stream_jsonl(f"a.jsonl{suffix}"))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_whole_documents(loader: S3DatasetLoader, store: ObjectStore, suffix: str) -> None:
    document = {"conversations": [conversation(number, 50) for number in range(10)]}
    plain = b"\xef\xbb\xbf" + orjson.dumps(document)
    stored = compress(plain, suffix)
    store.put_bytes(f"a.json{suffix}", stored)
    assert loader.load_json(f"a.json{suffix}") == document
    assert loader.load_text(f"a.json{suffix}") == plain.decode("utf-8-sig")
    assert loader.load_bytes(f"s3://{store.bucket}/a.json{suffix}") == stored


def test_bad_documents_say_where(loader: S3DatasetLoader, store: ObjectStore) -> None:
    store.put_bytes("a.json", b'{\n  "a": oops\n}')
    with pytest.raises(StorageError, match=rf"s3://{store.bucket}/a\.json:2:8: not JSON"):
        loader.load_json("a.json")
    store.put_bytes("a.txt", b"abc\xffdef")
    with pytest.raises(StorageError, match=r"a\.txt: not UTF-8 at byte 3"):
        loader.load_text("a.txt")


def test_what_exists_and_what_is_listed(
    loader: S3DatasetLoader, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("datasets/gdrive/raw/a.json", "datasets/gdrive/raw/b.json", "elsewhere/c.json"):
        store.put_bytes(key, b"{}")
    assert loader.list_datasets() == [
        "datasets/gdrive/raw/a.json",
        "datasets/gdrive/raw/b.json",
        "elsewhere/c.json",
    ]
    monkeypatch.setenv("OVH_S3_ROOT_PREFIX", "datasets")
    below = S3DatasetLoader()
    listed = below.list_datasets("gdrive/raw/")
    assert listed == ["gdrive/raw/a.json", "gdrive/raw/b.json"]
    assert [below.load_json(key) for key in listed] == [{}, {}]
    assert below.object_exists(f"s3://{store.bucket}/elsewhere/c.json")
    assert not below.object_exists("elsewhere/c.json")


def test_a_missing_object_is_an_error_at_the_call(loader: S3DatasetLoader) -> None:
    with pytest.raises(ObjectNotFound):
        loader.stream_jsonl("none.jsonl")


def test_half_a_key_pair_and_shown_secrets(store: ObjectStore) -> None:
    with pytest.raises(SettingsError, match="together"):
        S3DatasetLoader(store.bucket, aws_access_key_id="only-half")
    shown = repr(S3DatasetLoader("bucket", "http://127.0.0.1:1", "the-access-key", "the-secret-key", "gra"))
    assert "the-" not in shown
    assert "gra" in shown


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.usefixtures("loader")
def test_load_dataset_by_its_name(store: ObjectStore, suffix: str) -> None:
    rows = [{"a": 1}, {"a": 2}]
    store.put_bytes(f"gdrive/processed/priority/r.jsonl{suffix}", compress(as_lines(rows), suffix))
    store.put_bytes(f"acquired/d.json{suffix}", compress(b'{"conversations": []}', suffix))
    assert load_dataset_from_s3(f"r.jsonl{suffix}", "priority") == rows
    assert load_dataset_from_s3(f"d.json{suffix}", bucket=store.bucket) == {"conversations": []}
    with pytest.raises(ObjectNotFound, match=r"gdrive/processed/voice/d\.xml"):
        load_dataset_from_s3("d.xml", "voice")
    store.put_bytes("acquired/d.csv", b"a,b\n")
    with pytest.raises(StorageError, match=r"'\.csv' is no format that loads whole"):
        load_dataset_from_s3("d.csv")


@pytest.mark.usefixtures("loader")
def test_the_local_copy_is_only_a_cache(store: ObjectStore, tmp_path: Path) -> None:
    copy = tmp_path / "cache" / "d.json"
    store.put_bytes("acquired/d.json", b"[1]")
    assert load_dataset_from_s3("d.json", cache_local=copy) == [1]
    first = os.stat(copy).st_ino
    assert load_dataset_from_s3("d.json", cache_local=str(copy)) == [1]
    assert os.stat(copy).st_ino == first  # not downloaded again

    store.put_bytes("acquired/d.json", b"[2]")  # the bucket decides
    assert load_dataset_from_s3("d.json", cache_local=copy) == [2]
    copy.write_bytes(b"[3]")  # a damaged copy
    assert load_dataset_from_s3("d.json", cache_local=copy) == [2]
    note = copy.with_name("d.json.source.json")
    note.write_text("{")  # a damaged note
    assert load_dataset_from_s3("d.json", cache_local=copy) == [2]
    assert json.loads(note.read_text())["uri"] == f"s3://{store.bucket}/acquired/d.json"
    assert sorted(path.name for path in copy.parent.iterdir()) == ["d.json", "d.json.source.json"]

    store.delete("acquired/d.json")
    with pytest.raises(ObjectNotFound):
        load_dataset_from_s3("d.json", cache_local=copy)


@pytest.mark.usefixtures("loader")
def test_somebodys_own_file_is_not_overwritten(store: ObjectStore, tmp_path: Path) -> None:
    own = tmp_path / "notes.json"
    own.write_text("mine")
    store.put_bytes("acquired/d.json", b"[1]")
    with pytest.raises(StorageError, match="no copy of an object"):
        load_dataset_from_s3("d.json", cache_local=own)
    assert own.read_text() == "mine"
