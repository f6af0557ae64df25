"""Which experts got the tokens, log by log? Metrics for every tracker, totals for the summary."""

from __future__ import annotations

import torch

from training_ready.moe.monitor import ExpertLoadMonitor, LoadSnapshot


class ExpertLoadLog:
    """Shares of the routed tokens per layer and expert, since the last log and since the start."""

    def __init__(self, monitor: ExpertLoadMonitor) -> None:
        self._monitor = monitor
        self._logged: torch.Tensor | None = None

    def since_last_log(self) -> dict[str, float]:
        """``expert_load/layer_<l>/expert_<e>`` over all ranks; a collective call."""
        counts = self._monitor.reduce()
        recent = counts if self._logged is None else counts - self._logged
        self._logged = counts
        shares = recent / recent.sum(dim=1, keepdim=True).clamp(min=1)
        return {
            f"expert_load/layer_{layer}/expert_{expert}": round(float(share), 5)
            for layer, row in zip(self._monitor.layers, shares, strict=True)
            for expert, share in enumerate(row)
        }

    def total(self) -> LoadSnapshot:
        """Over all training tokens of this process's lifetime; a collective call."""
        return self._monitor.snapshot("train")
