"""Every kind of answer validates against TGI's own published OpenAPI description."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest

MESSAGES = [{"role": "user", "content": "Count"}]
DETAILS = {"details": True, "max_new_tokens": 5, "decoder_input_details": True, "top_n_tokens": 2}
CASES: list[tuple[str, str, dict[str, Any] | None, str]] = [
    ("post", "/generate", {"inputs": "z", "parameters": {"max_new_tokens": 5}}, "GenerateResponse"),
    ("post", "/generate", {"inputs": "z", "parameters": DETAILS}, "GenerateResponse"),
    (
        "post",
        "/generate",
        {"inputs": "z", "parameters": DETAILS | {"seed": 5, "do_sample": True}},
        "GenerateResponse",
    ),
    ("post", "/generate", {"inputs": ""}, "ErrorResponse"),
    ("post", "/tokenize", {"inputs": "Hello 🌍"}, "TokenizeResponse"),
    ("post", "/chat_tokenize", {"messages": MESSAGES}, "ChatTokenizeResponse"),
    ("get", "/info", None, "Info"),
    ("post", "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 5}, "ChatCompletion"),
    (
        "post",
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 5, "logprobs": True, "top_logprobs": 3},
        "ChatCompletion",
    ),
    ("post", "/v1/chat/completions", {"messages": MESSAGES, "n": 3}, "ErrorResponse"),
    ("post", "/v1/completions", {"prompt": ["z", "y"], "max_tokens": 5}, "CompletionFinal"),
    ("post", "/v1/completions", {"prompt": "z", "suffix": "y"}, "ErrorResponse"),
]
STREAMS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "/generate_stream",
        {"inputs": "z", "parameters": {"max_new_tokens": 5, "details": True}},
        ["StreamResponse"] * 5,
    ),
    ("/generate_stream", {"inputs": ""}, ["ErrorResponse"]),
    ("/", {"inputs": "z", "stream": True, "parameters": {"max_new_tokens": 2}}, ["StreamResponse"] * 2),
    (
        "/v1/chat/completions",
        {"messages": MESSAGES, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}},
        ["ChatCompletionChunk"] * 4,
    ),
    (
        "/v1/completions",
        {"prompt": "z", "max_tokens": 3, "stream": True},
        ["Chunk", "Chunk", "CompletionFinal"],
    ),
]


@pytest.fixture(scope="session")
def description() -> dict[str, Any]:
    root = os.environ.get("TRAINING_READY_REAL_DATA")
    if not root:
        pytest.skip("TRAINING_READY_REAL_DATA is not set: it names the folder that holds tgi/openapi.json")
    path = Path(root) / "tgi" / "openapi.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    schema: dict[str, Any] = as_json_schema(json.loads(path.read_text()))
    return schema


def as_json_schema(node: Any) -> Any:
    """OpenAPI 3.0's ``nullable`` in JSON Schema's words."""
    if isinstance(node, list):
        return [as_json_schema(each) for each in node]
    if not isinstance(node, dict):
        return node
    converted = {key: as_json_schema(value) for key, value in node.items()}
    return {"anyOf": [converted, {"type": "null"}]} if converted.pop("nullable", False) else converted


def check(description: dict[str, Any], name: str, value: Any) -> None:
    jsonschema.Draft202012Validator({**description, "$ref": f"#/components/schemas/{name}"}).validate(value)


@pytest.mark.parametrize(("method", "path", "body", "name"), CASES)
def test_answers(
    description: dict[str, Any], url: str, method: str, path: str, body: dict[str, Any] | None, name: str
) -> None:
    response = httpx2.request(method, url + path, json=body, timeout=60)
    assert response.status_code == (422 if name == "ErrorResponse" else 200)
    check(description, name, response.json())


@pytest.mark.parametrize(("path", "body", "names"), STREAMS)
def test_events(
    description: dict[str, Any], url: str, path: str, body: dict[str, Any], names: list[str]
) -> None:
    blocks = httpx2.post(url + path, json=body, timeout=60).text.strip().split("\n\n")
    values = [json.loads(block.removeprefix("data: ")) for block in blocks if block != "data: [DONE]"]
    assert len(values) == len(names)
    for value, name in zip(values, names, strict=True):
        check(description, name, value)


def test_the_root_returns_a_list(description: dict[str, Any], url: str) -> None:
    [answer] = httpx2.post(url + "/", json={"inputs": "z", "parameters": {"max_new_tokens": 2}}).json()
    check(description, "GenerateResponse", answer)


def test_every_operation_is_answered(description: dict[str, Any], url: str) -> None:
    served = httpx2.get(url + "/api-doc/openapi.json").json()["paths"]
    published = {(path, method) for path, methods in description["paths"].items() for method in methods}
    missing = published - {(path, method) for path, methods in served.items() for method in methods}
    assert missing == {("/invocations", "post")}, "SageMaker's route is the only one left out"


def test_the_validator_is_not_blind(description: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check(description, "GenerateResponse", {"generated_text": None})
    with pytest.raises(jsonschema.ValidationError):
        check(description, "Info", {})
