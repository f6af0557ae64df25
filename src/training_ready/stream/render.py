"""Which tokens of a conversation are learned?

The tokenizer's chat template renders the conversation once; the learned tokens are those of the target role's turns,
each up to and including its end-of-turn token::

    <|im_start|>user\\nI cannot sleep.<|im_end|>\\n<|im_start|>assistant\\nSince when?<|im_end|>\\n
                                                                      ^^^^^^^^^^^^^^^^^^^^^

The borders come from rendering prefixes, not from ``{% generation %}`` marks, which most stock templates lack
(https://github.com/huggingface/trl/issues/4879); where a template has them, the first conversations are compared.

Prefixes cost two renderings a turn. Most templates write the same text around a turn whatever it says: for each
sequence of roles that is found out once, with prefixes, and then one rendering is enough, as it must equal
``frame + turn + frame + turn + …`` letter by letter. Where it does not, prefixes decide.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from training_ready import TrainingReadyError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

# Stands for a turn's text while its frame is measured; private-use characters do not occur in conversations.
_PROBE = "\ue000\ue001\ue000"
_GENERATION_MARK = re.compile(r"{%-?\s*generation\s*-?%}")
_COMPARED = 32  # conversations whose labels are compared with the template's own marks

# (first character of a turn's text, first character after it, end of the turn)
Span = tuple[int, int, int]


class RenderError(TrainingReadyError):
    """The chat template cannot be used for training, or a conversation cannot be rendered with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedConversation:
    """One conversation as tokens: ``input_ids`` int32 (T,), ``learned`` bool (T,), ``domain`` empty if unknown."""

    input_ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    domain: str = ""


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
        self._frames: dict[tuple[str, ...], list[str] | None] = {}
        marked = bool(_GENERATION_MARK.search(str(tokenizer.chat_template)))
        self._to_compare = _COMPARED if marked and target_role == "assistant" else 0

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
        [rendered] = self.render_many([messages])
        if isinstance(rendered, RenderError):
            raise rendered
        return rendered

    def render_many(
        self, conversations: Sequence[Sequence[Mapping[str, str]]]
    ) -> list[RenderedConversation | RenderError]:
        """The same for several at once, which is faster; what cannot be rendered is returned as its error."""
        laid: list[tuple[str, list[Span]] | RenderError] = []
        for messages in conversations:
            try:
                laid.append(self._lay_out(messages))
            except RenderError as error:
                laid.append(error)
        texts = [one[0] for one in laid if not isinstance(one, RenderError)]
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()  # a saved tokenizer may carry a limit of its own
        backend.no_padding()
        encodings = iter(backend.encode_batch(texts, add_special_tokens=False))
        rendered: list[RenderedConversation | RenderError] = []
        for messages, one in zip(conversations, laid, strict=True):
            if isinstance(one, RenderError):
                rendered.append(one)
                continue
            try:
                rendered.append(self._labelled(next(encodings), one[1], messages))
            except RenderError as error:
                rendered.append(error)
        return rendered

    def _lay_out(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[Span]]:
        """The text of a conversation, and where the target role's turns stand in it."""
        text = self._apply(messages)
        spans = self._framed_spans(messages, text)
        if spans is None:
            spans = self._target_spans(messages, text)
        if not spans:
            raise RenderError(
                f"no turn of the target role {self.target_role!r}: nothing would be learned from it"
            )
        return text, spans

    def _framed_spans(self, messages: Sequence[Mapping[str, str]], text: str) -> list[Span] | None:
        """The spans when the text is the known frames around the turns as they are; None when it is not."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._frames:
            self._frames[roles] = self._learn_frames(roles)
        frames = self._frames[roles]
        if frames is None:
            return None
        contents = [message["content"] for message in messages]
        if text != frames[0] + "".join(c + f for c, f in zip(contents, frames[1:], strict=True)):
            return None
        spans, at = [], len(frames[0])
        for role, content, frame in zip(roles, contents, frames[1:], strict=True):
            stop = at + len(content)
            if role == self.target_role:
                spans.append((at, stop, stop + len(frame)))
            at = stop + len(frame)
        return spans

    def _learn_frames(self, roles: tuple[str, ...]) -> list[str] | None:
        """The text before, between and after the turns, if prefixes find a probe's turns in the same places."""
        probe = [{"role": role, "content": f"\ue000{number}\ue001"} for number, role in enumerate(roles)]
        try:
            text = self._apply(probe)
            expected = [(start, stop) for start, stop, _ in self._target_spans(probe, text)]
        except RenderError:
            return None  # the conversation itself will say what is wrong
        frames, at, found = [], 0, []
        for message in probe:
            start = text.find(message["content"], at)
            if start < 0:
                return None
            frames.append(text[at:start])
            at = start + len(message["content"])
            if message["role"] == self.target_role:
                found.append((start, at))
        return [*frames, text[at:]] if found == expected else None

    def _labelled(
        self, encoding: Encoding, spans: list[Span], messages: Sequence[Mapping[str, str]]
    ) -> RenderedConversation:
        input_ids = np.asarray(encoding.ids, dtype=np.int32)
        learned = np.zeros(len(input_ids), dtype=np.bool_)
        offsets = None
        for start, suffix_start, end in spans:
            first, last = encoding.char_to_token(start), encoding.char_to_token(suffix_start)
            if (
                first is not None
                and last is not None
                and input_ids[last] == self.end_of_turn_id
                and _begins(encoding, first) >= start
                and _begins(encoding, last) == suffix_start
            ):
                learned[first : last + 1] = True
                continue
            if offsets is None:
                offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            inside = (offsets[:, 0] >= start) & (offsets[:, 1] <= end)
            learned |= inside & (offsets[:, 0] < suffix_start)
            learned[self._end_of_turn_position(input_ids, offsets, suffix_start, end)] = True
        if self._to_compare:
            self._to_compare -= 1
            self._compare_with_marks(encoding, spans, messages)
        return RenderedConversation(input_ids=input_ids, learned=learned)

    def _compare_with_marks(
        self, encoding: Encoding, spans: list[Span], messages: Sequence[Mapping[str, str]]
    ) -> None:
        """Marks must cover every turn of the therapist and nothing else; what closes a turn may be in or out."""
        marks = self._tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        for token, (start, stop) in enumerate(encoding.offsets):
            within = any(first <= start and stop <= suffix for first, suffix, _ in spans)
            closing = any(suffix <= start and stop <= end for _, suffix, end in spans)
            if not closing and bool(marks[token]) != within:
                raise RenderError(
                    f"the chat template's {{% generation %}} marks and its own text disagree about token {token} "
                    f"({self._tokenizer.decode([encoding.ids[token]])!r}): "
                    + (
                        "a part of the therapist's turn is not marked"
                        if within
                        else "marked outside of every turn"
                    )
                    + ". Correct the marks, or take them out of the template."
                )

    def _apply(self, messages: Sequence[Mapping[str, str]]) -> str:
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False))

    def _target_spans(self, messages: Sequence[Mapping[str, str]], text: str) -> list[Span]:
        """The spans of the target role's turns, from rendering the conversation up to each of them."""
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


def _begins(encoding: Encoding, token: int) -> int:
    """The first character of a token; −1 of a token that stands for none."""
    chars = encoding.token_to_chars(token)
    return -1 if chars is None else int(chars[0])
