"""TGI's dialect over a real socket, with the real client and with the body as it is on the wire."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

from training_ready import __version__
from training_ready.serving.model import ServedModel

Generated = Callable[[str, int], tuple[list[int], str]]
Render = Callable[[str], str]


@pytest.fixture
def client(url: str) -> InferenceClient:
    return InferenceClient(model=url, token="none")


def post(url: str, path: str, body: Any) -> httpx2.Response:
    return httpx2.post(url + path, json=body, timeout=60)


def events(url: str, path: str, body: Any) -> list[dict[str, Any]]:
    """The stream's events, read with nothing but the grammar ``data: {json}\\n\\n``."""
    response = post(url, path, body)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


@pytest.mark.parametrize("prompt", ["Hello", "Grüße 🌍", "one two"])
def test_client_gets_the_answer_of_generate(
    client: InferenceClient, served: ServedModel, generated: Generated, prompt: str
) -> None:
    ids, text = generated(prompt, 30)
    assert client.text_generation(prompt, max_new_tokens=30, return_full_text=False) == text
    output = client.text_generation(
        prompt,
        max_new_tokens=30,
        details=True,
        decoder_input_details=True,
        return_full_text=False,
        top_n_tokens=2,
    )
    assert output.generated_text == text
    assert [token.id for token in output.details.tokens] == ids
    assert output.details.generated_tokens == len(ids)
    assert output.details.seed is None
    assert [token.id for token in output.details.prefill] == served.tokenizer(prompt)["input_ids"]
    assert [top[0]["id"] for top in output.details.top_tokens] == ids


def test_client_streams_the_same_answer(
    client: InferenceClient, generated: Generated, chat_prompt: Render
) -> None:
    prompt = chat_prompt("Say it in colours")
    ids, text = generated(prompt, 120)
    assert "🌍, 你好, 👩‍👩‍👧 and naïve" in text, "the premise: the answer has characters of several tokens"
    plain = list(client.text_generation(prompt, max_new_tokens=120, stream=True))
    assert "".join(plain[:-1]) == text
    assert plain[-1] == "<|im_end|>"
    assert not any("\ufffd" in piece for piece in plain)
    detailed = list(
        client.text_generation(prompt, max_new_tokens=120, stream=True, details=True, return_full_text=False)
    )
    assert [each.token.id for each in detailed] == ids
    assert [each.index for each in detailed] == list(range(1, len(ids) + 1))
    assert [each.generated_text for each in detailed[:-1]] == [None] * (len(ids) - 1)
    assert detailed[-1].generated_text == text
    assert detailed[-1].details.finish_reason == "eos_token"
    assert detailed[-1].details.generated_tokens == len(ids)


def test_root_returns_the_prompt_too_unless_told(url: str, generated: Generated) -> None:
    _, text = generated("Hello", 5)
    body = {"inputs": "Hello", "parameters": {"max_new_tokens": 5}}
    assert post(url, "/", body).json() == [{"generated_text": "Hello" + text}]
    assert events(url, "/", body | {"stream": True})[-1]["generated_text"] == "Hello" + text
    assert post(url, "/generate", body).json() == {"generated_text": text}
    body["parameters"]["return_full_text"] = True  # type: ignore[index]
    assert post(url, "/generate", body).json() == {"generated_text": "Hello" + text}


def test_without_parameters_it_samples_and_with_an_empty_object_it_does_not(
    url: str, generated: Generated
) -> None:
    sampled = {post(url, "/generate", {"inputs": "z"}).json()["generated_text"] for _ in range(4)}
    assert len(sampled) > 1
    prompt = "z" * 240
    assert (
        post(url, "/generate", {"inputs": prompt, "parameters": {}}).json()["generated_text"]
        == generated(prompt, 16)[1]
    )


def test_sampling_parameters_switch_sampling_on_and_the_seed_is_told(url: str) -> None:
    parameters = {"temperature": 2.5, "max_new_tokens": 20, "details": True}
    first = post(url, "/generate", {"inputs": "x", "parameters": parameters}).json()
    seed = first["details"]["seed"]
    again = post(url, "/generate", {"inputs": "x", "parameters": parameters | {"seed": seed}}).json()
    assert again == first
    other = post(url, "/generate", {"inputs": "x", "parameters": parameters | {"seed": seed + 1}}).json()
    assert other["generated_text"] != first["generated_text"]


def test_finish_reasons(url: str, chat_prompt: Render) -> None:
    def details(**parameters: Any) -> dict[str, Any]:
        body = {"inputs": chat_prompt("Count"), "parameters": {"details": True, **parameters}}
        answer = post(url, "/generate", body).json()
        return {**answer["details"], "text": answer["generated_text"]}

    assert details()["finish_reason"] == "eos_token"
    length = details(max_new_tokens=3)
    assert (length["finish_reason"], length["generated_tokens"]) == ("length", 3)
    stopped = details(stop=["three"])
    assert (stopped["finish_reason"], stopped["text"]) == ("stop_sequence", "one two three")


def test_truncate_keeps_the_last_tokens(url: str, served: ServedModel, generated: Generated) -> None:
    text = "never mind this beginning. Hello"
    kept = served.tokenizer(text)["input_ids"][-4:]
    body = {"inputs": text, "parameters": {"truncate": 4, "max_new_tokens": 8, "decoder_input_details": True}}
    answer = post(url, "/generate", body).json()
    assert [token["id"] for token in answer["details"]["prefill"]] == kept
    assert answer["generated_text"] == generated(served.tokenizer.decode(kept), 8)[1]


def test_omitted_length_fills_the_context(url: str) -> None:
    body = {"inputs": "z" * 200, "parameters": {"details": True}}
    details = post(url, "/generate", body).json()["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 56)


def test_timing_headers_add_up(url: str) -> None:
    headers = post(url, "/generate", {"inputs": "Hello", "parameters": {"max_new_tokens": 7}}).headers
    assert headers["x-generated-tokens"] == "7"
    assert headers["x-compute-characters"] == "5"
    assert headers["x-compute-type"] == "cpu"
    parts = sum(int(headers[f"x-{part}-time"]) for part in ("validation", "queue", "inference"))
    assert parts <= int(headers["x-total-time"]) <= parts + 3
    assert int(headers["x-prompt-tokens"]) > 0


def test_tokenize_tells_where_each_token_stands(url: str, served: ServedModel) -> None:
    text = "Grüße, <|im_start|> 🌍"
    tokens = post(url, "/tokenize", {"inputs": text}).json()
    assert [token["id"] for token in tokens] == served.tokenizer(text)["input_ids"]
    assert all(token["text"] == text[token["start"] : token["stop"]] for token in tokens)


def test_chat_tokenize_shows_the_rendered_prompt(url: str, served: ServedModel, chat_prompt: Render) -> None:
    answer = post(url, "/chat_tokenize", {"messages": [{"role": "user", "content": "Hello"}]}).json()
    assert answer["templated_text"] == chat_prompt("Hello")
    ids = [token["id"] for token in answer["tokenize_response"]]
    assert ids == served.tokenizer(chat_prompt("Hello"), add_special_tokens=False)["input_ids"]


def test_info_is_true(url: str, served: ServedModel) -> None:
    info = httpx2.get(url + "/info").json()
    assert info["model_id"] == served.name
    assert info["model_sha"] is None
    assert (info["model_dtype"], info["model_device_type"]) == ("float32", "cpu")
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (255, 256)
    assert (info["max_concurrent_requests"], info["version"]) == (128, __version__)


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
def test_health_is_empty_when_well(url: str, path: str) -> None:
    response = httpx2.get(url + path)
    assert (response.status_code, response.content) == (200, b"")


REFUSED = {
    "`temperature` must be strictly positive": {"temperature": 0.0},
    "`temperature` must be strictly positive ": {"temperature": -1.5},
    "`top_p` must be > 0.0 and < 1.0": {"top_p": 1.0},
    "`typical_p` must be > 0.0 and < 1.0": {"typical_p": 0},
    "`top_k` must be strictly positive": {"top_k": 0},
    "`repetition_penalty` must be strictly positive": {"repetition_penalty": 0},
    "`frequency_penalty` must be >= -2.0 and <= 2.0": {"frequency_penalty": 2.5},
    "`max_new_tokens` must be strictly positive": {"max_new_tokens": 0},
    "`truncate` must be strictly positive and less than 255. Given: 256": {"truncate": 256},
    "`stop` supports up to 4 stop sequences. Given: 5": {"stop": list("abcde")},
    "`stop` cannot contain an empty string": {"stop": [""]},
    "a `stop` sequence must have at most 1000 characters. Given: 100000": {"stop": ["a" * 100_000]},
    "`top_n_tokens` must be >= 0 and <= 5. Given: 6": {"top_n_tokens": 6},
    "`best_of` != 1 is not allowed for this endpoint": {"best_of": 2},
    "grammar is not supported": {"grammar": {"type": "regex", "value": "a+"}},
    "`watermark` is not supported": {"watermark": True},
    "adapter 'other' is not loaded": {"adapter_id": "other"},
    "`inputs` tokens + `max_new_tokens` must be <= 256. Given: 1 `inputs` tokens and 256 `max_new_tokens`": {
        "max_new_tokens": 256
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_values_are_refused_with_the_reason(url: str, message: str) -> None:
    body = {"inputs": "z", "parameters": REFUSED[message]}
    expected = {"error": f"Input validation error: {message.strip()}", "error_type": "validation"}
    response = post(url, "/generate", body)
    assert (response.status_code, response.json()) == (422, expected)
    assert events(url, "/generate_stream", body) == [expected]


@pytest.mark.parametrize("count", [255, 256, 257, 5000])
def test_prompts_around_the_context_length(url: str, served: ServedModel, count: int) -> None:
    prompt = "z" * count
    assert len(served.tokenizer(prompt)["input_ids"]) == count
    response = post(url, "/generate", {"inputs": prompt, "parameters": {}})
    if count == 255:
        assert response.headers["x-generated-tokens"] == "1"
        return
    assert response.status_code == 422
    if count == 256:
        assert response.json()["error"].endswith("`inputs` must have less than 255 tokens. Given: 256")
    else:
        assert response.json()["error"].endswith(f"Given: {count} `inputs` tokens and 0 `max_new_tokens`")


def test_client_turns_errors_into_its_own(client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match=r"must be <= 256\. Given"):
        client.text_generation("Hello", max_new_tokens=4000)
    with pytest.raises(ValidationError, match=r"must be <= 256\. Given"):
        list(client.text_generation("Hello", max_new_tokens=4000, stream=True))


def test_prefill_is_not_for_streams_and_empty_input_is_refused(url: str) -> None:
    body = {"inputs": "z", "parameters": {"decoder_input_details": True}}
    assert "not supported when streaming" in events(url, "/generate_stream", body)[0]["error"]
    assert post(url, "/generate", {"inputs": ""}).json()["error"].endswith("`inputs` cannot be empty")
