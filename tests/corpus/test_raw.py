"""Raw objects as a stream: from any place on the same rows follow, and a bad row is named or counted."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from training_ready.corpus.raw import BadRow, RawPosition, RawSource, iter_raw
from training_ready.corpus.raw_objects import find_objects
from training_ready.corpus.readers import SourceError
from training_ready.storage.objects import ObjectStore

ROWS = [
    {"prompt": f'row {n}\u00e4, "quoted"\nand more', "response": f"answer {n} " * (n % 5 + 1)}
    for n in range(23)
]


def expected(rows: list[dict[str, str]]) -> list[list[str]]:
    return [[row["prompt"], row["response"].strip()] for row in rows]


def as_csv(newline: str = "\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["prompt", "response"], lineterminator=newline)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode("utf-8-sig")


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(ROWS), sink, row_group_size=5, write_page_checksum=True, compression="none"
    )
    return sink.getvalue()


def in_frames(data: bytes, pack: Any, frames: int = 4) -> bytes:
    size = len(data) // frames + 1
    return b"".join(pack(data[start : start + size]) for start in range(0, len(data), size))


PLAIN = {
    "x.csv": as_csv(),
    "crlf.csv": as_csv("\r\n"),
    "cr.csv": as_csv("\r"),
    "x.jsonl": b"\xef\xbb\xbf" + b"\n".join(json.dumps(row).encode() + b"\r" for row in ROWS),
    "x.json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "under_a_key.json": json.dumps({"about": ["a", 1], "conversations": ROWS, "end": {}}).encode(),
    "x.parquet": as_parquet(),
}
FILES = PLAIN | {
    f"{name}{suffix}": in_frames(data, pack)
    for name, data in PLAIN.items()
    if name.endswith(("csv", "jsonl", "json"))
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstandard.compress))
}


def texts(source: RawSource, position: RawPosition | None = None, **options: Any) -> list[list[str]]:
    return [
        [message["content"] for message in messages] for _, messages in iter_raw(source, position, **options)
    ]


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def source_of(*paths: str, store: Any = None, **options: Any) -> RawSource:
    return RawSource(name="numbers", objects=find_objects(paths, store), **options)


@pytest.mark.parametrize("name", FILES)
def test_it_goes_on_exactly_from_behind_any_row(local: Path, name: str) -> None:
    source = source_of(f"{local}/{name}", f"{local}/x.jsonl" if name != "x.jsonl" else f"{local}/x.csv")
    whole = list(iter_raw(source))
    assert [[m["content"] for m in messages] for _, messages in whole] == expected(ROWS) * 2
    assert {tuple(m["role"] for m in messages) for _, messages in whole} == {("user", "assistant")}
    for number, (position, _) in enumerate(whole):
        saved = json.loads(json.dumps(position.as_json()))
        assert len(json.dumps(saved)) < 300
        assert texts(source, RawPosition.from_json(saved)) == (expected(ROWS) * 2)[number + 1 :]


def test_a_compressed_object_goes_on_at_its_frame(store: ObjectStore) -> None:
    """Not from the beginning: only the last frame before the place is read again."""
    noisy = [
        json.dumps({"prompt": f"{n}", "response": os.urandom(1500).hex()}).encode() + b"\n"
        for n in range(2000)
    ]
    data = b"".join(zstandard.compress(b"".join(noisy[n : n + 100])) for n in range(0, 2000, 100))
    store.put_bytes("raw/x.jsonl.zst", data)
    source = source_of("raw/x.jsonl.zst", store=store)
    position = next(position for position, messages in iter_raw(source) if messages[0]["content"] == "1850")
    before = store.traffic.cost().bytes
    assert [text[0] for text in texts(source, position)] == [str(n) for n in range(1851, 2000)]
    assert store.traffic.cost().bytes - before < len(data) * 0.15


def test_objects_of_a_bucket_by_pattern_in_the_order_of_their_keys(store: ObjectStore) -> None:
    for name, data in FILES.items():
        store.put_bytes(f"raw/{name}", data)
    store.put_bytes("raw/notes.txt", b"not ours")
    source = source_of("raw/x.json*", f"s3://{store.bucket}/raw/x.parquet", store=store)
    names = [one.uri.rpartition("/")[2] for one in source.objects]
    assert names == ["x.json", "x.json.gz", "x.json.zst", "x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"]
    assert texts(source) == expected(ROWS) * 7


def test_a_bad_row_is_named_with_object_line_and_byte(local: Path) -> None:
    good = json.dumps(ROWS[0]).encode()
    (local / "bad.jsonl").write_bytes(good + b"\n\n" + good + b"\n{oops\n" + good)
    source = source_of(f"{local}/bad.jsonl")
    at = len(good) * 2 + 3
    with pytest.raises(SourceError, match=rf"{local}/bad\.jsonl: line 4, byte {at}: not JSON.*not allowed"):
        texts(source)
    assert (local / "bad.jsonl").read_bytes()[at:].startswith(b"{oops")


def test_bad_rows_are_set_aside_up_to_a_limit_that_counts_across_a_resume(local: Path) -> None:
    good, blank = json.dumps(ROWS[0]), json.dumps({"prompt": " ", "response": "x"})
    lines = [good, "null", good, blank, good, '{"other": 1}', good]
    (local / "bad.jsonl").write_text("\n".join(lines))
    aside: list[BadRow] = []
    source = source_of(f"{local}/bad.jsonl", bad_rows=3)
    whole = list(iter_raw(source, set_aside=aside.append))
    assert len(whole) == 4
    assert [row.position for row in aside] == ["line 2", "line 4", "line 6"]
    assert [row.why.split()[0] for row in aside] == ["a", "turn", "no"]
    assert [position.bad for position, _ in whole] == [0, 1, 2, 3]
    strict = replace(source, bad_rows=2)
    with pytest.raises(SourceError, match=r"line 6, byte \d+: .*bad row number 3, 2 allowed"):
        texts(strict)
    with pytest.raises(SourceError, match="bad row number 3, 2 allowed"):
        texts(strict, whole[2][0])


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json", "x.parquet", "under_a_key.json.zst"])
def test_an_object_that_was_cut_off_stops_the_stream(local: Path, name: str) -> None:
    data = FILES[name]
    for share in (0.2, 0.6, 0.999):
        (local / name).write_bytes(data[: int(len(data) * share)])
        with pytest.raises(SourceError, match=f"{local}/{name}"):
            texts(source_of(f"{local}/{name}"))


def test_a_frame_cut_between_two_rows_stops_the_stream(local: Path) -> None:
    lines = PLAIN["x.jsonl"].splitlines(keepends=True)
    packer = zstandard.ZstdCompressor().compressobj()
    cut = packer.compress(b"".join(lines[:5])) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (local / "x.jsonl.zst").write_bytes(cut)
    with pytest.raises(SourceError, match=r"x\.jsonl\.zst.*after line 5.*in the middle of a frame"):
        texts(source_of(f"{local}/x.jsonl.zst"))


@pytest.mark.parametrize("name", ["x.jsonl", "x.parquet", "x.json.zst"])
def test_a_flipped_bit_in_the_store_is_noticed(proxied: ObjectStore, proxy: Any, name: str) -> None:
    proxied.put_bytes(name, FILES[name])
    source = source_of(name, store=proxied)
    proxy.always = "flip"
    with pytest.raises(SourceError, match=f"{proxied.bucket}/{name}"):
        texts(source)


def test_a_changed_object_or_source_is_refused(store: ObjectStore, local: Path) -> None:
    store.put_bytes("x.jsonl", PLAIN["x.jsonl"])
    source = source_of("x.jsonl", store=store)
    position, _ = next(iter_raw(source))
    store.put_bytes("x.jsonl", PLAIN["x.jsonl"] + b"\n")
    with pytest.raises(SourceError, match=r"s3://.*x\.jsonl was changed after it was found"):
        texts(source, position)
    found_again = source_of("x.jsonl", store=store)
    with pytest.raises(SourceError, match="another state of 'numbers'"):
        texts(found_again, position)
    on_disk = source_of(f"{local}/x.csv")
    (local / "x.csv").write_bytes(PLAIN["x.csv"] + b"more,more\n")
    with pytest.raises(SourceError, match=r"x\.csv was changed"):
        texts(on_disk)


def test_paths_that_name_nothing_or_twice_the_same_are_refused(store: ObjectStore, local: Path) -> None:
    for path in ("raw/none.jsonl", "raw/*.jsonl", f"{local}/none.jsonl", f"{local}/*.none"):
        with pytest.raises(SourceError, match="nothing there has this name"):
            find_objects([path], store)
    with pytest.raises(SourceError, match="more than once"):
        find_objects([f"{local}/x.csv", f"{local}/x.c*"], store)
    with pytest.raises(SourceError, match="hf://datasets/owner/name"):
        find_objects(["hf://somewhere"], store)


class _Hub(BaseHTTPRequestHandler):
    """The two routes by which the hub's own client finds and fetches the files of a dataset."""

    commit = "c" * 40

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        data, headers = b"", {}
        if self.path.split("?")[0] in ("/api/datasets/own/set/revision/main", "/api/datasets/own/set"):
            files = [{"rfilename": f"data/{name}"} for name in PLAIN]
            data = json.dumps({"id": "own/set", "sha": self.commit, "siblings": files}).encode()
        elif self.path.startswith(f"/datasets/own/set/resolve/{self.commit}/data/"):
            data = PLAIN[self.path.rpartition("/")[2]]
            headers = {"X-Repo-Commit": self.commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self.send_response(200 if data else 404)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)  # HF_ENDPOINT is read at import
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join((endpoint, *template[1:])))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield endpoint
    server.shutdown()
    server.server_close()


def test_files_of_a_hub_dataset_pinned_to_a_commit(hub: str, store: ObjectStore) -> None:
    source = source_of("hf://datasets/own/set@main/data/x.*", store=store)
    assert {one.version for one in source.objects} == {_Hub.commit}
    assert source.objects[0].uri == f"hf://datasets/own/set@{_Hub.commit}/data/x.csv"
    assert texts(source) == expected(ROWS) * 4
    with pytest.raises(SourceError, match="the hub does not show"):
        find_objects(["hf://datasets/own/other/x.csv"], store)
