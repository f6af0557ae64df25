"""Normalised text: what becomes plain, and what must survive untouched."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training_ready.corpus.text import normalise_text


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("  one\u00a0two\t three  ", "one two three"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("one\n \u00a0\n\n\ntwo", "one\n\ntwo"),
        ("zero\u200bwidth\ufeff and soft\u00adhyphen", "zerowidth and softhyphen"),
        ("<p>First.</p><p>Second<br/>line.</p>", "First.\n\nSecond\nline."),
        ('<p class="a b">One</p>\n<div id=x>Two</div>', "One\n\nTwo"),
        (
            "Try:<ul><li>rest</li><li>a <b>walk</b></li></ul>Then call.",
            "Try:\n\n- rest\n- a walk\n\nThen call.",
        ),
        ('see <a href="https://example.org/?a=1&amp;b=2">this page</a>', "see this page"),
        ('<img src="x.png" alt="a calm lake"/> breathe', "a calm lake breathe"),
        ("before<!-- a note\n -->after<script>alert(1)</script>", "beforeafter"),
        ("fish &amp; chips &lt;3 &#8217;quoted&#x2019;", "fish & chips <3 \u2019quoted\u2019"),
        ("&amp;lt;", "&lt;"),
        ("e\u0301", "\u00e9"),
        ("bell\x07 and nul\x00", "bell and nul"),
        ("", ""),
        ("\u00a0<br>\n", ""),
    ],
)
def test_markup_and_blanks_become_plain_text(raw: str, plain: str) -> None:
    assert normalise_text(raw) == plain


@pytest.mark.parametrize(
    "text",
    [
        "I <3 you and a < b > c",
        "<i think so> is what she said",
        "write to <me@example.org>",
        "https://example.org/?a=1&copy=2&reg=3",
        "R&B, AT&T; and so on",
        "family \U0001f469\u200d\U0001f467 and \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "<client> I do not know",
        "two\n\nparagraphs\nand a line",
    ],
)
def test_ordinary_writing_is_left_alone(text: str) -> None:
    assert normalise_text(text) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_no_letter_or_digit_is_ever_lost_from_text_without_markup(text: str) -> None:
    text = re.sub("[<&]", "", text)

    def letters(of: str) -> list[str]:
        import unicodedata

        return [char for char in unicodedata.normalize("NFC", of) if char.isalnum()]

    assert letters(normalise_text(text)) == letters(text)
    assert normalise_text(normalise_text(text)) == normalise_text(text)


def test_an_unclosed_tag_costs_no_more_than_linear_work() -> None:
    hostile = "<a " + " " * 20_000 + "<p x='" * 5_000
    assert normalise_text(hostile).startswith("<a <p x='")
