"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Series = Sequence[tuple[int, float]]


def plot_loss(train: Series, evaluation: Series, path: Path, *, title: str) -> None:
    """Training and evaluation loss (nats per learned token) over optimizer steps, as a PNG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), marker=".", label="train")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), marker="o", linestyle="--", label="evaluation")
        axes.legend(frameon=False)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per learned token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
