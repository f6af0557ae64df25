"""How does an answer travel from the worker to the socket, and what happens when the client leaves?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import orjson
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from training_ready.serving.decoding import Ending, Generation, Step
from training_ready.serving.engine import Engine, Ticket
from training_ready.serving.errors import RequestError
from training_ready.serving.metrics import Metrics
from training_ready.serving.text import Token

VALIDATION_WORKERS = 2  # a very long prompt takes seconds to tokenise
CLIENT_LEFT = 499  # nobody reads it; nginx's name for it in access logs

T = TypeVar("T")


class ClientLeft(Exception):
    """The connection was closed before the answer was complete."""


@dataclass(kw_only=True, slots=True)
class Timings:
    """Seconds: ``total`` = ``validation`` + ``queue`` + ``inference``, from the arrival of the request."""

    total: float
    validation: float
    queue: float
    inference: float


@dataclass(kw_only=True, slots=True)
class Answer:
    """A finished generation."""

    generation: Generation
    tokens: list[Token]
    ending: Ending
    timings: Timings


@dataclass(kw_only=True, slots=True)
class Service:
    """What the routes share. Validation and tokenising have threads of their own: the event loop never waits."""

    engine: Engine
    metrics: Metrics = field(default_factory=Metrics)
    validation: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(VALIDATION_WORKERS, "validation")
    )

    async def prepare(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.validation, lambda: work(*arguments))


class Asked:
    """One request's generations, submitted together. As a context manager it cancels what is unfinished on leaving."""

    def __init__(self, service: Service, arrived: float) -> None:
        self._service = service
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Step | RequestError]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._open: set[int] = set()

    def submit(self, generations: list[Generation]) -> None:
        """Queue them all, or none: raises ``Overloaded`` if one does not fit."""
        try:
            for index, generation in enumerate(generations):
                deliver = self._deliverer(index)
                self._tickets.append(self._service.engine.submit(generation, deliver))
                self._open.add(index)
        except RequestError:
            self.cancel()
            raise

    async def steps(self) -> AsyncIterator[tuple[int, Step]]:
        """(index of the generation, step) as they come, until all have ended; raises the first error."""
        while self._open:
            index, event = await self._events.get()
            if isinstance(event, RequestError):
                self._open.discard(index)
                raise event
            if event.ending is not None:
                self._open.discard(index)
                self._record(self._tickets[index], event.ending)
            yield index, event

    async def answers(self) -> list[Answer]:
        """All answers, complete, in the order of the generations."""
        tokens: list[list[Token]] = [[] for _ in self._tickets]
        endings: dict[int, Ending] = {}
        timings: dict[int, Timings] = {}
        async for index, step in self.steps():
            tokens[index].append(step.token)
            if step.ending is not None:
                endings[index], timings[index] = step.ending, self._timings(self._tickets[index])
        return [
            Answer(generation=ticket.generation, tokens=tokens[i], ending=endings[i], timings=timings[i])
            for i, ticket in enumerate(self._tickets)
        ]

    def cancel(self) -> None:
        """Give up what is unfinished; the worker drops it before its next step."""
        for ticket in self._tickets:
            ticket.cancel()
        if self._open:
            self._open.clear()
            self._service.metrics.count("tgi_request_cancelled")

    def _deliverer(self, index: int) -> Callable[[Step | RequestError], None]:
        def deliver(event: Step | RequestError) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return deliver

    def _timings(self, ticket: Ticket) -> Timings:
        now = time.monotonic()
        started = ticket.started_at if ticket.started_at is not None else now
        return Timings(
            total=now - self._arrived,
            validation=ticket.queued_at - self._arrived,
            queue=started - ticket.queued_at,
            inference=now - started,
        )

    def _record(self, ticket: Ticket, ending: Ending) -> None:
        metrics, timings = self._service.metrics, self._timings(ticket)
        metrics.count("tgi_request_success")
        metrics.observe("tgi_request_duration", timings.total)
        metrics.observe("tgi_request_queue_duration", timings.queue)
        metrics.observe("tgi_request_inference_duration", timings.inference)
        metrics.observe(
            "tgi_request_mean_time_per_token_duration", timings.inference / ending.generated_tokens
        )
        metrics.observe("tgi_request_input_length", len(ticket.generation.prompt_ids))
        metrics.observe("tgi_request_generated_tokens", ending.generated_tokens)


async def complete(request: Request, asked: Asked) -> list[Answer]:
    """The complete answers; gives them up and raises ``ClientLeft`` as soon as the client closes the connection."""
    reading = asyncio.ensure_future(asked.answers())
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ClientLeft
        return reading.result()
    finally:
        for task in (reading, leaving):
            task.cancel()
        asked.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def sse(payload: object) -> bytes:
    """One server-sent event. The space after the colon matters: some clients compare ``data: [DONE]`` literally."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


SSE_DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events; however the response ends, what is unfinished is given up."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], asked: Asked, headers: dict[str, str]) -> None:
        super().__init__(events, headers={"x-accel-buffering": "no", "cache-control": "no-cache", **headers})
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asked.cancel()


def json_response(payload: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(payload), status, media_type="application/json", headers=headers)
