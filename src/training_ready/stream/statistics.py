"""What is in the data that a plan trains on? Lengths, sources and stages, counted and drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training_ready.stream.lengths import TokenCounts
from training_ready.stream.line import PackLine
from training_ready.stream.plan import PackPlan

_QUANTILES = {"shortest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}


def statistics(plan: PackPlan, max_length: int, counts: TokenCounts) -> dict[str, Any]:
    """Counts of one epoch per part and cell, quantiles of lengths, and what the length policy did."""
    return {
        "parts": {
            name: {
                "packs_per_epoch": line.packs_per_epoch,
                "fill": float(line.epoch_counts[:, 1].sum()) / (line.packs_per_epoch * max_length),
                "lengths": {
                    key: int(np.quantile(lengths_of(line), share, method="nearest"))
                    for key, share in _QUANTILES.items()
                },
            }
            for name, line in plan.parts.items()
        },
        "cells": [cell for name, line in plan.parts.items() for cell in _cells(name, line)],
        "policy": asdict(counts),
    }


def lengths_of(line: PackLine) -> npt.NDArray[np.int32]:
    """Lengths of all rows of a part."""
    rows = [line.packed(0, group).rows for group in range(len(line.groups))]
    return np.asarray(line.index.lengths[np.concatenate(rows)])


def _cells(name: str, line: PackLine) -> list[dict[str, Any]]:
    return [
        {
            "part": name,
            "source": cell.source,
            "stage": cell.stage,
            "components": list(cell.components),
            "rows": int(rows),
            "tokens": int(tokens),
            "learned_tokens": int(learned),
        }
        for cell, (rows, tokens, learned) in zip(line.index.cells, line.epoch_counts, strict=True)
        if rows
    ]


def draw_statistics(plan: PackPlan, max_length: int, path: Path) -> None:
    """Lengths, and tokens by source and by stage, in one picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    lengths, sources, stages = figure.subplots(1, 3)
    for name, line in plan.parts.items():
        lengths.hist(lengths_of(line), bins=40, range=(0, max_length), histtype="step", label=name)
    lengths.set(title="rows by length", xlabel="tokens", ylabel="rows")
    lengths.legend()
    for axes, title in ((sources, "source"), (stages, "stage")):
        found: dict[str, int] = {}
        for name, line in plan.parts.items():
            for cell in _cells(name, line):
                found[cell[title]] = found.get(cell[title], 0) + cell["tokens"]
        _bars(axes, found)
        axes.set(title=f"tokens by {title}", xlabel="tokens of one epoch")
    figure.savefig(path, dpi=120)


def _bars(axes: Any, found: Mapping[str, int]) -> None:
    ordered = sorted(found.items(), key=lambda item: item[1])
    axes.barh([name for name, _ in ordered], [tokens for _, tokens in ordered])
