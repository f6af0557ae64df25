"""The window over a JSON array equals a parse of the whole, at every chunk size."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_ready.corpus.json_array import JsonArrayError, read_json_array

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=4), children, max_size=3)
    ),
    max_leaves=8,
)
LAYOUT = st.sampled_from([None, 0, 2, 20])


def read(data: bytes, key: str = "conversations", **window: int) -> list[tuple[int, object]]:
    return [(item.offset, item.value) for item in read_json_array(io.BytesIO(data), key, **window)]


@given(
    items=st.lists(VALUES, max_size=6),
    chunk=st.integers(1, 40),
    indent=LAYOUT,
    ascii=st.booleans(),
    bom=st.booleans(),
)
def test_array_equals_json_loads_at_any_chunk_size(
    items: list[object], chunk: int, indent: int | None, ascii: bool, bom: bool
) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii)
    data = text.encode("utf-8-sig" if bom else "utf-8")
    found = read(data, chunk_bytes=chunk)
    assert [value for _, value in found] == json.loads(data.decode("utf-8-sig"))
    for offset, value in found:  # the offset is where the item can be read again
        assert json.JSONDecoder().raw_decode(data[offset:].decode("utf-8"))[0] == value


@given(
    items=st.lists(VALUES, max_size=4),
    around=st.dictionaries(st.text(max_size=5), VALUES, max_size=3),
    chunk=st.integers(1, 40),
)
def test_array_under_a_key_equals_json_loads(
    items: list[object], around: dict[str, object], chunk: int
) -> None:
    whole = {**around, "conversations": items, "tail": around}
    data = json.dumps(whole).encode()
    assert [value for _, value in read(data, chunk_bytes=chunk)] == items


@given(
    items=st.lists(VALUES, min_size=1, max_size=5),
    around=st.none() | st.dictionaries(st.text(max_size=5), VALUES, max_size=2),
    chunk=st.integers(1, 40),
)
def test_it_goes_on_behind_any_item(
    items: list[object], around: dict[str, object] | None, chunk: int
) -> None:
    whole = items if around is None else {**around, "conversations": items, "tail": around}
    data = json.dumps(whole, ensure_ascii=False).encode()
    for number, item in enumerate(read_json_array(io.BytesIO(data), "conversations")):
        stream = io.BytesIO(data)
        stream.seek(item.end)
        rest = list(
            read_json_array(stream, "conversations", after=(item.end, item.nested), chunk_bytes=chunk)
        )
        assert [one.value for one in rest] == items[number + 1 :]
        for one in rest:
            assert json.JSONDecoder().raw_decode(data[one.offset :].decode())[0] == one.value


def test_numbers_cut_by_the_window_are_whole() -> None:
    data = b"[1.5e+10, -0.25, 123456789, 1e5, true, null]"
    for chunk in range(1, len(data) + 1):
        assert [value for _, value in read(data, chunk_bytes=chunk)] == json.loads(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"   \n", "empty"),
        (b'"text"', "expected"),
        (b"[{}", "end of the file"),
        (b"[{},", "not JSON"),
        (b"[{} {}]", "expected"),
        (b"[1 2]", "expected"),
        (b"[{}]x", "end of the file"),
        (b'{"a": 1}\n{"a": 2}', "jsonl"),
        (b'{"conversation": []}', "Did you mean 'conversation'"),
        (b'{"conversations": {}}', "should hold an array"),
        (b'{"conversations": [], "conversations": []}', "twice"),
        (b'[{"a": tru}]', "not JSON"),
        (b'[{"a": "never closed]', "not JSON"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_broken_files_are_refused_with_their_place(data: bytes, why: str, chunk: int) -> None:
    with pytest.raises(JsonArrayError, match=rf"byte \d+: .*{why}"):
        read(data, chunk_bytes=chunk)


def test_nesting_beyond_reason_is_refused() -> None:
    with pytest.raises(JsonArrayError, match="nested too deeply"):
        read(b"[" * 100_000)


def test_memory_stays_at_one_item_and_one_chunk() -> None:
    class Counting(io.BytesIO):
        asked = 0

        def read(self, size: int | None = -1) -> bytes:
            self.asked = max(self.asked, size or 0)
            return super().read(size)

    stream = Counting(b"[" + b",".join(b'{"text": "%s"}' % (b"x" * 100) for _ in range(5000)) + b"]")
    assert sum(1 for _ in read_json_array(stream, "conversations", chunk_bytes=1000)) == 5000
    assert stream.asked < 3000


def test_a_quote_that_never_closes_does_not_swallow_the_file() -> None:
    with pytest.raises(JsonArrayError, match="longer than 1,000 characters"):
        read(b'["' + b"x" * 1_000_000, chunk_bytes=100, max_item_chars=1000)


def test_bytes_that_are_not_utf8_cost_one_item_and_not_the_file() -> None:
    found = [value for _, value in read(b'["good", "b\xffd", "good too"]', chunk_bytes=3)]
    assert found == ["good", "b\udcffd", "good too"]
