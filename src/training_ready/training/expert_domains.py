"""Do experts take to domains in a run? The record's domain beside every token, and what it says about the experts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training_ready.moe.domains import DomainLoadMonitor, mutual_information
from training_ready.stream.groups import PackReader

logger = logging.getLogger(__name__)

DOMAIN_STATE = "expert_domains.safetensors"
DOMAINS = "domains"
"""The batch's tensor of domain numbers, shaped as ``input_ids``; -1 where the domain is not known."""


def domains_of(*readers: PackReader | None) -> list[str]:
    """Every domain that the corpora of these streams name, sorted. Waits for all tokens: they say it."""
    lines = [line for reader in readers if reader is not None for line in reader.plan.lines]
    for line in lines:
        line.wait_for_all()
    return sorted({cell.domain for line in lines for cell in line.index.cells} - {""})


class DomainCollator:
    """Another collator's batches, and the domain of every token in them."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], names: Sequence[str]) -> None:
        self._collate = collate
        self._number = {name: number for number, name in enumerate(names)}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self._collate(examples)
        known = np.concatenate(
            [
                np.repeat([self._number.get(name, -1) for name in one["domains"]], one["seq_lengths"])
                for one in examples
            ]
        )
        numbers = torch.full_like(batch["input_ids"], -1)
        mask = batch.get("attention_mask")
        if mask is None:  # packs, one after the other
            numbers.view(-1)[: len(known)] = torch.as_tensor(known)
        else:
            numbers[mask.bool()] = torch.as_tensor(known)
        batch[DOMAINS] = numbers
        return batch


class ExpertDomains:
    """Mutual information of domain and expert, in training since the last log and of each evaluation."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.names = list(names)
        self._monitors = {phase: DomainLoadMonitor(model, names) for phase in ("train", "eval")}
        self._read: dict[str, Tensor] = {}
        self._evaluated: Tensor | None = None

    @contextmanager
    def tokens(self, numbers: Tensor | None, *, training: bool) -> Iterator[None]:
        """Count the forwards inside the block; None: the domains of their tokens are not known."""
        if numbers is None:
            yield
            return
        with self._monitors["train" if training else "eval"].tokens(numbers):
            yield

    def mark(self) -> Callable[[], None]:
        """See :meth:`DomainLoadMonitor.mark`; of training only."""
        return self._monitors["train"].mark()

    def since_last_log(self) -> dict[str, float]:
        """Metrics of the training tokens since the last call; a collective call."""
        return _metrics(self._since("train"))

    def evaluation(self) -> dict[str, float]:
        """Metrics of the evaluation that has just ended; a collective call."""
        self._evaluated = self._since("eval")
        return {f"eval_{name}": value for name, value in _metrics(self._evaluated).items()}

    def counted(self) -> Tensor:
        """Training pairs (L, D, E) of the run so far; a collective call."""
        return self._monitors["train"].counts()

    def save(self, counted: Tensor, folder: Path) -> None:
        """Write what :meth:`counted` gave into a checkpoint."""
        read = self._read.get("train", torch.zeros_like(counted))
        names = {"names": json.dumps(self.names)}
        save_file({"counted": counted, "read": read}, folder / DOMAIN_STATE, metadata=names)

    def restore(self, checkpoint: Path, *, here: bool) -> None:
        """Go on from what a checkpoint counted. ``here``: this is the rank that adds it to its own counts."""
        path, names = checkpoint / DOMAIN_STATE, None
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                names = json.loads((file.metadata() or {}).get("names", "null"))
        if names != self.names:  # of another corpus, which stream.resume_allow lets through
            logger.warning(f"{path} does not count {self.names}: domains are counted from here on only")
            return
        state = load_file(path)
        if here:
            self._monitors["train"].restore(state["counted"])
        self._read["train"] = state["read"]

    def facts(self) -> dict[str, Any]:
        """For the summary: of the last evaluation, or without one of the whole training; a collective call."""
        counts = self.counted() if self._evaluated is None else self._evaluated
        return {
            "names": self.names,
            "measured_in": "training" if self._evaluated is None else "evaluation",
            # (token, choice): every token as often as it chose an expert
            "pairs": [int(row) for row in counts[0].sum(dim=-1)] if len(counts) else [],
            "mutual_information": mutual_information(counts).tolist(),
        }

    def _since(self, phase: str) -> Tensor:
        counts = self._monitors[phase].counts()
        before, self._read[phase] = self._read.get(phase), counts
        return counts if before is None else counts - before


def _metrics(counts: Tensor) -> dict[str, float]:
    """In nats, over the layers: 0 when every domain uses the experts alike."""
    if not int(counts.sum()):
        return {}
    by_layer = mutual_information(counts)
    return {
        "moe/mutual_information_mean": float(by_layer.mean()),
        "moe/mutual_information_max": float(by_layer.max()),
    }
