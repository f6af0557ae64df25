"""Which token is next? One request's own rules and its own random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from training_ready.serving.errors import GenerationFailed

# Dividing by less overflows float32; at this temperature every token but the likeliest already has probability 0.
COLDEST = 1e-6


@dataclass(kw_only=True, frozen=True, slots=True)
class Sampling:
    """How to pick tokens. The defaults are greedy. Values are checked at admission, not here."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and answer
    frequency_penalty: float = 0.0  # over the answer, per earlier use of the token
    presence_penalty: float = 0.0  # over the answer, once
    seed: int = 0


class TokenChooser:
    """Applies a ``Sampling`` to logits, with a random generator that no other request touches."""

    def __init__(self, sampling: Sampling, device: torch.device, prompt_length: int) -> None:
        self._sampling = sampling
        self._prompt_length = prompt_length
        self._generator = torch.Generator(device=device).manual_seed(sampling.seed)
        self._penalties: Any = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0:
            self._penalties.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self._filters: Any = LogitsProcessorList(_filters(sampling))

    def choose(self, ids: Tensor, logits: Tensor) -> int:
        """The next token id.

        Args:
            ids: (1, T) prompt and answer so far.
            logits: (1, V) float32, finite.

        Raises:
            GenerationFailed: the penalties drove every score out of range.
        """
        scores = self._use_penalties(self._penalties(ids, logits), ids)
        if not self._sampling.do_sample:
            return int(scores.argmax(dim=-1))
        # A constant shift changes no probability, and keeps a low temperature from overflowing.
        scores = self._filters(ids, scores - scores.max(dim=-1, keepdim=True).values)
        probabilities = scores.softmax(dim=-1)
        if not torch.isfinite(probabilities).all():
            raise GenerationFailed("the sampling parameters leave no token with a finite probability")
        return int(torch.multinomial(probabilities, num_samples=1, generator=self._generator))

    def _use_penalties(self, scores: Tensor, ids: Tensor) -> Tensor:
        frequency, presence = self._sampling.frequency_penalty, self._sampling.presence_penalty
        if not frequency and not presence:
            return scores
        counts = torch.bincount(ids[0, self._prompt_length :], minlength=scores.shape[-1])
        return scores - frequency * counts - presence * (counts > 0)


def _filters(sampling: Sampling) -> list[Any]:
    filters: list[Any] = []
    if sampling.temperature != 1.0:
        filters.append(TemperatureLogitsWarper(max(sampling.temperature, COLDEST)))
    if sampling.top_k:
        filters.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        filters.append(TopPLogitsWarper(sampling.top_p))
    if sampling.typical_p < 1.0:
        filters.append(TypicalLogitsWarper(sampling.typical_p))
    return filters
