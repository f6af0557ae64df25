"""OpenAI's dialect as TGI speaks it: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/models``.

Where the two differ, OpenAI's contract holds: the stop string is not part of the answer, and a finish reason is
``stop`` or ``length``.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from training_ready import __version__
from training_ready.serving import admission
from training_ready.serving.answers import (
    SSE_DONE,
    Answer,
    Asked,
    EventStream,
    Service,
    complete,
    json_response,
    sse,
)
from training_ready.serving.decoding import Ending
from training_ready.serving.errors import RequestError
from training_ready.serving.schemas import ChatRequest, CompletionRequest
from training_ready.serving.text import Token


def openai_router(service: Service) -> APIRouter:
    """The OpenAI routes over ``service``."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])
    model = service.engine.model

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        asked = Asked(service, time.monotonic())
        service.metrics.count("tgi_request_count")
        admission.check_chat(body)
        prompt = await service.prepare(admission.render_chat, model, body.messages)
        if body.stream:
            return EventStream(_chat_events(service, body, asked, prompt), asked, {})
        generation = await service.prepare(admission.admit_chat, model, body, prompt)
        asked.submit([generation])
        [answer] = await complete(request, asked)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.ending.text},
            "logprobs": _logprobs(answer.tokens) if body.logprobs else None,
            "finish_reason": _finish_reason(answer.ending),
        }
        head = _head(service, "chat.completion")
        return json_response({**head, "choices": [choice], "usage": _usage([answer])})

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        asked = Asked(service, time.monotonic())
        service.metrics.count("tgi_request_count")
        if body.stream:
            return EventStream(_completion_events(service, body, asked), asked, {})
        asked.submit(await service.prepare(admission.admit_completion, model, body))
        answers = await complete(request, asked)
        choices = [
            {
                "index": i,
                "text": each.ending.text,
                "logprobs": None,
                "finish_reason": _finish_reason(each.ending),
            }
            for i, each in enumerate(answers)
        ]
        head = _head(service, "text_completion")
        return json_response({**head, "choices": choices, "usage": _usage(answers)})

    @router.get("/models")
    async def models() -> Response:
        entry = {"id": model.name, "object": "model", "created": 0, "owned_by": model.name}
        return json_response({"object": "list", "data": [entry]})

    return router


async def _chat_events(
    service: Service, body: ChatRequest, asked: Asked, prompt: str
) -> AsyncIterator[bytes]:
    head = _head(service, "chat.completion.chunk")
    try:
        generation = await service.prepare(admission.admit_chat, service.engine.model, body, prompt)
        asked.submit([generation])
        async for _, step in asked.steps():
            content = "" if step.token.special else step.token.text
            choice = {
                "index": 0,
                "delta": {"role": "assistant", "content": content},
                "logprobs": _logprobs([step.token]) if body.logprobs else None,
                "finish_reason": _finish_reason(step.ending) if step.ending else None,
            }
            yield sse({**head, "choices": [choice], "usage": None})
            if step.ending is not None and body.include_usage:
                usage = _count(len(generation.prompt_ids), step.ending.generated_tokens)
                yield sse({**head, "choices": [], "usage": usage})
    except RequestError as error:
        yield _stream_error(service, error)
    yield SSE_DONE


async def _completion_events(service: Service, body: CompletionRequest, asked: Asked) -> AsyncIterator[bytes]:
    head = _head(service, "text_completion")
    try:
        generations = await service.prepare(admission.admit_completion, service.engine.model, body)
        asked.submit(generations)
        async for index, step in asked.steps():
            choice = {
                "index": index,
                "text": "" if step.token.special else step.token.text,
                "logprobs": None,
                "finish_reason": _finish_reason(step.ending) if step.ending else "",
            }
            chunk = {**head, "choices": [choice]}
            if step.ending is not None:
                chunk["usage"] = _count(len(generations[index].prompt_ids), step.ending.generated_tokens)
            yield sse(chunk)
    except RequestError as error:
        yield _stream_error(service, error)
    yield SSE_DONE


def _stream_error(service: Service, error: RequestError) -> bytes:
    service.metrics.count("tgi_request_failure", err=error.error_type)
    return sse({"error": {"message": str(error), "http_status_code": error.status}})


def _head(service: Service, kind: str) -> dict[str, Any]:
    return {
        "object": kind,
        "id": "",
        "created": int(time.time()),
        "model": service.engine.model.name,
        "system_fingerprint": f"{__version__}-native",
    }


def _finish_reason(ending: Ending) -> str:
    return "length" if ending.reason == "length" else "stop"


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    prompt = sum(len(each.generation.prompt_ids) for each in answers)
    return _count(prompt, sum(each.ending.generated_tokens for each in answers))


def _count(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    return {
        "content": [
            {
                "token": token.text,
                "logprob": token.logprob,
                "top_logprobs": [{"token": each.text, "logprob": each.logprob} for each in token.top],
            }
            for token in tokens
        ]
    }
