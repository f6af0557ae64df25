"""What can go wrong while serving, each with the status and the name that TGI's clients know it by."""

from __future__ import annotations

from training_ready import TrainingReadyError


class ServingError(TrainingReadyError):
    """The service cannot be started, or cannot be asked."""


class RequestError(ServingError):
    """One request failed; the service goes on.

    ``status`` is the HTTP status, ``error_type`` the machine-readable kind: ``huggingface_hub`` maps ``validation``,
    ``generation``, ``overloaded`` and ``incomplete_generation`` to exceptions of its own.
    """

    status = 500
    error_type = "incomplete_generation"

    def body(self) -> dict[str, str]:
        return {"error": str(self), "error_type": self.error_type}


class InvalidRequest(RequestError):
    """A value that this model or this service cannot honour. Nothing was run."""

    status = 422
    error_type = "validation"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Input validation error: {reason}")


class UnsupportedSuffix(RequestError):
    """``suffix`` of a completion: infilling is not offered. TGI gives it an error type of its own."""

    status = 422
    error_type = "suffix not supported"


class TemplateError(RequestError):
    """The tokenizer's chat template refused the messages."""

    status = 422
    error_type = "template_error"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Template error: {reason}")


class Overloaded(RequestError):
    """``max_concurrent_requests`` are already waiting or running."""

    status = 429
    error_type = "overloaded"

    def __init__(self) -> None:
        super().__init__("Model is overloaded")


class GenerationFailed(RequestError):
    """The model failed while producing this answer, for example with logits that are not numbers."""

    status = 424
    error_type = "generation"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Request failed during generation: {reason}")


class GenerationStopped(RequestError):
    """The service is shutting down and this answer was not finished."""

    status = 500
    error_type = "incomplete_generation"

    def __init__(self) -> None:
        super().__init__("Incomplete generation: the service is stopping")
