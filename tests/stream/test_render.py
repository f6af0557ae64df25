"""Which tokens are learned: exactly the target role's turns and their end-of-turn token, whatever the template."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training_ready.stream.render import ChatRenderer, RenderError
from training_ready.training.tokenizer import train_tokenizer

CONVERSATION = [
    {"role": "system", "content": "You listen."},
    {"role": "user", "content": "I cannot sleep."},
    {"role": "assistant", "content": "Since when has sleep been away?"},
    {"role": "user", "content": "Since the move, three weeks."},
    {"role": "assistant", "content": "What changed at night with the move?"},
]
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + "
    "m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
NO_END_OF_TURN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
DROPS_HISTORY = (
    "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([m["content"] for m in CONVERSATION] * 3, vocab_size=400)


def learned_texts(renderer: ChatRenderer, tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    rendered = renderer.render(messages)
    texts, current = [], []
    for token, learned in zip(rendered.input_ids.tolist(), rendered.learned.tolist(), strict=True):
        if learned:
            current.append(token)
        elif current:
            texts, current = [*texts, tokenizer.decode(current)], []
    return [*texts, tokenizer.decode(current)] if current else texts


@pytest.mark.parametrize("role", ["assistant", "user"])
def test_labels_decode_to_the_target_turns_and_their_end(tokenizer: Any, role: str) -> None:
    renderer = ChatRenderer(tokenizer, role)
    expected = [m["content"] + "<|im_end|>" for m in CONVERSATION if m["role"] == role]
    assert learned_texts(renderer, tokenizer, CONVERSATION) == expected


def test_another_template_with_another_end_of_turn(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"bos_token": "<|begin|>"})
    other.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    other.chat_template = LLAMA
    renderer = ChatRenderer(other, "assistant")
    assert other.convert_ids_to_tokens(renderer.end_of_turn_id) == "<|eot_id|>"
    expected = [m["content"] + "<|eot_id|>" for m in CONVERSATION if m["role"] == "assistant"]
    assert learned_texts(renderer, other, CONVERSATION) == expected


def test_tokens_are_those_of_the_chat_template(tokenizer: Any) -> None:
    rendered = ChatRenderer(tokenizer, "assistant").render(CONVERSATION)
    expected = tokenizer.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)["input_ids"]
    assert rendered.input_ids.tolist() == list(expected)


@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.text(min_size=1, max_size=40)),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_text_is_learned_whole(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    # Control tokens in a client's own words are the corpus gates' business.
    messages = [{"role": role, "content": text} for role, text in turns if "<|" not in text]
    targets = [m for m in messages if m["role"] == "assistant"]
    if not targets:
        return
    rendered = ChatRenderer(tokenizer, "assistant").render(messages)
    learned = tokenizer.decode(rendered.input_ids[rendered.learned].tolist())
    assert learned == "".join(m["content"] + "<|im_end|>" for m in targets)


def test_content_that_repeats_the_header_is_found_in_the_right_place(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "assistant"}, {"role": "assistant", "content": "assistant"}]
    assert learned_texts(ChatRenderer(tokenizer, "assistant"), tokenizer, messages) == ["assistant<|im_end|>"]
    rendered = ChatRenderer(tokenizer, "assistant").render(messages)
    assert np.flatnonzero(rendered.learned)[0] > len(rendered.input_ids) // 2


@pytest.mark.parametrize(
    ("template", "message"),
    [(NO_END_OF_TURN, "never learn to stop"), (None, "no chat template")],
)
def test_a_template_that_cannot_teach_to_stop_is_refused(
    tokenizer: Any, template: str | None, message: str
) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    with pytest.raises(RenderError, match=message):
        ChatRenderer(other, "assistant")


def test_a_template_that_rewrites_history_is_refused(tokenizer: Any) -> None:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = DROPS_HISTORY
    with pytest.raises(RenderError, match="changes earlier turns"):
        ChatRenderer(other, "assistant").render(CONVERSATION)


def test_nothing_to_learn_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(RenderError, match="nothing would be learned"):
        ChatRenderer(tokenizer, "assistant").render([{"role": "user", "content": "Hello?"}])
