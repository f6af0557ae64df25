"""The service under strangers, crowds and bad manners."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import OverloadedError

from training_ready.serving import listener
from training_ready.serving.engine import Engine
from training_ready.serving.errors import ServingError
from training_ready.serving.service import MAX_BODY_BYTES, create_app

JSON = {"content-type": "application/json"}


def metric(url: str, name: str) -> float:
    text = httpx2.get(url + "/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def generate(url: str, inputs: str, **parameters: Any) -> httpx2.Response:
    return httpx2.post(url + "/generate", json={"inputs": inputs, "parameters": parameters}, timeout=60)


def test_a_crowd_gets_what_each_would_get_alone(url: str) -> None:
    asks = [
        {"inputs": f"{'Hello ' * n}{n}", "max_new_tokens": 20 + 3 * n, "details": True}
        | ({"temperature": 1.5, "seed": n, "top_k": 20} if n % 2 else {})
        | ({"stop": ["e"]} if n % 3 == 0 else {})
        for n in range(8)
    ]
    alone = [generate(url, **ask).json() for ask in asks]  # type: ignore[arg-type]
    with ThreadPoolExecutor(8) as crowd:
        together = list(crowd.map(lambda ask: generate(url, **ask).json(), asks))
    for one, other in zip(alone, together, strict=True):
        assert [token["id"] for token in one["details"]["tokens"]] == [
            token["id"] for token in other["details"]["tokens"]
        ]
        assert one == other


@pytest.mark.parametrize(
    ("content", "headers", "status", "says"),
    [
        (b"{", JSON, 400, "Failed to parse the request body as JSON"),
        (b"", JSON, 422, "Failed to deserialize"),
        (b"\xff\xfe{}", JSON, 400, ""),
        (b"[" * 100_000, JSON, 400, ""),
        (b'{"inputs": "a"}', {"content-type": "text/plain"}, 415, "application/json"),
        (b'{"inputs": "a"}', {}, 415, "application/json"),
        (b"[]", JSON, 422, "Failed to deserialize"),
        (b"{}", JSON, 422, "inputs: Field required"),
        (b'{"inputs": 5}', JSON, 422, "inputs: "),
        (b'{"inputs": "\\ud800"}', JSON, 422, "not valid Unicode"),
        (b'{"inputs": "a", "parameters": null}', JSON, 422, "parameters: "),
        (b'{"inputs": "a", "parameters": {"temperature": "1"}}', JSON, 422, "parameters.temperature: "),
        (b'{"inputs": "a", "parameters": {"temperature": NaN}}', JSON, 422, "parameters.temperature: "),
        (b'{"inputs": "a", "parameters": {"temperature": 1e999}}', JSON, 422, "parameters.temperature: "),
        (b'{"inputs": "a", "parameters": {"max_new_tokens": -1}}', JSON, 422, "parameters.max_new_tokens: "),
        (b'{"inputs": "a", "parameters": {"seed": 18446744073709551616}}', JSON, 422, "parameters.seed: "),
        (b'{"inputs": "a", "parameters": {"stop": "a"}}', JSON, 422, "parameters.stop: "),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_unreadable_bodies(
    url: str, path: str, content: bytes, headers: dict[str, str], status: int, says: str
) -> None:
    response = httpx2.post(url + path, content=content, headers=headers, timeout=60)
    assert (response.status_code, response.headers["content-type"]) == (status, "text/plain; charset=utf-8")
    assert says in response.text
    assert generate(url, "z", max_new_tokens=1).status_code == 200


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1e-45, "seed": 1},
        {"temperature": 1e300, "seed": 1},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"top_k": 2**31 - 1, "seed": 1},
        {"top_p": 1e-300, "seed": 1},
        {"typical_p": 1e-300, "seed": 1},
        {"seed": 2**64 - 1, "do_sample": True},
        {"stop": ["a" * 999, "\x00", "\n", "🌍"]},
        {"temperature": 1e-9, "top_k": 1, "top_p": 0.5, "typical_p": 0.5, "repetition_penalty": 5, "seed": 0},
    ],
)
def test_extreme_values_answer_or_fail_alone(url: str, parameters: dict[str, Any]) -> None:
    response = generate(url, "Hello", max_new_tokens=12, details=True, **parameters)
    if response.status_code == 424:
        assert response.json()["error_type"] == "generation"
    else:
        assert response.status_code == 200
        assert all(abs(token["logprob"]) < 1e4 for token in response.json()["details"]["tokens"])
    assert httpx2.get(url + "/health").status_code == 200
    assert generate(url, "z", max_new_tokens=1).status_code == 200


def test_unknown_fields_are_ignored(url: str) -> None:
    body = {"inputs": "z", "ignore_eos": True, "parameters": {"max_new_tokens": 2, "novel": {"deep": []}}}
    assert httpx2.post(url + "/generate", json=body).status_code == 200
    body = {"messages": [{"role": "user", "content": "z", "name": "n"}], "ignore_eos": True, "max_tokens": 2}
    assert httpx2.post(url + "/v1/chat/completions", json=body).status_code == 200


def test_a_body_beyond_the_limit_is_refused_declared_or_not(url: str) -> None:
    body = json.dumps({"inputs": "a" * MAX_BODY_BYTES}).encode()
    assert httpx2.post(url + "/generate", content=body, headers=JSON).status_code == 413
    pieces = (body[place : place + 65536] for place in range(0, len(body), 65536))
    assert httpx2.post(url + "/generate", content=pieces, headers=JSON).status_code == 413
    allowed = json.dumps({"inputs": "z", "parameters": {"max_new_tokens": 1}}).encode().ljust(MAX_BODY_BYTES)
    assert httpx2.post(url + "/generate", content=allowed, headers=JSON).status_code == 200


def test_too_many_are_told_so(braked: Any) -> None:
    with braked(max_concurrent_requests=1) as service, ThreadPoolExecutor(1) as other:
        first = other.submit(generate, service.url, "Hello", max_new_tokens=3)
        wait_until(lambda: service.engine.in_flight == 1)
        refused = generate(service.url, "Hello")
        assert (refused.status_code, refused.json()) == (
            429,
            {"error": "Model is overloaded", "error_type": "overloaded"},
        )
        client = InferenceClient(model=service.url, token="none")
        with pytest.raises(OverloadedError):
            list(client.text_generation("a", stream=True))
        service.network.release()
        assert first.result(timeout=60).status_code == 200
        assert generate(service.url, "Hello", max_new_tokens=1).status_code == 200
        assert metric(service.url, 'tgi_request_failure{err="overloaded"}') == 2


def test_spoiled_logits_are_a_generation_error(braked: Any) -> None:
    with braked() as service:
        service.network.release()
        service.network.spoil = lambda logits: logits * float("nan")
        response = generate(service.url, "Hello")
        assert (response.status_code, response.json()["error_type"]) == (424, "generation")
        body = {"inputs": "Hello", "parameters": {}}
        stream = httpx2.post(service.url + "/generate_stream", json=body)
        assert '"error_type":"generation"' in stream.text
        service.network.spoil = None
        assert generate(service.url, "Hello", max_new_tokens=2).status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_worker(braked: Any, path: str, stream: bool) -> None:
    body = {
        "inputs": "z",
        "prompt": ["z", "z"],
        "messages": [{"role": "user", "content": "z"}],
        "max_tokens": 200,
        "stream": stream,
        "parameters": {"max_new_tokens": 200},
    }
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(content)}", "", ""])
    with braked() as service:
        with socket.create_connection(listener_address(service.url)) as connection:
            connection.sendall(head.encode() + content)
            service.network.release(4)
            wait_until(lambda: service.network.steps == 4)
        wait_until(lambda: metric(service.url, "tgi_request_cancelled") == 1)
        service.network.release()
        wait_until(lambda: service.engine.in_flight == 0)
        assert service.network.steps <= 6  # the steps that stood at the brake, and none after them
        assert generate(service.url, "Hello", max_new_tokens=2).status_code == 200


def test_strangers_stay_outside(engine: Engine) -> None:
    body = {"inputs": "z", "parameters": {"max_new_tokens": 1}, "messages": [], "prompt": "z"}
    with listener.in_background(create_app(engine, api_key="sesame")) as url:
        for path in ("/generate", "/generate_stream", "/", "/tokenize", "/chat_tokenize", "/v1/completions"):
            for headers in ({}, {"authorization": "Bearer sesam"}, {"authorization": "sesame"}):
                response = httpx2.post(url + path, json=body, headers=headers)
                assert (response.status_code, response.content) == (401, b"")
        assert httpx2.post(url + "/v1/chat/completions", content=b"{").status_code == 401
        friend = {"authorization": "Bearer sesame"}
        assert httpx2.post(url + "/generate", json=body, headers=friend).status_code == 200
        assert InferenceClient(model=url, token="sesame").text_generation("z", max_new_tokens=1)
        for path in ("/health", "/info", "/metrics", "/v1/models"):
            assert httpx2.get(url + path).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.8.9.1", 200),
        ("[::1]:8080", 200),
        ("evil.example", 421),
        ("10.0.0.1:80", 421),
    ],
)
def test_without_a_key_only_loopback_names_are_answered(url: str, host: str, status: int) -> None:
    assert httpx2.get(url + "/info", headers={"host": host}).status_code == status
    body = {"inputs": "z", "parameters": {"max_new_tokens": 1}}
    assert httpx2.post(url + "/generate", json=body, headers={"host": host}).status_code == status


def test_metrics_are_prometheus_text_and_count(url: str) -> None:
    before = metric(url, "tgi_request_success"), metric(url, "tgi_request_generated_tokens_sum")
    assert generate(url, "Hello", max_new_tokens=5).status_code == 200
    after = metric(url, "tgi_request_success"), metric(url, "tgi_request_generated_tokens_sum")
    assert (after[0] - before[0], after[1] - before[1]) == (1, 5)
    response = httpx2.get(url + "/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    line = re.compile(r'# (HELP|TYPE) \w+ .+|\w+(\{err="[^"]+"\})? \S+')
    assert all(line.fullmatch(each) for each in response.text.splitlines())
    assert metric(url, "tgi_queue_size") == 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ServingError, match="TRAINING_READY_API_KEY"):
        listener.bind(host, 0, protected=False)
    listener.bind("0.0.0.0", 0, protected=True).close()


def test_a_taken_port_is_one_clear_message() -> None:
    with listener.bind("127.0.0.1", 0, protected=False) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"cannot listen on 127.0.0.1:{port}"):
            listener.bind("127.0.0.1", port, protected=False)


def test_unknown_paths_and_methods(url: str) -> None:
    assert httpx2.get(url + "/nowhere").status_code == 404
    assert httpx2.get(url + "/generate").status_code == 405
    assert httpx2.get(url + "/docs").status_code == 404
    assert "/generate" in httpx2.get(url + "/api-doc/openapi.json").json()["paths"]


def listener_address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll; the deadline only keeps a broken service from hanging the suite."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
