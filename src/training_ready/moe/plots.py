"""What does the load look like? Two pictures: one moment over all experts, and the course of a run.

Figures are built without pyplot, so no window, no global state, and any number of runs in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from training_ready.moe.families import MoEError
from training_ready.moe.monitor import LoadSnapshot

# Okabe and Ito's palette, told apart under every common colour blindness.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#5A5A5A"
MAX_ANNOTATED_CELLS = 256
MAX_RATIO = 8.0


def plot_expert_load(snapshot: LoadSnapshot, path: Path, *, title: str = "Expert load") -> Path:
    """Heat map, layers by experts, of each expert's load relative to an even share (1.0); dead experts are
    crossed.

    ``title`` names the run or step; the number of tokens is added. Returns ``path`` (PNG).
    """
    if not snapshot.layers:
        raise MoEError("a snapshot without layers cannot be drawn.")
    shares = snapshot.load().numpy()
    layers, experts = shares.shape
    relative = shares * experts
    width = min(max(5.5, 2.2 + 0.55 * experts), 14.0)
    height = min(max(2.6, 1.5 + 0.38 * layers), 12.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    reach = min(max(2.0, float(np.ceil(relative.max()))), MAX_RATIO)
    # Diverging around an even share, by ratio: half of it is as far from even as twice of it.
    norm = LogNorm(vmin=1 / reach, vmax=reach)
    image = axes.imshow(
        relative.clip(1 / reach, reach), cmap="PuOr_r", norm=norm, aspect="auto", interpolation="nearest"
    )
    _colour_bar(figure, axes, image, reach)
    dead = int((shares == 0).sum())
    found = f"{dead} dead (×)" if dead else "none dead"
    axes.set_title(f"{title}\n{snapshot.phase} · {snapshot.tokens:,} tokens · {found}", fontsize=10)
    axes.set_xlabel("expert")
    axes.set_ylabel("decoder layer")
    _ticks(axes, [layer.layer for layer in snapshot.layers], experts)
    if relative.size <= MAX_ANNOTATED_CELLS:
        _annotate(axes, relative, reach)
    rows, columns = np.nonzero(shares == 0)
    size = min(60.0, max(9.0, 6000.0 / relative.size))
    axes.scatter(columns, rows, marker="x", s=size, linewidths=1.4, color="white")
    return _save(figure, path)


def plot_load_over_steps(
    history: Sequence[tuple[int, LoadSnapshot]], path: Path, *, title: str = "Expert load during the run"
) -> Path:
    """Course of the load over (step, snapshot) pairs: busiest and idlest expert above, entropy below.

    Drawn are the worst layer and the median layer: a mean over layers would hide one that collapses. Returns
    ``path``.
    """
    if not history:
        raise MoEError("no snapshots to draw: the history is empty.")
    steps = np.array([step for step, _ in history])
    shares = np.stack([snapshot.load().numpy() for _, snapshot in history])  # (S, L, E)
    experts = shares.shape[2]
    entropy = np.array([[layer.entropy for layer in snapshot.layers] for _, snapshot in history])
    figure = Figure(figsize=(8.0, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title, fontsize=11)
    busiest, idlest = shares.max(axis=2), shares.min(axis=2)  # (S, L)
    _pair(upper, steps, busiest.max(axis=1), np.median(busiest, axis=1), ORANGE, "busiest expert")
    _pair(upper, steps, idlest.min(axis=1), np.median(idlest, axis=1), BLUE, "idlest expert")
    upper.axhline(
        1 / experts, color=GREY, linestyle=":", linewidth=1.2, label=f"even share ({1 / experts:.3g})"
    )
    upper.set_ylabel("share of routed tokens")
    upper.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
    upper.set_ylim(bottom=0.0)
    relative_entropy = entropy / np.log(max(experts, 2))
    _pair(lower, steps, relative_entropy.min(axis=1), np.median(relative_entropy, axis=1), GREEN, "entropy")
    lower.set_ylabel("entropy / ln E  (1 = even)")
    lower.set_ylim(0.0, 1.05)
    lower.set_xlabel("step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _save(figure, path)


def _pair(
    axes: Axes,
    steps: NDArray[np.int_],
    worst: NDArray[np.float64],
    median: NDArray[np.float64],
    colour: str,
    what: str,
) -> None:
    marker = "o" if len(steps) < 30 else None
    axes.plot(
        steps, worst, color=colour, linewidth=1.8, marker=marker, markersize=3, label=f"{what}, worst layer"
    )
    axes.plot(
        steps,
        median,
        color=colour,
        linewidth=1.2,
        linestyle="--",
        marker=marker,
        markersize=2,
        label=f"{what}, median layer",
    )


def _ticks(axes: Axes, layers: list[int], experts: int) -> None:
    every_row, every_column = max(1, len(layers) // 24), max(1, -(-experts // 32))
    rows = range(0, len(layers), every_row)
    axes.set_yticks(list(rows), [str(layers[row]) for row in rows])
    columns = range(0, experts, every_column)
    axes.set_xticks(list(columns), [str(column) for column in columns])
    axes.tick_params(length=0, labelsize=8)


def _annotate(axes: Axes, relative: NDArray[np.float64], reach: float) -> None:
    for (row, column), value in np.ndenumerate(relative):
        if value > 0:
            dark = abs(np.log(value)) > 0.6 * np.log(reach)
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if dark else "black",
            )


def _colour_bar(figure: Figure, axes: Axes, image: AxesImage, reach: float) -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend="both", aspect=25)
    ratios = [ratio for ratio in (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0) if 1 / reach <= ratio <= reach]
    bar.set_ticks(ratios, labels=[f"{ratio:g}×" for ratio in ratios])
    bar.minorticks_off()
    bar.set_label("load / even share", fontsize=9)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))
    return path
