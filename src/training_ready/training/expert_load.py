"""Which experts got the tokens, log by log? Metrics for every tracker, thresholds, totals for the summary."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training_ready.moe.families import MoEError
from training_ready.moe.monitor import ExpertLoadMonitor, LoadSnapshot, layer_load
from training_ready.moe.plots import plot_expert_load
from training_ready.recipe.sections import MoeSection

logger = logging.getLogger(__name__)

MAX_EXPERT_METRICS = 256
"""Above so many (layer, expert) pairs a tracker gets the worst layers only; the pictures show all."""


LOAD_STATE = "expert_load.safetensors"


class ExpertLoadLog:
    """Shares of the routed tokens per layer and expert, since the last log and since the run's first step."""

    def __init__(self, model: nn.Module, moe: MoeSection, *, start: int = 0) -> None:
        """``start``: steps that were done before this process."""
        self.monitor = ExpertLoadMonitor(model)
        self._warn_below, self._stop_after = moe.warn_min_share, moe.stop_on_dead_steps
        self._logged: Tensor | None = None
        self._last_used: Tensor | None = None
        self._last_step = start

    def since_last_log(self, step: int) -> dict[str, float]:
        """Metrics of the steps since the last log up to ``step`` over all ranks; a collective call.

        Raises :class:`MoEError` on every rank when an expert has been dead for ``moe.stop_on_dead_steps``.
        """
        counts = self.monitor.reduce()
        recent = counts if self._logged is None else counts - self._logged
        self._logged = counts
        layers = [layer_load(layer, row) for layer, row in zip(self.monitor.layers, recent, strict=True)]
        snapshot = LoadSnapshot(phase="train", tokens=int(recent.sum(dim=1).max()), layers=layers)
        self._judge(step, recent)
        self._last_step = step
        metrics = snapshot.metrics()
        if recent.numel() <= MAX_EXPERT_METRICS:
            metrics |= {
                f"expert_load/layer_{one.layer}/expert_{expert}": round(share, 5)
                for one in layers
                for expert, share in enumerate(one.load)
            }
        return metrics

    def evaluation(self, picture: Path | None, title: str) -> dict[str, float]:
        """Metrics of the evaluation that has just ended, drawn to ``picture`` if given; a collective call."""
        snapshot = self.monitor.snapshot("eval")
        self.monitor.reset("eval")
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            plot_expert_load(snapshot, picture, title=title)
        return {f"eval_{name}": value for name, value in snapshot.metrics().items()}

    def total(self) -> LoadSnapshot:
        """Over all training tokens of the run, those before a restart included; a collective call."""
        return self.monitor.snapshot("train")

    def state(self) -> dict[str, Tensor]:
        """Everything that a restart would forget; a collective call."""
        counted = self.monitor.state()
        pairs = counted[:, : self.monitor.family.num_experts]
        zeros = torch.zeros_like(pairs)
        return {
            "counted": counted,
            "logged": zeros if self._logged is None else self._logged,
            "last_used": zeros if self._last_used is None else self._last_used,
            "last_step": torch.tensor([self._last_step]),
        }

    def restore(self, checkpoint: Path, *, here: bool) -> None:
        """Go on from what a checkpoint counted. ``here``: this is the rank that adds it to its own counts."""
        if not (checkpoint / LOAD_STATE).is_file():
            logger.warning(
                f"{checkpoint} holds no {LOAD_STATE}: the experts' load is counted from here on only"
            )
            return
        state = load_file(checkpoint / LOAD_STATE)
        if here:
            self.monitor.restore(state["counted"])
        self._logged, self._last_used = state["logged"], state["last_used"]
        self._last_step = int(state["last_step"])

    def _judge(self, step: int, recent: Tensor) -> None:
        if self._last_used is None:
            self._last_used = torch.full_like(recent, self._last_step)
        self._last_used[recent > 0] = step
        shares = recent / recent.sum(dim=1, keepdim=True).clamp(min=1)
        if self._warn_below is not None and bool((shares < self._warn_below).any()):
            layer, expert = divmod(int(shares.argmin()), shares.shape[1])
            logger.warning(
                f"step {step}: {int((shares < self._warn_below).sum())} experts got less than moe.warn_min_share "
                f"{self._warn_below:g} of their layer's tokens; the least is {float(shares.min()):.5f}, "
                f"expert {expert} of layer {self.monitor.layers[layer]}"
            )
        idle = step - self._last_used
        if self._stop_after is not None and int(idle.max()) >= self._stop_after:
            layer, expert = divmod(int(idle.argmax()), idle.shape[1])
            raise MoEError(
                f"step {step}: {int((idle >= self._stop_after).sum())} experts got no token for moe.stop_on_dead_steps "
                f"{self._stop_after} steps or more, expert {expert} of layer {self.monitor.layers[layer]} for "
                f"{int(idle.max())}. Raise moe.balance_coefficient or lower learning_rate, and continue from the last "
                "checkpoint or start anew."
            )


def save_load(state: dict[str, Tensor], folder: Path) -> None:
    """Write a :meth:`ExpertLoadLog.state` into a checkpoint."""
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / LOAD_STATE)
