"""What may a request look like? TGI's and OpenAI's JSON bodies.

Types are strict, as TGI's are (``"5"`` is no number); unknown fields are ignored, as clients send many. Whether a value
makes sense is decided later, in ``admission``.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SEED_LIMIT = 2**64
COUNT_LIMIT = 2**32


def _encodable(text: str) -> str:
    """JSON can escape half of a surrogate pair, which is not a character and cannot be tokenised."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"not valid Unicode at character {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Count = Annotated[int, Field(ge=0, lt=COUNT_LIMIT)]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class GenerateParameters(_Body):
    """TGI's parameters. An empty object is greedy; leaving the whole object out samples (see ``GenerateRequest``)."""

    best_of: Count | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = False
    max_new_tokens: Count | None = None
    return_full_text: bool | None = None
    stop: list[Text] | None = None
    truncate: Count | None = None
    watermark: bool | None = False
    details: bool | None = False
    decoder_input_details: bool | None = False
    seed: Seed | None = None
    top_n_tokens: Count | None = None
    grammar: Any = None
    adapter_id: str | None = None


def _sampled() -> GenerateParameters:
    return GenerateParameters(do_sample=True)


class GenerateRequest(_Body):
    """``/generate``, ``/generate_stream`` and ``/tokenize``. Without ``parameters`` TGI samples; so does this."""

    inputs: Text
    parameters: GenerateParameters = Field(default_factory=_sampled)


class CompatGenerateRequest(GenerateRequest):
    """``/``: the same, and whether to stream."""

    stream: bool | None = False


class TextPart(_Body):
    """A part of a message's content. ``image_url`` and others are recognised in order to be refused."""

    type: str
    text: Text | None = None


class ChatMessage(_Body):
    role: Text
    content: Text | list[TextPart] | None = None
    tool_calls: list[Any] | None = None


class StreamOptions(_Body):
    include_usage: bool | None = False


class _OpenAIRequest(_Body):
    """What both OpenAI routes take. ``model`` is accepted and not looked at: this service has one."""

    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_tokens: Count | None = None
    n: Count | None = None
    logit_bias: Any = None
    seed: Seed | None = None
    stop: Text | list[Text] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_OpenAIRequest):
    """``/v1/chat/completions`` and ``/chat_tokenize``."""

    messages: list[ChatMessage]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    response_format: Any = None
    tools: list[Any] | None = None


class CompletionRequest(_OpenAIRequest):
    """``/v1/completions``."""

    prompt: Text | list[Text]
    repetition_penalty: float | None = None
    suffix: str | None = None
    logprobs: Any = None
    best_of: Count | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt
