"""OpenAI's dialect over a real socket."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from huggingface_hub import InferenceClient

from training_ready.serving.model import ServedModel

COUNT = "one two three four five six seven eight nine ten"
Render = Callable[[str], str]


@pytest.fixture
def client(url: str) -> InferenceClient:
    return InferenceClient(model=url, token="none")


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def chat(url: str, **body: Any) -> httpx2.Response:
    return httpx2.post(url + "/v1/chat/completions", json={"messages": user("Count"), **body}, timeout=60)


def complete(url: str, **body: Any) -> httpx2.Response:
    return httpx2.post(url + "/v1/completions", json=body, timeout=60)


def chunks(response: httpx2.Response) -> list[dict[str, Any]]:
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def test_client_chats(client: InferenceClient, served: ServedModel, chat_prompt: Render) -> None:
    reply = client.chat_completion(user("Count"), max_tokens=100, temperature=0)
    assert reply.choices[0].message.content == COUNT
    assert reply.choices[0].finish_reason == "stop"
    inputs = len(served.tokenizer(chat_prompt("Count"), add_special_tokens=False)["input_ids"])
    answer = len(served.tokenizer(COUNT + "<|im_end|>")["input_ids"])
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (inputs, answer)
    assert reply.usage.total_tokens == inputs + answer


def test_client_chats_in_a_stream(client: InferenceClient) -> None:
    question = user("Say it in colours")
    whole = client.chat_completion(question, max_tokens=120, temperature=0).choices[0].message.content
    assert "🌍" in whole
    stream = client.chat_completion(
        question, max_tokens=120, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    *parts, usage = list(stream)
    pieces = [part.choices[0].delta.content for part in parts]
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert (usage.choices, usage.usage.completion_tokens) == ([], len(parts))


def test_stop_strings_are_cut_off_and_never_begun(url: str) -> None:
    for stop in ("three", ["ree fo", "nine"]):
        body = {"temperature": 0, "stop": stop}
        first = stop if isinstance(stop, str) else stop[0]
        expected = COUNT[: COUNT.index(first)]
        choice = chat(url, **body).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (expected, "stop")
        pieces = [each["choices"][0]["delta"]["content"] for each in chunks(chat(url, **body, stream=True))]
        assert "".join(pieces) == expected


def test_temperature_zero_is_greedy_and_no_temperature_samples(url: str) -> None:
    def ask(**body: Any) -> str:
        content: str = chat(url, messages=user("zzz"), max_tokens=20, **body).json()["choices"][0]["message"][
            "content"
        ]
        return content

    assert ask(temperature=0) == ask(temperature=0, top_p=1, seed=5)
    assert len({ask(temperature=2.0) for _ in range(4)}) > 1
    assert ask(seed=9, temperature=2.0) == ask(seed=9, temperature=2.0)


def test_a_last_message_of_the_assistant_is_continued(url: str) -> None:
    messages = [*user("Count"), {"role": "assistant", "content": "one two three"}]
    reply = chat(url, messages=messages, temperature=0).json()
    assert "one two three" + reply["choices"][0]["message"]["content"] == COUNT


def test_content_in_parts_is_joined_and_pictures_are_refused(url: str) -> None:
    parts = [{"type": "text", "text": "Co"}, {"type": "text", "text": "unt"}]
    reply = chat(url, messages=[{"role": "user", "content": parts}], temperature=0).json()
    assert reply["choices"][0]["message"]["content"] == COUNT
    picture = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
    response = chat(url, messages=[{"role": "user", "content": [*parts, picture]}])
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert "image_url modality is not supported" in response.json()["error"]


def test_logprobs_of_a_chat(url: str) -> None:
    reply = chat(url, temperature=0, logprobs=True, top_logprobs=2).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == COUNT + "<|im_end|>"
    for each in content:
        assert len(each["top_logprobs"]) == 2
        assert each["logprob"] == each["top_logprobs"][0]["logprob"]
        assert sum(math.exp(top["logprob"]) for top in each["top_logprobs"]) <= 1 + 1e-6
    assert chat(url, temperature=0).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"n": 2}, "`n` must be 1. Given: 2"),
        ({"logit_bias": {"5": 1}}, "`logit_bias` is not supported"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is not supported"),
        ({"tools": [{"type": "function"}]}, "`tools` are not supported"),
        ({"top_logprobs": 2}, "`top_logprobs` needs `logprobs`"),
        ({"messages": []}, "`messages` cannot be empty"),
        ({"temperature": -1}, "`temperature` must be strictly positive"),
        ({"presence_penalty": 3}, "`presence_penalty` must be"),
        ({"max_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"max_tokens": 9999}, "and 9999 `max_new_tokens`"),
    ],
)
def test_chat_refuses_what_it_does_not_do(url: str, body: dict[str, Any], reason: str) -> None:
    response = chat(url, **body)
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert reason in response.json()["error"]


def test_a_template_that_refuses_is_a_template_error(url: str) -> None:
    response = chat(url, messages=[{"role": "villain", "content": "x"}])
    assert (response.status_code, response.json()["error_type"]) == (422, "template_error")
    assert "unknown role villain" in response.json()["error"]


def test_an_error_inside_a_stream_is_an_event(url: str) -> None:
    response = chat(url, max_tokens=9999, stream=True)
    assert response.status_code == 200
    [event] = chunks(response)
    assert event["error"]["http_status_code"] == 422
    assert "9999" in event["error"]["message"]


def test_completions_of_several_prompts(url: str, chat_prompt: Render) -> None:
    prompts = [chat_prompt("Count"), chat_prompt("Hello"), "z"]
    reply = complete(url, prompt=prompts, temperature=0, max_tokens=60).json()
    alone = [complete(url, prompt=each, temperature=0, max_tokens=60).json() for each in prompts]
    assert [each["text"] for each in reply["choices"]] == [each["choices"][0]["text"] for each in alone]
    assert [each["index"] for each in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["total_tokens"] == sum(each["usage"]["total_tokens"] for each in alone)
    texts = ["", "", ""]
    reasons: dict[int, str] = {}
    for chunk in chunks(complete(url, prompt=prompts, temperature=0, max_tokens=60, stream=True)):
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        assert choice["index"] not in reasons
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
            assert chunk["usage"] == alone[choice["index"]]["usage"]
    assert texts == [each["text"] for each in reply["choices"]]
    assert reasons == {i: each["choices"][0]["finish_reason"] for i, each in enumerate(alone)}


def test_completions_refusals(url: str) -> None:
    suffix = complete(url, prompt="a", suffix="b")
    assert (suffix.status_code, suffix.json()["error_type"]) == (422, "suffix not supported")
    for body, reason in (
        ({"prompt": ["a"] * 5}, "up to 4 prompts. Given: 5"),
        ({"prompt": []}, "cannot be an empty list"),
        ({"prompt": "a", "logprobs": 1}, "`logprobs` is not supported"),
        ({"prompt": ["a", ""]}, "`inputs` cannot be empty"),
    ):
        response = complete(url, **body)
        assert response.status_code == 422
        assert reason in response.json()["error"]


def test_models_lists_the_one_model(url: str, served: ServedModel) -> None:
    [model] = httpx2.get(url + "/v1/models").json()["data"]
    assert (model["id"], model["object"]) == (served.name, "model")
