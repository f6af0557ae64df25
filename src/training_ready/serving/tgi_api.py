"""TGI's native dialect: generating, tokenising, and what is true of the service.

Inside a stream every error, validation included, arrives as an event under HTTP 200, as TGI's clients expect.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from training_ready import __version__
from training_ready.serving import admission
from training_ready.serving.answers import (
    VALIDATION_WORKERS,
    Answer,
    Asked,
    EventStream,
    Service,
    complete,
    json_response,
    sse,
)
from training_ready.serving.decoding import Generation
from training_ready.serving.errors import InvalidRequest, RequestError
from training_ready.serving.metrics import CONTENT_TYPE
from training_ready.serving.model import ServedModel
from training_ready.serving.schemas import ChatRequest, CompatGenerateRequest, GenerateRequest
from training_ready.serving.text import Token


def tgi_router(service: Service) -> APIRouter:
    """The routes of TGI's own API over ``service``."""
    router = APIRouter(tags=["TGI"])
    model = service.engine.model

    @router.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        payload, headers = await _generate(service, body, request, full_text=False)
        return json_response(payload, headers=headers)

    @router.post("/generate_stream")
    async def generate_stream(body: GenerateRequest) -> Response:
        return _stream(service, body, full_text=False)

    @router.post("/")
    async def compatible(body: CompatGenerateRequest, request: Request) -> Response:
        full_text = model.pipeline_tag in (None, "text-generation")
        if body.stream:
            return _stream(service, body, full_text=full_text)
        payload, headers = await _generate(service, body, request, full_text=full_text)
        return json_response([payload], headers=headers)

    @router.post("/tokenize")
    async def tokenize(body: GenerateRequest) -> Response:
        service.metrics.count("tgi_request_count")
        return json_response(await service.prepare(_tokens_of, model, body.inputs, True))

    @router.post("/chat_tokenize")
    async def chat_tokenize(body: ChatRequest) -> Response:
        service.metrics.count("tgi_request_count")
        text = await service.prepare(admission.render_chat, model, body.messages)
        tokens = await service.prepare(_tokens_of, model, text, False)
        return json_response({"tokenize_response": tokens, "templated_text": text})

    @router.get("/info")
    async def info() -> Response:
        return json_response(_info(service))

    @router.get("/health")
    @router.get("/ping")
    @router.get("/")
    async def health() -> Response:
        if service.engine.healthy:
            return Response()
        return json_response({"error": "unhealthy", "error_type": "healthcheck"}, status=503)

    @router.get("/metrics")
    async def metrics() -> Response:
        gauges = {"tgi_queue_size": service.engine.waiting, "tgi_batch_current_size": service.engine.active}
        return PlainTextResponse(service.metrics.render(**gauges), media_type=CONTENT_TYPE)

    return router


async def _generate(
    service: Service, body: GenerateRequest, request: Request, *, full_text: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    asked = Asked(service, time.monotonic())
    service.metrics.count("tgi_request_count")
    parameters = body.parameters
    generation = await service.prepare(admission.admit, service.engine.model, body.inputs, parameters)
    asked.submit([generation])
    [answer] = await complete(request, asked)
    payload: dict[str, Any] = {"generated_text": _prefix(body, full_text) + answer.ending.text}
    if parameters.details or parameters.decoder_input_details:
        payload["details"] = _details(answer)
    return payload, _headers(service.engine.model, body.inputs, answer)


def _stream(service: Service, body: GenerateRequest, *, full_text: bool) -> EventStream:
    asked = Asked(service, time.monotonic())
    service.metrics.count("tgi_request_count")
    headers = {
        "x-compute-type": service.engine.model.device.type,
        "x-compute-characters": str(len(body.inputs)),
    }
    return EventStream(_events(service, body, asked, _prefix(body, full_text)), asked, headers)


async def _events(service: Service, body: GenerateRequest, asked: Asked, prefix: str) -> AsyncIterator[bytes]:
    try:
        if body.parameters.decoder_input_details:
            raise InvalidRequest("`decoder_input_details` == true is not supported when streaming tokens")
        generation = await service.prepare(
            admission.admit, service.engine.model, body.inputs, body.parameters
        )
        asked.submit([generation])
        number = 0
        async for _, step in asked.steps():
            number += 1
            event: dict[str, Any] = {"index": number, "token": _token(step.token)}
            if step.token.top:
                event["top_tokens"] = [_token(each) for each in step.token.top]
            event["generated_text"] = event["details"] = None
            if step.ending is not None:
                event["generated_text"] = prefix + step.ending.text
                if body.parameters.details:
                    event["details"] = {
                        "finish_reason": step.ending.reason,
                        "generated_tokens": step.ending.generated_tokens,
                        "seed": _seed(generation),
                        "input_length": len(generation.prompt_ids),
                    }
            yield sse(event)
    except RequestError as error:
        service.metrics.count("tgi_request_failure", err=error.error_type)
        yield sse(error.body())


def _prefix(body: GenerateRequest, full_text: bool) -> str:
    asked = body.parameters.return_full_text
    return body.inputs if (full_text if asked is None else asked) else ""


def _seed(generation: Generation) -> int | None:
    return generation.sampling.seed if generation.sampling.do_sample else None


def _token(token: Token) -> dict[str, Any]:
    return {"id": token.id, "text": token.text, "logprob": token.logprob, "special": token.special}


def _details(answer: Answer) -> dict[str, Any]:
    details: dict[str, Any] = {
        "finish_reason": answer.ending.reason,
        "generated_tokens": answer.ending.generated_tokens,
        "seed": _seed(answer.generation),
        "prefill": [
            {"id": each.id, "text": each.text, "logprob": each.logprob} for each in answer.ending.prefill
        ],
        "tokens": [_token(each) for each in answer.tokens],
    }
    if answer.generation.top_n_tokens:
        details["top_tokens"] = [[_token(each) for each in token.top] for token in answer.tokens]
    return details


def _headers(model: ServedModel, inputs: str, answer: Answer) -> dict[str, str]:
    """TGI's timing headers: milliseconds, except ``x-compute-time`` in seconds."""
    timings, tokens = answer.timings, answer.ending.generated_tokens
    milliseconds = {
        "x-total-time": timings.total,
        "x-validation-time": timings.validation,
        "x-queue-time": timings.queue,
        "x-inference-time": timings.inference,
        "x-time-per-token": timings.inference / tokens,
    }
    return {
        "x-compute-type": model.device.type,
        "x-compute-time": str(timings.total),
        "x-compute-characters": str(len(inputs)),
        **{name: str(int(seconds * 1000)) for name, seconds in milliseconds.items()},
        "x-prompt-tokens": str(len(answer.generation.prompt_ids)),
        "x-generated-tokens": str(tokens),
    }


def _tokens_of(model: ServedModel, text: str, add_special_tokens: bool) -> list[dict[str, Any]]:
    """Every token of ``text`` with its place in characters; special tokens that were added have none."""
    encoded = model.tokenizer(
        text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
    )
    return [
        {"id": number, "text": text[start:stop], "start": start, "stop": stop}
        for number, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _info(service: Service) -> dict[str, Any]:
    """What is true of this service. ``model_sha`` is the hub's commit, null for a local folder."""
    model = service.engine.model
    return {
        "model_id": model.name,
        "model_sha": model.commit,
        "model_dtype": model.dtype,
        "model_device_type": model.device.type,
        "model_pipeline_tag": model.pipeline_tag,
        "max_concurrent_requests": service.engine.max_concurrent_requests,
        "max_best_of": admission.MAX_BEST_OF,
        "max_stop_sequences": admission.MAX_STOP_SEQUENCES,
        "max_input_tokens": model.max_input_tokens,
        "max_total_tokens": model.max_total_tokens,
        "validation_workers": VALIDATION_WORKERS,
        "max_client_batch_size": admission.MAX_PROMPTS,
        "router": "training-ready",
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
