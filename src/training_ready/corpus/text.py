"""What does a cell say? Markup and whitespace become plain text with its paragraphs kept."""

from __future__ import annotations

import html
import re
import unicodedata

# Only names of real elements count as markup, so "a < b", "<3" and "<me@example.org>" stay as they were written.
_PARAGRAPH = "p|div|h[1-6]|ul|ol|dl|table|blockquote|pre|section|article|hr"
_LINE = "br|tr|dt|dd"
_INLINE = (
    "a|abbr|b|big|cite|code|del|em|font|i|ins|kbd|mark|q|s|small|span|strike|strong|sub|sup|tt|u"
    "|td|th|tbody|thead"
)
# Attributes must be name=value: "<i think so>" is somebody's words, not an element.
_ATTRIBUTES = r"(?:\s+[\w:-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'<>]+))*\s*/?"

_INVISIBLE_ELEMENT = re.compile(r"<!--.*?-->|<(script|style)\b[^>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
_PARAGRAPH_TAG = re.compile(rf"</?(?:{_PARAGRAPH}){_ATTRIBUTES}>", re.IGNORECASE)
_LINE_TAG = re.compile(rf"</?(?:{_LINE}){_ATTRIBUTES}>", re.IGNORECASE)
_ITEM_TAG = re.compile(rf"<li{_ATTRIBUTES}>", re.IGNORECASE)
_ITEM_END = re.compile(r"</li\s*>", re.IGNORECASE)
_INLINE_TAG = re.compile(rf"</?(?:{_INLINE}){_ATTRIBUTES}>", re.IGNORECASE)
_IMAGE_TAG = re.compile(rf"<img{_ATTRIBUTES}>", re.IGNORECASE)
_ALT_TEXT = re.compile(r"\salt\s*=\s*(?:\"([^\"]*)\"|'([^']*)')", re.IGNORECASE)
# The semicolon is required: without it "?a=1&copy=2" in a link would turn into a copyright sign.
_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);")

_LINE_ENDINGS = re.compile("\r\n|[\r\v\f\x85\u2028]")
# Control characters, zero-width space, word joiner, byte-order mark, soft hyphen. U+200C and U+200D stay: Persian and
# emoji need them.
_DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u2060\ufeff\u00ad]")
_EMPTY_LINES = re.compile(r"\n{3,}")


def normalise_text(text: str) -> str:
    """Plain text of ``text``: NFC, "\\n" line ends, single blanks, at most one empty line, no markup.

    Tags of known HTML elements become line or paragraph breaks, list items start with "- ", an image becomes its
    alternative text, character references become their characters (once: "&amp;lt;" is "&lt;"). Anything else stays.
    """
    text = _LINE_ENDINGS.sub("\n", text).replace("\u2029", "\n\n")
    if "<" in text:
        text = _without_tags(text)
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
        text = _LINE_ENDINGS.sub("\n", text).replace("\u2029", "\n\n")
    text = _DROPPED.sub("", text)
    text = unicodedata.normalize("NFC", text)
    # What str.split takes for a blank and is none (line ends, separators) is not in the text any more.
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return _EMPTY_LINES.sub("\n\n", "\n".join(lines)).strip()


def _without_tags(text: str) -> str:
    text = _INVISIBLE_ELEMENT.sub("", text)
    text = _IMAGE_TAG.sub(_alternative_text, text)
    text = _ITEM_END.sub("", _ITEM_TAG.sub("\n- ", text))
    text = _PARAGRAPH_TAG.sub("\n\n", text)
    text = _LINE_TAG.sub("\n", text)
    return _INLINE_TAG.sub("", text)


def _alternative_text(tag: re.Match[str]) -> str:
    found = _ALT_TEXT.search(tag.group())
    return (found.group(1) or found.group(2) or "") if found else ""
