"""What of the text so far may leave? Whole characters only, and never a part of a stop string.

    token ids ──TextDecoder──► pieces of text ──OutgoingText──► tokens, as soon as nothing in them can change

A token whose text could still turn into a stop string, or whose bytes are not yet a character, waits for the next ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
PROMPT_CONTEXT = (
    5  # tokens of the prompt to decode with, since a SentencePiece token alone loses its leading space
)


@dataclass(kw_only=True, slots=True)
class Token:
    """One token of an answer. Joined over the tokens that are not special, ``text`` is the generated text."""

    id: int
    text: str
    logprob: (
        float | None
    )  # natural logarithm, under the model's own distribution (before temperature and filters)
    special: bool = False
    top: list[Token] = field(default_factory=list)  # likeliest alternatives at this place, if asked for


class TextDecoder:
    """Token ids to text, one at a time.

    A window of the last settled tokens is decoded with and without the new ones; their difference is the new text.
    It is kept back while it ends in the middle of a character.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-PROMPT_CONTEXT:])
        self._window = 0
        self._settled = len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._ids.append(token_id)
        piece = self._pending()
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        self._window, self._settled = self._settled, len(self._ids)
        return piece

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as the tokenizer decodes them."""
        piece = self._pending()
        self._window, self._settled = self._settled, len(self._ids)
        return piece

    def _pending(self) -> str:
        before = self._decode(self._ids[self._window : self._settled])
        return self._decode(self._ids[self._window :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopMatcher:
    """Follows one stop string through the text by Knuth, Morris and Pratt: constant work per character."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0  # length of the longest end of the text that begins ``stop``
        self._fallback = [0] * len(stop)
        length = 0
        for place in range(1, len(stop)):
            while length and stop[place] != stop[length]:
                length = self._fallback[length - 1]
            length += stop[place] == stop[length]
            self._fallback[place] = length

    def feed(self, character: str) -> bool:
        """True when ``character`` completes the stop string (nothing may be fed after that)."""
        while self.matched and character != self.stop[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        self.matched += character == self.stop[self.matched]
        return self.matched == len(self.stop)


class OutgoingText:
    """Tokens in, tokens out once nothing in them can change.

    Args:
        stop: the answer ends where the first of these is complete.
        keep_stop: leave that stop string at the end of the text (TGI's native routes) or cut it off (OpenAI's).
    """

    def __init__(self, stop: Iterable[str], *, keep_stop: bool) -> None:
        self.text = ""
        self.stopped = False
        self._keep_stop = keep_stop
        self._matchers = [StopMatcher(text) for text in stop]
        self._waiting: list[tuple[Token, int]] = []  # with the place in ``text`` where each begins

    def push(self, token: Token, piece: str) -> list[Token]:
        """Add a token that completes ``piece``; returns the tokens that may leave now.

        A special token has no text in the answer: a piece that comes with it belongs to the tokens before.
        """
        if token.special:
            self._extend(piece)
            self._move_behind_text()
            self._waiting.append((token, len(self.text)))
        else:
            self._waiting.append((token, len(self.text)))
            self._extend(piece)
        if self.stopped:
            return self.close()
        held = max((matcher.matched for matcher in self._matchers), default=0)
        return self._release(len(self.text) - held)

    def close(self) -> list[Token]:
        """The end: everything that waits may leave."""
        return self._release(len(self.text), final=True)

    def _extend(self, piece: str) -> None:
        """Add ``piece`` to the text, up to the first stop string that it completes."""
        if self.stopped:
            return
        for place, character in enumerate(piece, 1):
            complete = [len(matcher.stop) for matcher in self._matchers if matcher.feed(character)]
            if complete:
                self.stopped = True
                cut = 0 if self._keep_stop else max(complete)
                self.text = (self.text + piece[:place])[: len(self.text) + place - cut]
                return
        self.text += piece

    def _move_behind_text(self) -> None:
        """Let new text belong to the last ordinary token that waits, not to special ones after it."""
        for place in reversed(range(len(self._waiting))):
            token, _ = self._waiting[place]
            if not token.special:
                return
            self._waiting[place] = (token, len(self.text))

    def _release(self, safe: int, *, final: bool = False) -> list[Token]:
        """Let go of the tokens whose text ends at or before ``safe``."""
        length = len(self.text)  # less than the place where a token began, if a stop string was cut off
        ends = [*(min(start, length) for _, start in self._waiting), length][1:]
        released = []
        for (token, start), end in zip(self._waiting, ends, strict=False):
            unfinished = start == length and not token.special  # its bytes are not a character yet
            if not final and (end > safe or unfinished):
                break
            if not token.special:
                token.text = self.text[start:end]
            released.append(token)
        del self._waiting[: len(released)]
        return released
