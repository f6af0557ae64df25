"""How does one answer come about? A prompt in, tokens out, one step of the model at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from training_ready.serving.errors import GenerationFailed
from training_ready.serving.model import ServedModel
from training_ready.serving.sampling import Sampling, TokenChooser
from training_ready.serving.text import OutgoingText, TextDecoder, Token

FinishReason = Literal["length", "eos_token", "stop_sequence"]


@dataclass(kw_only=True, frozen=True, slots=True)
class Generation:
    """One admitted request: everything is checked, and prompt and answer fit the context."""

    prompt_ids: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    top_n_tokens: int = 0  # likeliest alternatives to report with each token
    prefill_details: bool = False  # report each prompt token's own probability


@dataclass(kw_only=True, frozen=True, slots=True)
class Ending:
    """The end of an answer."""

    reason: FinishReason
    text: str
    generated_tokens: int  # with the end-of-turn token, if there is one
    prefill: list[Token]  # empty unless asked for; the first token has no probability


@dataclass(kw_only=True, frozen=True, slots=True)
class Step:
    """A token that may leave, and with the last one the ending."""

    token: Token
    ending: Ending | None = None


def decode(model: ServedModel, generation: Generation) -> Iterator[Step]:
    """Produce an answer step by step, by the same arithmetic as ``model.generate``.

    The caller advances it under ``torch.inference_mode()``; between two steps any other sequence may run, as each has
    a cache of its own.

    Raises:
        GenerationFailed: the model produced logits that are not numbers.
    """
    ids = torch.tensor([generation.prompt_ids], device=model.device)  # (1, T)
    cache = DynamicCache(config=model.network.config.get_text_config(decoder=True))
    chooser = TokenChooser(generation.sampling, model.device, ids.shape[1])
    decoder = TextDecoder(model.tokenizer, generation.prompt_ids)
    outgoing = OutgoingText(generation.stop, keep_stop=generation.keep_stop)
    prefill: list[Token] = []

    logits = _forward(model, ids, cache, every_position=generation.prefill_details)  # (1, T or 1, V)
    if generation.prefill_details:
        prefill = _prefill_tokens(model, ids, logits)
    for count in range(1, generation.max_new_tokens + 1):
        last = _usable(logits[:, -1])
        token_id = chooser.choose(ids, last)
        ids = torch.cat([ids, ids.new_tensor([[token_id]])], dim=-1)
        token = _describe(model, last, token_id, generation.top_n_tokens)
        ended = token_id in model.end_ids or count == generation.max_new_tokens
        piece = decoder.push(token_id) + (decoder.flush() if ended else "")
        ready = outgoing.push(token, piece)
        if not (ended or outgoing.stopped):
            yield from (Step(token=each) for each in ready)
            logits = _forward(model, ids[:, -1:], cache)
            continue
        ready += outgoing.close()
        yield from (Step(token=each) for each in ready[:-1])
        reason = _reason(model, outgoing, token_id)
        ending = Ending(reason=reason, text=outgoing.text, generated_tokens=count, prefill=prefill)
        yield Step(token=ready[-1], ending=ending)
        return


def _forward(model: ServedModel, ids: Tensor, cache: DynamicCache, *, every_position: bool = False) -> Tensor:
    """Logits (1, T, V) of the new tokens ``ids`` (1, T); of the last one only unless ``every_position``."""
    keep = 0 if every_position else 1
    output = model.network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=keep)
    logits: Tensor = output.logits
    return logits


def _usable(logits: Tensor) -> Tensor:
    """The same (1, V) logits in float32, once they are known to be numbers."""
    logits = logits.float()
    if not torch.isfinite(logits).all():
        wrong = int((~torch.isfinite(logits)).sum())
        raise GenerationFailed(f"{wrong} of {logits.shape[-1]} logits are not finite")
    return logits


def _reason(model: ServedModel, outgoing: OutgoingText, token_id: int) -> FinishReason:
    if token_id in model.end_ids:
        return "eos_token"
    return "stop_sequence" if outgoing.stopped else "length"


def _describe(model: ServedModel, logits: Tensor, token_id: int, top_n: int) -> Token:
    logprobs = logits[0].log_softmax(dim=-1)  # (V,)
    special = model.special_tokens
    token = Token(
        id=token_id,
        text=special.get(token_id, ""),  # of an ordinary token: set when it leaves
        logprob=float(logprobs[token_id]),
        special=token_id in special,
    )
    if top_n:
        best = logprobs.topk(min(top_n, logprobs.shape[-1]))
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            text = special.get(place) or model.tokenizer.decode([place])
            token.top.append(Token(id=place, text=text, logprob=value, special=place in special))
    return token


def _prefill_tokens(model: ServedModel, ids: Tensor, logits: Tensor) -> list[Token]:
    """Each prompt token with its probability given those before it; ``ids`` (1, T), ``logits`` (1, T, V)."""
    scores = logits[0, :-1].float().log_softmax(dim=-1)
    chosen = scores.gather(-1, ids[0, 1:, None])[:, 0]
    if not torch.isfinite(chosen).all():
        raise GenerationFailed("the prompt's log-probabilities are not finite")
    values = [None, *chosen.tolist()]
    prompt = ids[0].tolist()
    return [
        Token(id=each, text=model.tokenizer.decode([each]), logprob=value)
        for each, value in zip(prompt, values, strict=True)
    ]
