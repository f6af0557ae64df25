"""Rows of every format, whole or refused: a cut file is never taken for a shorter one."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from training_ready.corpus.readers import Row, SourceError, read_table

ROWS = [{"question": f'q {n}\n"quoted", ünï', "answer": f"a {n}"} for n in range(300)]


def as_csv(delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["question", "answer"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def as_parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=100)
    return sink.getvalue()


FILES = {
    "x.csv": as_csv(),
    "x.tsv": as_csv("\t"),
    "x.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in ROWS),
    "x.json": json.dumps(ROWS).encode(),
    "y.json": json.dumps({"about": "a set", "conversations": ROWS}).encode(),
    "x.parquet": as_parquet(),
}


def zstd(data: bytes) -> bytes:
    half = len(data) // 2  # two frames: tools that append make such files
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


COMPRESSED = {
    name + suffix: pack(data)
    for name, data in FILES.items()
    if name != "x.parquet"
    for suffix, pack in ((".gz", gzip.compress), (".zst", zstd))
}


def read(data: bytes, name: str, **options: str) -> list[Row]:
    return list(read_table(io.BytesIO(data), name, **options).rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [*FILES, *COMPRESSED])
def test_every_format_gives_the_same_rows(name: str) -> None:
    rows = read({**FILES, **COMPRESSED}[name], name)
    assert [row.value for row in rows] == ROWS
    assert len({row.position for row in rows}) == len(ROWS)


@pytest.mark.parametrize("name", [*COMPRESSED, "x.json", "y.json", "x.parquet"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_cut_file_is_an_error_and_not_a_shorter_file(name: str, share: float) -> None:
    data = {**FILES, **COMPRESSED}[name]
    with pytest.raises(SourceError, match=name):
        read(data[: int(len(data) * share)], name)


def test_a_zst_stream_cut_after_a_whole_line_is_refused() -> None:
    """Such a cut looks like a clean end to everything but the frame."""
    line = json.dumps(ROWS[0]).encode() + b"\n"
    packer = zstandard.ZstdCompressor().compressobj()
    flushed = packer.compress(line * 3) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(SourceError, match=r"x\.jsonl\.zst.*in the middle of a frame"):
        read(flushed, "x.jsonl.zst")


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.jsonl", "x.parquet"])
def test_the_stream_stays_open_for_its_owner(name: str) -> None:
    stream = io.BytesIO({**FILES, **COMPRESSED}[name])
    list(read_table(stream, name).rows)
    assert not stream.closed


def test_positions_lead_back_to_the_row() -> None:
    rows = read(b'a,b\n"two\nlines",x\nlast,y\n', "x.csv")
    assert [row.position for row in rows] == ["line 2", "line 4"]
    rows = read(b'{"a":1}\n\n{"a":2}\n', "x.jsonl")
    assert [row.position for row in rows] == ["line 1", "line 3"]
    rows = read('[{"a":"ä"}, {"a":2}]'.encode(), "x.json")
    assert [row.position for row in rows] == ["item 0 (byte 1)", "item 1 (byte 13)"]


def test_bad_lines_cost_themselves_only() -> None:
    rows = read(b'\xef\xbb\xbf{"a":1}\nnot json\nnull\n[1]\n{"a":"\xff"}\n{"a":2}', "x.jsonl")
    assert [row.value for row in rows] == [{"a": 1}, None, None, None, None, {"a": 2}]
    assert all(bool(row.problem) == (row.value is None) for row in rows)


def test_csv_rows_of_another_width_cost_themselves_only() -> None:
    rows = read(b"a,b\n1,2\n1\n1,2,3\n\n3,4\n", "x.csv")
    assert [row.problem for row in rows] == ["", "1 cells, the header has 2", "3 cells, the header has 2", ""]


def test_csv_with_byte_order_mark_and_long_cells() -> None:
    long = "x" * 200_000  # beyond the csv module's own limit
    rows = read(f"\ufefftext,other\r\n{long},1\r\n".encode(), "x.csv")
    assert rows[0].value == {"text": long, "other": "1"}


@pytest.mark.parametrize(
    ("data", "name", "why"),
    [
        (b"", "x.csv", "empty"),
        (b"a,b,a\n1,2,3\n", "x.csv", "'a'"),
        (b'a,b\n"never closed,2\n', "x.csv", "line 2"),
        (b'a,b\n"x"y,2\n', "x.csv", "line 2"),
        (b"PAR1 but not really", "x.parquet", "not a whole Parquet file"),
        (b"whatever", "x.gz", "cannot tell the format"),
        (b"whatever", "x.xlsx", r"\.csv, \.tsv"),
        (b"not gzip", "x.jsonl.gz", "gzip"),
        (b"not zstd", "x.jsonl.zst", "x.jsonl.zst"),
        (b"PAR1", "x.parquet.gz", "without .gz"),
    ],
)
def test_unreadable_files_are_named(data: bytes, name: str, why: str) -> None:
    with pytest.raises(SourceError, match=why):
        read(data, name)


def test_a_format_can_be_said() -> None:
    assert read(b'{"a":1}\n', "x.txt", format="jsonl")[0].value == {"a": 1}
    assert read(b'{"items": [{"a":1}]}', "x.json", records_key="items")[0].value == {"a": 1}


@given(
    st.binary(max_size=200),
    st.sampled_from(["x.csv", "x.jsonl", "x.json", "x.jsonl.zst", "x.csv.gz", "x.parquet"]),
)
def test_arbitrary_bytes_give_rows_or_a_source_error(data: bytes, name: str) -> None:
    with contextlib.suppress(SourceError):
        assert all((row.value is None) == bool(row.problem) for row in read(data, name))
