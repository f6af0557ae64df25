"""May this request run? Its values, its tokens, then the arithmetic against the context, before anything runs.

Messages keep TGI's wording, since clients show and match them.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from training_ready.serving.decoding import Generation
from training_ready.serving.errors import InvalidRequest, TemplateError, UnsupportedSuffix
from training_ready.serving.model import ServedModel
from training_ready.serving.sampling import Sampling
from training_ready.serving.schemas import ChatMessage, ChatRequest, CompletionRequest, GenerateParameters

MAX_BEST_OF = 1
MAX_STOP_SEQUENCES = 4
MAX_STOP_CHARACTERS = 1000  # ours: each stop string costs memory and time in proportion
MAX_TOP_N_TOKENS = 5
MAX_PROMPTS = 4  # of one /v1/completions request
DEFAULT_COMPLETION_TOKENS = 100  # of /v1/completions without max_tokens, as in TGI


def check(condition: bool, reason: str) -> None:
    if not condition:
        raise InvalidRequest(reason)


def admit(
    model: ServedModel,
    inputs: str,
    parameters: GenerateParameters,
    *,
    add_special_tokens: bool = True,
    keep_stop: bool = True,
    presence_penalty: float = 0.0,
) -> Generation:
    """Turn a request into something that can be run as it is.

    Args:
        add_special_tokens: False for text that a chat template rendered, which has them.
        keep_stop: whether the stop string that ends the answer stays in its text.

    Raises:
        InvalidRequest: with the reason, and for the context the arithmetic.
    """
    _refuse_unsupported(parameters)
    sampling = _sampling(parameters, presence_penalty)
    stop = _stop(parameters.stop or [])
    top_n = parameters.top_n_tokens or 0
    check(top_n <= MAX_TOP_N_TOKENS, f"`top_n_tokens` must be >= 0 and <= {MAX_TOP_N_TOKENS}. Given: {top_n}")
    check(bool(inputs), "`inputs` cannot be empty")
    prompt_ids = _tokenize(model, inputs, parameters.truncate, add_special_tokens)
    return Generation(
        prompt_ids=prompt_ids,
        max_new_tokens=_room(model, len(prompt_ids), parameters.max_new_tokens),
        sampling=sampling,
        stop=stop,
        keep_stop=keep_stop,
        top_n_tokens=top_n,
        prefill_details=bool(parameters.decoder_input_details),
    )


def admit_completion(model: ServedModel, request: CompletionRequest) -> list[Generation]:
    """One generation per prompt of a ``/v1/completions`` request."""
    if request.suffix is not None:
        raise UnsupportedSuffix("suffix is not supported; put the text into the prompt instead")
    _refuse_unsupported_openai(request.n, request.logit_bias)
    check(not request.logprobs, "`logprobs` is not supported on /v1/completions; use `details` of /generate")
    check(request.best_of in (None, 1), "`best_of` != 1 is not allowed for this endpoint")
    prompts = request.prompts
    check(bool(prompts), "`prompt` cannot be an empty list")
    check(
        len(prompts) <= MAX_PROMPTS, f"`prompt` supports up to {MAX_PROMPTS} prompts. Given: {len(prompts)}"
    )
    parameters = GenerateParameters(
        **_openai_sampling(request.temperature, request.top_p, request.seed),
        repetition_penalty=request.repetition_penalty,
        frequency_penalty=request.frequency_penalty,
        max_new_tokens=DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens,
        stop=request.stop_strings,
    )
    presence = request.presence_penalty or 0.0
    return [admit(model, each, parameters, keep_stop=False, presence_penalty=presence) for each in prompts]


def check_chat(request: ChatRequest) -> None:
    """Refuse what a chat request asks for and this service does not do, rather than leave it out in silence."""
    _refuse_unsupported_openai(request.n, request.logit_bias)
    check(request.response_format is None, "`response_format` is not supported: grammar is not supported")
    check(not request.tools, "`tools` are not supported: grammar is not supported")
    check(
        request.top_logprobs is None or bool(request.logprobs), "`top_logprobs` needs `logprobs` to be true"
    )


def admit_chat(model: ServedModel, request: ChatRequest, prompt: str) -> Generation:
    """The generation of a chat request whose messages were rendered as ``prompt``."""
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    parameters = GenerateParameters(
        **_openai_sampling(request.temperature, request.top_p, request.seed),
        frequency_penalty=request.frequency_penalty,
        max_new_tokens=limit,
        stop=request.stop_strings,
        top_n_tokens=request.top_logprobs,
    )
    presence = request.presence_penalty or 0.0
    return admit(
        model, prompt, parameters, add_special_tokens=False, keep_stop=False, presence_penalty=presence
    )


def render_chat(model: ServedModel, messages: Sequence[ChatMessage]) -> str:
    """The prompt, by the tokenizer's own chat template. A last message of the assistant is continued.

    Raises:
        TemplateError: there is no template, or it refuses these messages.
        InvalidRequest: a message is not plain text.
    """
    check(bool(messages), "`messages` cannot be empty")
    if not model.tokenizer.chat_template:
        raise TemplateError(f"the tokenizer of {model.name} has no chat template; use /generate")
    plain = [{"role": message.role, "content": _content(message)} for message in messages]
    continued = plain[-1]["role"] == "assistant"
    try:
        rendered: str = model.tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
        )
    except Exception as error:  # templates are programs: they raise what they like
        raise TemplateError(str(error)) from error
    return rendered


def _content(message: ChatMessage) -> str:
    check(not message.tool_calls, "`tool_calls` are not supported")
    if isinstance(message.content, list):
        for part in message.content:
            check(part.type == "text", f"{part.type} modality is not supported")
        return "".join(part.text or "" for part in message.content)
    return message.content or ""


def _refuse_unsupported(parameters: GenerateParameters) -> None:
    check(parameters.best_of in (None, 1), "`best_of` != 1 is not allowed for this endpoint")
    check(parameters.grammar is None, "grammar is not supported")
    check(not parameters.watermark, "`watermark` is not supported")
    check(parameters.adapter_id is None, f"adapter {parameters.adapter_id!r} is not loaded")


def _refuse_unsupported_openai(n: int | None, logit_bias: Any) -> None:
    check(n in (None, 1), f"`n` must be 1. Given: {n}")
    check(not logit_bias, "`logit_bias` is not supported")


def _openai_sampling(temperature: float | None, top_p: float | None, seed: int | None) -> dict[str, Any]:
    """OpenAI's reading: temperature 0 is greedy, everything else samples; ``top_p`` 1 is "off", which TGI refuses."""
    greedy = temperature == 0
    return {
        "do_sample": not greedy,
        "temperature": None if greedy else temperature,
        "top_p": None if greedy or top_p == 1.0 else top_p,
        "seed": seed,
    }


def _sampling(parameters: GenerateParameters, presence_penalty: float) -> Sampling:
    temperature = 1.0 if parameters.temperature is None else parameters.temperature
    repetition = 1.0 if parameters.repetition_penalty is None else parameters.repetition_penalty
    frequency = parameters.frequency_penalty or 0.0
    top_p, typical_p, top_k = parameters.top_p, parameters.typical_p, parameters.top_k
    check(temperature > 0, "`temperature` must be strictly positive")
    check(repetition > 0, "`repetition_penalty` must be strictly positive")
    check(-2 <= frequency <= 2, "`frequency_penalty` must be >= -2.0 and <= 2.0")
    check(-2 <= presence_penalty <= 2, "`presence_penalty` must be >= -2.0 and <= 2.0")
    check(top_p is None or 0 < top_p < 1, "`top_p` must be > 0.0 and < 1.0")
    check(typical_p is None or 0 < typical_p < 1, "`typical_p` must be > 0.0 and < 1.0")
    check(top_k is None or top_k > 0, "`top_k` must be strictly positive")
    # As in TGI, any of the sampling parameters switches sampling on, whatever do_sample says.
    asked = temperature != 1.0 or any(value is not None for value in (top_k, top_p, typical_p))
    return Sampling(
        do_sample=bool(parameters.do_sample) or asked,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        typical_p=1.0 if typical_p is None else typical_p,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence_penalty,
        seed=secrets.randbits(63) if parameters.seed is None else parameters.seed,
    )


def _stop(stop: Sequence[str]) -> tuple[str, ...]:
    check(
        len(stop) <= MAX_STOP_SEQUENCES,
        f"`stop` supports up to {MAX_STOP_SEQUENCES} stop sequences. Given: {len(stop)}",
    )
    for text in stop:
        check(bool(text), "`stop` cannot contain an empty string")
        check(
            len(text) <= MAX_STOP_CHARACTERS,
            f"a `stop` sequence must have at most {MAX_STOP_CHARACTERS} characters. Given: {len(text)}",
        )
    return tuple(stop)


def _tokenize(model: ServedModel, inputs: str, truncate: int | None, add_special_tokens: bool) -> list[int]:
    limit = model.max_input_tokens
    check(
        truncate is None or 0 < truncate <= limit,
        f"`truncate` must be strictly positive and less than {limit}. Given: {truncate}",
    )
    ids: list[int] = model.tokenizer(inputs, add_special_tokens=add_special_tokens, verbose=False)[
        "input_ids"
    ]
    check(bool(ids), "`inputs` cannot be empty")
    return ids if truncate is None else ids[-truncate:]


def _room(model: ServedModel, inputs: int, asked: int | None) -> int:
    """How many tokens may be generated after ``inputs`` tokens; all that fit, if nothing was asked for."""
    check(asked != 0, "`max_new_tokens` must be strictly positive")
    total = model.max_total_tokens
    new = max(0, total - inputs) if asked is None else asked
    check(
        inputs + new <= total,
        f"`inputs` tokens + `max_new_tokens` must be <= {total}. Given: {inputs} `inputs` tokens and {new} "
        "`max_new_tokens`",
    )
    check(
        inputs <= model.max_input_tokens,
        f"`inputs` must have less than {model.max_input_tokens} tokens. Given: {inputs}",
    )
    return new
