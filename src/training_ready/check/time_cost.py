"""How long, and for how much? From steps that were counted and a step that was timed; otherwise: unknown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, passed, warned

# What the time of one step depends on, beside the machine.
_SHAPE = (
    "model_name_or_path", "model", "moe", "dtype", "attn_implementation", "bf16", "fp16", "optim", "max_length",
    "packing", "per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing",
    "activation_checkpointing_kwargs", "use_peft", "lora_r", "lora_target_modules", "lora_target_parameters",
    "load_in_4bit", "load_in_8bit", "use_cpu", "torch_compile", "activation_offloading",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds per step that a finished run of the same shape took: the median between its logs."""

    seconds: float
    run: Path
    date: str
    machine: str


def probe_time_cost(context: CheckContext) -> list[Finding]:
    """Steps, tokens, hours and price."""
    length, recipe = context.length, context.recipe
    text = f"{length.about}{length.steps:,} steps, {length.about}{length.tokens:,} tokens"
    timing = _timing(context)
    if timing is None:
        return [
            passed(
                f"{text}; time and cost unknown: no finished run of this shape is in {_runs(context)}; "
                "`training-ready check RECIPE --trial 10` times ten steps",
                steps=length.steps,
                tokens=length.tokens,
                hours=None,
                cost=None,
            )
        ]
    hours = timing.seconds * length.steps / 3600
    price = recipe.budget.price_per_hour
    cost = None if price is None else hours * price
    money = (
        "cost unknown (budget.price_per_hour)" if cost is None else f"costs {cost:,.2f} at {price:g} per hour"
    )
    speed = length.tokens / length.steps / timing.seconds
    findings = [
        passed(
            f"{text}, {_duration(hours)} at {timing.seconds:.3g} s per step ({speed:,.0f} tokens per second; "
            f"measured {timing.date} on {timing.machine} in {timing.run}); {money}",
            steps=length.steps,
            tokens=length.tokens,
            hours=hours,
            cost=cost,
            measured_in=str(timing.run),
        )
    ]
    most = recipe.budget.max_hours
    if most is not None and hours > most:
        findings.append(
            warned(
                f"the run needs {_duration(hours)}, and budget.max_hours stops it after {most:g} h, at step "
                f"{int(length.steps * most / hours):,} of {length.steps:,}",
                key="budget.max_hours",
                fix="raise it, or continue later with resume_from_checkpoint: auto",
            )
        )
    return findings


def _duration(hours: float) -> str:
    seconds = hours * 3600
    return (
        f"{hours:.1f} h"
        if hours >= 1
        else f"{seconds / 60:.0f} min"
        if seconds >= 120
        else f"{seconds:.0f} s"
    )


def _runs(context: CheckContext) -> Path:
    return context.recipe.output_dir.parent


def _timing(context: CheckContext) -> Timing | None:
    """The newest finished run beside this one whose steps were the same work on as many processes."""
    shape, found = _shape(context.recipe.resolved()), []
    for summary in _runs(context).glob("*/summary.json"):
        facts = json.loads(summary.read_text(encoding="utf-8"))
        if _shape(yaml.safe_load(facts["recipe"]["resolved"])) != shape:
            continue
        if facts["hardware"].get("processes") != context.topology.processes:
            continue
        seconds = list(_seconds_per_step(summary.parent / "metrics.jsonl"))
        if seconds:
            hardware = facts["hardware"]
            machine = hardware["processor"] if hardware["device"] == "cpu" else hardware["device"]
            count = max(hardware["device_count"], 1)
            timing = Timing(
                seconds=statistics.median(seconds),
                run=summary.parent,
                date=facts["finished_at"][:10],
                machine=f"{count} x {machine}",
            )
            found.append((facts["finished_at"], timing))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _shape(resolved: dict[str, Any]) -> dict[str, Any]:
    return {key: resolved[key] for key in _SHAPE if resolved.get(key) is not None}


def _seconds_per_step(metrics: Path) -> Iterator[float]:
    """Between two logs of the loss; what a start, a pause or an evaluation takes is left to the median."""
    if not metrics.exists():
        return
    before: dict[str, Any] | None = None
    for text in metrics.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if "loss" not in line:
            continue
        if before is not None and line["step"] > before["step"]:
            yield (line["time"] - before["time"]) / (line["step"] - before["step"])
        before = line
