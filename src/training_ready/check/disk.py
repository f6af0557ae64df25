"""Is there room for the checkpoints that lie on the disk at once, the one being written among them?"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from training_ready.check.context import CheckContext, Missing
from training_ready.check.finding import Finding, failed, not_run, passed

# Bytes of optimizer state per trained parameter, where it is not twice the parameter's own size (Adam's moments).
_STATE_BYTES = {"8bit": 2, "4bit": 1, "adafactor": 0, "sgd": 0, "rmsprop": 4, "lion": 4, "adagrad": 4}
_MASTER_BYTES = 12
"""DeepSpeed keeps an fp32 copy and two fp32 moments of every trained parameter."""


def probe_disk(context: CheckContext) -> list[Finding]:
    """Size of a checkpoint x the most that lie on the disk at once, against the free space of the run folder."""
    one, parts = checkpoint_bytes(context)
    copies, why = _copies(context)
    need = one * copies
    text = f"{_size(need)} = {_size(one)} ({parts}) x {copies} at once ({why})"
    measured: dict[str, Any] = {"checkpoint_bytes": one, "needed_bytes": need}
    if context.recipe.launch.ovh is not None and not context.starting:
        return [
            passed(f"checkpoints need {text}", **measured),
            not_run("the run's disk is on another machine (launch.ovh); its own start checks it"),
        ]
    place = _existing(context.recipe.output_dir)
    free = shutil.disk_usage(place).free
    if free < need:
        return [
            failed(
                f"checkpoints need {text}, and {place} has {_size(free)} free",
                key=context.first_set("save_total_limit", "output_dir"),
                fix="a smaller save_total_limit, fewer saves, or another output_dir",
                **measured,
                free_bytes=free,
            )
        ]
    return [passed(f"checkpoints need {text}; {place} has {_size(free)} free", **measured, free_bytes=free)]


def checkpoint_bytes(context: CheckContext) -> tuple[int, str]:
    """Bytes of one checkpoint, and what they are: saved weights and the optimizer's state. The rest is small."""
    model: Any = context.model
    moe = context.recipe.moe
    adapters = bool(context.recipe.effective("use_peft") or moe.adapters or moe.shared_base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if adapters else list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in saved)
    state = _state_bytes(context)
    optimizer = sum(p.numel() * (2 * p.element_size() if state is None else state) for p in trained)
    what = "adapters" if adapters else "weights"
    if context.recipe.effective("save_only_model"):
        return weights, f"{what} {_size(weights)}, no optimizer"
    return weights + optimizer, f"{what} {_size(weights)} + optimizer {_size(optimizer)}"


def _state_bytes(context: CheckContext) -> int | None:
    if context.topology.sharding.startswith("zero"):
        return _MASTER_BYTES
    name = str(context.recipe.effective("optim"))
    return next((size for part, size in _STATE_BYTES.items() if part in name), None)


def _copies(context: CheckContext) -> tuple[int, str]:
    """Checkpoints on the disk at the fullest moment, and how that is known."""
    from training_ready.training.checkpoints import copies_on_disk

    recipe = context.recipe
    mirrored, best = recipe.checkpoint.mirror is not False, bool(recipe.effective("load_best_model_at_end"))
    limit, saves = recipe.effective("save_total_limit"), _saves(context)
    most = copies_on_disk(limit or None, mirrored=mirrored)
    if most is None:
        return (
            (1, "the number of saves is unknown") if saves is None else (saves, "save_total_limit is not set")
        )
    why = [
        "save_total_limit 1, and the one before it until it is written"
        if limit == 1
        else f"save_total_limit {limit}, the one being written included"
    ]
    why += ["one on its way to the bucket"] * mirrored + ["the best one"] * best
    copies = most + best
    if saves is not None and saves < copies:
        return saves, "as many as the run saves"
    return copies, " + ".join(why)


def _saves(context: CheckContext) -> int | None:
    """Checkpoints that the run writes; None if that is not known."""
    recipe = context.recipe
    every = float(recipe.effective("save_steps"))
    try:
        steps = context.length.steps
    except Missing:
        steps = max(recipe.effective("max_steps"), 0)
    if recipe.effective("save_strategy") == "no":
        return 1  # the last step, or an interruption
    if recipe.effective("save_strategy") != "steps":
        return None
    if every < 1:
        return round(1 / every)
    return -(-steps // max(int(every), 1)) if steps else None


def _existing(folder: Path) -> Path:
    path = folder.resolve()
    while not path.exists():
        path = path.parent
    return path


def _size(count: int) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:,} bytes"
