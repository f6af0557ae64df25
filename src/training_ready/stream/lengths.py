"""What happens to a conversation that is longer than a pack? One policy, and every row and token counted.

=============  ================================================================================================
``truncate``   its end is cut off; without a learned token left it is dropped
``split_turns``  it becomes several rows, cut between turns: each begins with the system message, goes on where the
               one before ended, and ends with a learned turn, so every turn is learned once
``drop``       it is left out
``error``      the run stops
=============  ================================================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training_ready.stream.render import ChatRenderer, RenderedConversation
from training_ready.stream.shards import StreamError

Messages = Sequence[Mapping[str, str]]


@dataclass(kw_only=True, slots=True)
class TokenCounts:
    """Rows and tokens through the length policy.

    Conversations in = ``rows`` − ``split_pieces`` + ``split_rows`` + ``dropped_rows`` where no piece was dropped.
    """

    rows: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    dropped_rows: int = 0
    dropped_tokens: int = 0
    split_rows: int = 0
    split_pieces: int = 0

    def add(self, other: TokenCounts) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthPolicy:
    """What happens to a conversation of more than ``max_length`` tokens."""

    max_length: int
    overlong: str = "truncate"

    def apply(
        self, row: RenderedConversation, messages: Messages, renderer: ChatRenderer, counts: TokenCounts
    ) -> list[RenderedConversation]:
        """The rows that will be trained; none when it is dropped. Counted in any case.

        Raises:
            StreamError: the conversation is too long and the policy is ``error``.
            RenderError: a piece of it cannot be rendered.
        """
        excess = len(row.input_ids) - self.max_length
        if excess > 0 and self.overlong == "error":
            raise StreamError(
                f"a conversation has {len(row.input_ids)} tokens, {excess} more than max_length {self.max_length}; "
                "raise max_length, or set stream.overlong to truncate, split_turns or drop"
            )
        if excess > 0 and self.overlong == "split_turns":
            pieces = self._pieces(messages, renderer)
            counts.split_rows += len(pieces) > 1
            counts.split_pieces += len(pieces) if len(pieces) > 1 else 0
            return [kept for piece in pieces for kept in self._fitted(piece, counts)]
        return self._fitted(row, counts)

    def _fitted(self, row: RenderedConversation, counts: TokenCounts) -> list[RenderedConversation]:
        """The row, cut or dropped if it is too long."""
        length = len(row.input_ids)
        if length > self.max_length:
            cut = RenderedConversation(
                input_ids=row.input_ids[: self.max_length], learned=row.learned[: self.max_length]
            )
            if self.overlong == "drop" or not cut.learned.any():
                counts.dropped_rows += 1
                counts.dropped_tokens += length
                return []
            row = cut
            counts.truncated_rows += 1
            counts.truncated_tokens += length - self.max_length
        counts.rows += 1
        counts.tokens += len(row.input_ids)
        counts.learned_tokens += int(row.learned.sum())
        return [row]

    def _pieces(self, messages: Messages, renderer: ChatRenderer) -> list[RenderedConversation]:
        """As few rows as whole exchanges allow; an exchange that is too long by itself is a row of its own."""
        system, exchanges = _exchanges(messages, renderer.target_role)
        pieces: list[RenderedConversation] = []
        open_turns: list[Mapping[str, str]] = []
        open_row: RenderedConversation | None = None
        for exchange in exchanges:
            longer = renderer.render([*system, *open_turns, *exchange])
            if open_row is not None and len(longer.input_ids) > self.max_length:
                pieces.append(open_row)
                open_turns, longer = [], renderer.render([*system, *exchange])
            open_turns, open_row = [*open_turns, *exchange], longer
        return [*pieces, open_row] if open_row is not None else pieces


def _exchanges(
    messages: Messages, target_role: str
) -> tuple[list[Mapping[str, str]], list[list[Mapping[str, str]]]]:
    """The system messages at the beginning, and the turns up to each learned one; what follows the last joins it."""
    start = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    exchanges: list[list[Mapping[str, str]]] = []
    current: list[Mapping[str, str]] = []
    for message in messages[start:]:
        current.append(message)
        if message["role"] == target_role:
            exchanges.append(current)
            current = []
    if current and exchanges:
        exchanges[-1] = [*exchanges[-1], *current]
    return list(messages[:start]), exchanges
