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


MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)


def with_template(tokenizer: Any, template: str) -> Any:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_a_templates_own_marks_must_agree(tokenizer: Any) -> None:
    good = with_template(tokenizer, MARKED)
    assert learned_texts(ChatRenderer(good, "assistant"), good, CONVERSATION) == [
        m["content"] + "<|im_end|>" for m in CONVERSATION if m["role"] == "assistant"
    ]
    ChatRenderer(with_template(tokenizer, MARKED.replace("'assistant' %}{%", "'user' %}{%")), "user").render(
        CONVERSATION
    )  # marks are the therapist's: they say nothing about a simulated client
    for wrong in (MARKED.replace("== 'assistant'", "!= 'system'"), MARKED.replace("'assistant'", "'nobody'")):
        with pytest.raises(RenderError, match="marks and its own text disagree"):
            ChatRenderer(with_template(tokenizer, wrong), "assistant").render(CONVERSATION)


TRIMS = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.strip() + '<|im_end|>\n' }}{% endfor %}"


@given(
    st.lists(st.text(alphabet="ab <|>im_end\n\u00e9", max_size=12), min_size=2, max_size=6),
    st.sampled_from(["own", LLAMA, TRIMS]),
)
@settings(max_examples=60, deadline=None)
def test_frames_give_what_prefixes_give(tokenizer: Any, texts: list[str], template: str) -> None:
    messages = [{"role": ["user", "assistant"][n % 2], "content": text} for n, text in enumerate(texts)]
    other = tokenizer if template == "own" else with_template(tokenizer, template)
    if template == LLAMA:
        other.add_special_tokens({"bos_token": "<|begin|>"})
        other.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    fast, slow = ChatRenderer(other, "assistant"), ChatRenderer(other, "assistant")
    slow._framed_spans = lambda messages, text: None  # type: ignore[method-assign]
    [one], [two] = fast.render_many([messages]), slow.render_many([messages])
    if isinstance(one, RenderError) or isinstance(two, RenderError):
        assert str(one) == str(two)
        return
    assert one.input_ids.tolist() == two.input_ids.tolist()
    assert one.learned.tolist() == two.learned.tolist()


def test_one_bad_conversation_does_not_hide_the_others(tokenizer: Any) -> None:
    good, bad = CONVERSATION, [{"role": "user", "content": "Hello?"}]
    found = ChatRenderer(tokenizer, "assistant").render_many([good, bad, good])
    assert [isinstance(one, RenderError) for one in found] == [False, True, False]
