"""Text leaves in whole characters, and never with a part of a stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training_ready.serving.model import ServedModel
from training_ready.serving.text import REPLACEMENT, OutgoingText, StopMatcher, TextDecoder, Token


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("aé你🌍👩‍👧 \n\ufffd"), min_size=1, max_size=30))
def test_pieces_are_whole_characters_and_join_to_the_text(served: ServedModel, text: str) -> None:
    ids = served.tokenizer(text)["input_ids"]
    decoder = TextDecoder(served.tokenizer, served.tokenizer("prompt")["input_ids"])
    pieces = [decoder.push(each) for each in ids]
    assert "".join(pieces) + decoder.flush() == text
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in piece for piece in pieces)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(min_value=0, max_value=280), max_size=40))
def test_any_token_ids_give_what_the_tokenizer_decodes(served: ServedModel, ids: list[int]) -> None:
    decoder = TextDecoder(served.tokenizer, [])
    pieces = [decoder.push(each) for each in ids]
    assert "".join(pieces) + decoder.flush() == served.tokenizer.decode(ids, skip_special_tokens=True)


def test_nothing_is_sent_before_a_character_is_complete(served: ServedModel) -> None:
    ids = served.tokenizer("🌍")["input_ids"]
    decoder = TextDecoder(served.tokenizer, [])
    assert len(ids) == 4
    assert [decoder.push(each) for each in ids] == ["", "", "", "🌍"]


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab", max_size=40), stop=st.text(alphabet="ab", min_size=1, max_size=6))
def test_the_matcher_finds_the_first_end_and_knows_every_beginning(text: str, stop: str) -> None:
    matcher = StopMatcher(stop)
    found = next((place for place in range(1, len(text) + 1) if text[:place].endswith(stop)), None)
    for place, character in enumerate(text, 1):
        done = matcher.feed(character)
        assert done == (place == found)
        if done:
            return
        beginnings = [n for n in range(len(stop)) if text[:place].endswith(stop[:n])]
        assert matcher.matched == max(beginnings)


def _text_of(tokens: list[Token]) -> str:
    return "".join(token.text for token in tokens if not token.special)


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.tuples(st.text(alphabet="ab🌍", max_size=4), st.booleans()), min_size=1, max_size=15),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    keep=st.booleans(),
)
def test_streamed_text_is_the_final_text_and_only_grows(
    pieces: list[tuple[str, bool]], stops: list[str], keep: bool
) -> None:
    outgoing = OutgoingText(stops, keep_stop=keep)
    tokens: list[Token] = []
    sent: list[Token] = []
    full = ""
    snapshots = [""]
    for number, (piece, special) in enumerate(pieces):
        if special and all(token.special for token in tokens[len(sent) :]):
            piece = ""  # text that comes with a special token belongs to an ordinary one that waits
        tokens.append(Token(id=number, text="<s>", logprob=0.0, special=special))
        sent += outgoing.push(tokens[-1], piece)
        full += piece
        snapshots.append(_text_of(sent))
        if outgoing.stopped:
            break
    if not outgoing.stopped:
        sent += outgoing.close()
    assert [token.id for token in sent] == list(range(len(sent)))
    assert _text_of(sent) == outgoing.text
    assert all(outgoing.text.startswith(earlier) for earlier in snapshots)
    assert all(later.startswith(earlier) for earlier, later in pairwise(snapshots))
    ends = [(full.find(stop) + len(stop), -len(stop)) for stop in stops if stop in full]
    if not ends:
        assert outgoing.text == full
    else:
        end, length = min(ends)
        assert outgoing.text == (full[:end] if keep else full[: end + length])


@pytest.mark.parametrize("stop", ["a" * 1000, "ab" * 500])
def test_a_stop_string_that_almost_matches_all_the_time_costs_little(stop: str) -> None:
    matcher = StopMatcher(stop)
    comparisons = 0

    class Counted(str):
        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            nonlocal comparisons
            comparisons += 1
            return str.__getitem__(self, key)

    matcher.stop = Counted(stop)
    for character in (stop[:-1] + "#") * 10:
        assert not matcher.feed(character)
    assert comparisons <= 3 * 10 * len(stop)
