"""Which inputs prove an export? Conversations and a text in many scripts, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache

Messages = Sequence[Mapping[str, str]]

_SYSTEM = "You listen first.\n  Never diagnose. "
_CLIENT = ' I can\'t sleep — "since May".\n{{ not a tag }} {% nor this %} {# nor this #}'
_THERAPIST = "That sounds hard <sighs>.\nWhat keeps you awake?\n"
_MORE = "Über alles Mögliche 你好 🙂"


def _turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    turns = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CONVERSATIONS: Mapping[str, Messages] = {
    "single-turn": _turns(_CLIENT),
    "multi-turn": _turns(_CLIENT, _THERAPIST, _MORE, _THERAPIST, _CLIENT),
    "system": _turns(_CLIENT, _THERAPIST, _MORE, system=_SYSTEM),
    "empty-system": _turns(_CLIENT, system=""),
}

# First and last letter of scripts with letters in a row; the ideographs and syllables are the common ones.
_SCRIPTS = (
    (0x61, 0x7A), (0xDF, 0xFF), (0x370, 0x3CF), (0x400, 0x45F), (0x531, 0x556), (0x5D0, 0x5EA), (0x620, 0x64A),
    (0x904, 0x939), (0x985, 0x9B9), (0xB85, 0xBB9), (0xE01, 0xE2E), (0x10D0, 0x10F0), (0x1200, 0x1246),
    (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x1F600, 0x1F64F),
)  # fmt: skip
_BETWEEN = (
    " ",
    " ",
    " ",
    " ",
    ", ",
    ". ",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "! ",
    "?",
    "'s ",
    "-",
    " 1984 ",
    "\r\n",
    "\u00a0",
    "e\u0301",
)


@cache
def multilingual_text(size: int = 1_000_000, seed: int = 0) -> tuple[str, ...]:
    """Paragraphs of made-up words in 18 scripts, about `size` bytes of UTF-8 in all; the same for the same seed."""
    choose = random.Random(seed)  # noqa: S311  (not a secret)
    paragraphs, written = [], 0
    while written < size:
        first, last = choose.choice(_SCRIPTS)
        words = []
        for _ in range(choose.randint(20, 120)):
            letters = "".join(chr(choose.randint(first, last)) for _ in range(choose.randint(1, 9)))
            words.append(
                (letters.capitalize() if choose.random() < 0.2 else letters) + choose.choice(_BETWEEN)
            )
        paragraphs.append("".join(words))
        written += len(paragraphs[-1].encode())
    return tuple(paragraphs)
