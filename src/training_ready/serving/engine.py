"""Who runs when? A bounded queue in front of one worker thread that owns the model.

The worker keeps up to ``max_active`` answers open and gives each one step in turn, so a long answer does not hold up a
short one. Steps are not batched: every answer is computed exactly as if it were alone, and costs what it costs alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from training_ready.serving.decoding import Generation, Step, decode
from training_ready.serving.errors import GenerationFailed, GenerationStopped, Overloaded, RequestError
from training_ready.serving.model import ServedModel

log = logging.getLogger(__name__)

Deliver = Callable[[Step | RequestError], None]


@dataclass(kw_only=True, slots=True, eq=False)
class Ticket:
    """A submitted request. Times are ``time.monotonic()`` seconds."""

    generation: Generation
    deliver: Deliver
    queued_at: float
    started_at: float | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for this answer any more: the worker drops it before its next step."""
        self.cancelled = True


class Engine:
    """Runs generations on a model.

    Args:
        model: what to run. Only the worker thread touches its network.
        max_concurrent_requests: waiting and running together; one more is refused with ``Overloaded``.
        max_active: answers that are open at once. Each holds a key-value cache in the device's memory.
    """

    def __init__(
        self, model: ServedModel, *, max_concurrent_requests: int = 128, max_active: int = 4
    ) -> None:
        self.model = model
        self.max_concurrent_requests = max_concurrent_requests
        self.max_active = max_active
        self._waiting: deque[Ticket] = deque()
        self._active: deque[tuple[Ticket, Iterator[Step]]] = deque()
        self._changed = threading.Condition()
        self._in_flight = 0
        self._stopping = False
        self._device_lost = False
        self._worker = threading.Thread(target=self._run, name="engine", daemon=True)
        self._worker.start()

    def submit(self, generation: Generation, deliver: Deliver) -> Ticket:
        """Queue a generation. ``deliver`` is called in the worker thread with each step, or once with an error.

        Raises:
            Overloaded: ``max_concurrent_requests`` are in flight.
            GenerationStopped: the engine is closed.
        """
        ticket = Ticket(generation=generation, deliver=deliver, queued_at=time.monotonic())
        with self._changed:
            if self._stopping or not self._worker.is_alive():
                raise GenerationStopped
            if self._in_flight >= self.max_concurrent_requests:
                raise Overloaded
            self._in_flight += 1
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._active)

    @property
    def in_flight(self) -> int:
        return self._in_flight

    @property
    def healthy(self) -> bool:
        return self._worker.is_alive() and not self._device_lost

    def close(self) -> None:
        """Stop after the current step; whatever is unfinished gets ``GenerationStopped``."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._worker.join()

    # ---- the worker thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._open_more():
            ticket, steps = self._active.popleft()
            if self._advance(ticket, steps):
                self._active.append((ticket, steps))
            else:
                self._leave()
        for ticket in [*(ticket for ticket, _ in self._active), *self._waiting]:
            self._tell(ticket, GenerationStopped())

    def _open_more(self) -> bool:
        """Wait for work and open what fits; False when the engine is closing."""
        with self._changed:
            while not (self._waiting or self._active or self._stopping):
                self._changed.wait()
            wanted = [ticket for ticket in self._waiting if not ticket.cancelled]
            self._in_flight -= len(self._waiting) - len(wanted)
            self._waiting = deque(wanted)
            while self._waiting and len(self._active) < self.max_active:
                ticket = self._waiting.popleft()
                self._active.append((ticket, decode(self.model, ticket.generation)))
            return not self._stopping

    def _advance(self, ticket: Ticket, steps: Iterator[Step]) -> bool:
        """One step of one answer; False when it is over, for whatever reason."""
        if ticket.cancelled:
            return False
        if ticket.started_at is None:
            ticket.started_at = time.monotonic()
        try:
            with torch.inference_mode():
                step = next(steps)
        except RequestError as error:
            self._tell(ticket, error)
            return False
        except Exception as error:
            log.exception("a generation failed")
            self._tell(ticket, GenerationFailed(self._diagnose(error)))
            return False
        self._tell(ticket, step)
        return step.ending is None

    def _diagnose(self, error: Exception) -> str:
        """What to tell the asker; frees memory after running out of it, and notes a device that cannot recover."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.accelerator.empty_cache()
            return "the device ran out of memory; ask for fewer tokens or lower --max-active"
        if isinstance(error, torch.AcceleratorError):
            self._device_lost = True
            return "the device failed and the service must be restarted"
        return f"{type(error).__name__}: {error}"

    def _tell(self, ticket: Ticket, event: Step | RequestError) -> None:
        try:
            ticket.deliver(event)
        except Exception:  # the receiver is gone, which is its own affair; the worker serves the others
            log.warning("the receiver of an answer is gone", exc_info=True)
            ticket.cancel()

    def _leave(self) -> None:
        with self._changed:
            self._in_flight -= 1
