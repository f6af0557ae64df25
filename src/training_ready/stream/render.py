"""Which tokens of a conversation are learned?

The tokenizer's chat template renders the conversation once; the learned tokens are those of the target role's turns,
each up to and including its end-of-turn token::

    <|im_start|>user\\nI cannot sleep.<|im_end|>\\n<|im_start|>assistant\\nSince when?<|im_end|>\\n
                                                                      ^^^^^^^^^^^^^^^^^^^^^

The borders come from rendering prefixes, not from ``{% generation %}`` marks, which most stock templates lack
(https://github.com/huggingface/trl/issues/4879).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from training_ready import TrainingReadyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a turn's text while its frame is measured; private-use characters do not occur in conversations.
_PROBE = "\ue000\ue001\ue000"


class RenderError(TrainingReadyError):
    """The chat template cannot be used for training, or a conversation cannot be rendered with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedConversation:
    """One conversation as tokens: ``input_ids`` int32 (T,), ``learned`` bool (T,)."""

    input_ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]


class ChatRenderer:
    """Renders conversations with the tokenizer's chat template and marks the target role's tokens as learned."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, target_role: str) -> None:
        """
        Raises:
            RenderError: no chat template, no fast tokenizer, or no end-of-turn token after the target role's turn.
        """
        if not tokenizer.chat_template:
            raise RenderError(
                f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template, so conversations cannot be "
                "rendered. Give one with `chat_template_path: <file.jinja>` in the recipe."
            )
        if not tokenizer.is_fast:
            raise RenderError(
                f"{tokenizer.name_or_path or 'the tokenizer'} is not a fast tokenizer: it cannot say which "
                "characters a token covers, so learned tokens cannot be marked."
            )
        self._tokenizer = tokenizer
        self.target_role = target_role
        self.end_of_turn_id = self._find_end_of_turn()

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokenizer, its chat template and the target role: equal means equal tokens and labels."""
        digest = hashlib.sha256()
        template = self._tokenizer.chat_template
        for part in (self._tokenizer.backend_tokenizer.to_str(), str(template), self.target_role):
            digest.update(len(part).to_bytes(8, "big") + part.encode())
        return digest.hexdigest()

    def render(self, messages: Sequence[Mapping[str, str]]) -> RenderedConversation:
        """Tokens of one conversation.

        Raises:
            RenderError: the template rewrites earlier turns, alters a turn's text, or no token would be learned.
        """
        text = self._apply(messages)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        learned = np.zeros(len(input_ids), dtype=np.bool_)
        for start, suffix_start, end in self._target_spans(messages, text):
            inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
            learned |= inside & (offsets[:, 0] < suffix_start)
            learned[self._end_of_turn_position(input_ids, offsets, suffix_start, end)] = True
        if not learned.any():
            raise RenderError(
                f"no turn of the target role {self.target_role!r}: nothing would be learned from it"
            )
        return RenderedConversation(input_ids=input_ids, learned=learned)

    def _apply(self, messages: Sequence[Mapping[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False))

    def _target_spans(self, messages: Sequence[Mapping[str, str]], text: str) -> list[tuple[int, int, int]]:
        """(first character of the turn's text, first character after it, end of the turn) per target turn."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != self.target_role:
                continue
            through = self._apply(messages[: index + 1])
            framed = self._apply([*messages[:index], {**message, "content": _PROBE}])
            start = framed.find(_PROBE)
            if not (text.startswith(through) and start >= 0 and through.startswith(framed[:start])):
                raise RenderError(
                    f"the chat template changes earlier turns when turn {index + 1} is added, so a turn has no fixed "
                    "place in the text; use a template that only appends"
                )
            suffix_length = len(framed) - start - len(_PROBE)
            spans.append((start, len(through) - suffix_length, len(through)))
        return spans

    def _end_of_turn_position(
        self, input_ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], start: int, end: int
    ) -> int:
        inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (input_ids == self.end_of_turn_id)
        positions = np.flatnonzero(inside)
        if not len(positions):
            token = self._tokenizer.convert_ids_to_tokens(self.end_of_turn_id)
            raise RenderError(f"no end-of-turn token {token!r} after a turn of {self.target_role!r}")
        return int(positions[0])

    def _find_end_of_turn(self) -> int:
        """The first special token that the template writes after a turn of the target role."""
        other = "assistant" if self.target_role == "user" else "user"
        turns = [{"role": other, "content": "a"}, {"role": self.target_role, "content": _PROBE}]
        if self.target_role == "user":
            turns = turns[1:]  # many templates insist that the user speaks first
        text = self._apply(turns)
        suffix = text[text.rindex(_PROBE) + len(_PROBE) :]
        special = set(self._tokenizer.all_special_ids) | set(self._tokenizer.added_tokens_decoder)
        for token_id in self._tokenizer(suffix, add_special_tokens=False)["input_ids"]:
            if token_id in special:
                return int(token_id)
        raise RenderError(
            f"the chat template ends a turn of {self.target_role!r} with {suffix!r}, which holds no special token: "
            "the model would never learn to stop. Use a template with an end-of-turn token."
        )
