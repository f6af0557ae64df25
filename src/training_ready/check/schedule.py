"""Does the schedule fit the run: warm-up, evaluations, checkpoints, logs?"""

from __future__ import annotations

from collections.abc import Iterator

from training_ready.check.context import CheckContext, Missing
from training_ready.check.finding import Finding, counted, failed, not_run, passed, warned
from training_ready.check.steps import RunLength

_EVENTS = (
    ("eval_strategy", "eval_steps"),
    ("save_strategy", "save_steps"),
    ("logging_strategy", "logging_steps"),
)
_MANY_SAVES = 100


def probe_schedule(context: CheckContext) -> list[Finding]:
    """What never happens, or happens more often than it is useful, in the steps that the run takes."""
    findings = [*_never_by_strategy(context)]
    try:
        length = context.length
    except Missing as missing:
        if context.recipe.effective("max_steps") > 0:
            findings += _never_by_steps(context, context.recipe.effective("max_steps"))
        return [
            *findings,
            not_run(f"the steps of the run are unknown: {missing.blame}", key="num_train_epochs"),
        ]
    findings += [*_never_by_steps(context, length.steps), *_warm_up(context, length)]
    findings += [*_too_often(context, length), *_too_large(context, length)]
    return [*findings, _measured(length)]


def _measured(length: RunLength) -> Finding:
    return passed(
        f"{length.about}{counted(length.steps, 'step')} of {counted(length.packs_per_step, 'pack')}: "
        f"{length.epochs:.2f} passes over "
        f"{length.about}{length.packs_per_epoch:,} packs with {length.tokens_per_epoch:,} tokens",
        steps=length.steps,
        epochs=length.epochs,
        packs_per_epoch=length.packs_per_epoch,
        exact=length.exact,
    )


def _never_by_strategy(context: CheckContext) -> Iterator[Finding]:
    recipe = context.recipe
    for strategy, every in _EVENTS:
        if recipe.effective(strategy) == "epoch":
            yield failed(
                "the stream has no end of an epoch that the trainer could see: this would never happen",
                key=strategy,
                fix=f"{strategy}: steps, and {every}",
            )
    if recipe.effective("save_strategy") == "no":
        yield failed(
            "no checkpoint would be left to release or to continue from",
            key="save_strategy",
            fix="save_strategy: steps",
        )
    if recipe.effective("logging_strategy") == "no":
        yield failed("no loss would be logged, and a release states it", key="logging_strategy")
    if recipe.data.eval_split and recipe.effective("eval_strategy") == "no":
        yield warned(
            f"data.eval_split {recipe.data.eval_split} is evaluated once, after the last step: eval_strategy is no",
            key="data.eval_split",
            fix="eval_strategy: steps",
        )
    if recipe.effective("max_steps") > 0 and context.is_set("num_train_epochs"):
        yield warned("max_steps wins over num_train_epochs, which has no effect", key="num_train_epochs")


def _every(context: CheckContext, key: str, steps: int) -> int:
    """The interval in steps; a number below 1 is a share of the run, none for ``eval_steps`` is ``logging_steps``."""
    value = float(context.recipe.effective(key) or context.recipe.effective("logging_steps"))
    return max(round(value * steps), 1) if value < 1 else int(value)


def _never_by_steps(context: CheckContext, steps: int) -> Iterator[Finding]:
    for strategy, key in _EVENTS:
        every = _every(context, key, steps)
        if context.recipe.effective(strategy) != "steps" or every <= steps:
            continue
        message = f"{key} {every} > the run's {steps} steps"
        if key == "save_steps":
            if steps > 1000:
                yield failed(
                    f"{message}: nothing would be kept before the end",
                    key=key,
                    fix=f"save_steps: {steps // 10}",
                )
        else:
            yield failed(f"{message}: it would never happen", key=key, fix=f"{key}: {max(steps // 10, 1)}")


def _warm_up(context: CheckContext, length: RunLength) -> Iterator[Finding]:
    given = context.recipe.effective("warmup_steps") or 0
    steps = round(given * length.steps) if given < 1 else int(given)
    if steps >= length.steps and steps > 0:
        yield failed(
            f"{steps} steps of warm-up >= {length.about}{length.steps} steps of the run: the learning rate never "
            "gets there",
            key="warmup_steps",
            fix="warmup_steps: 0.03 (below 1 a share of the run)",
        )
    elif steps > length.steps / 2:
        yield warned(f"{steps} of {length.about}{length.steps} steps are warm-up", key="warmup_steps")


def _too_often(context: CheckContext, length: RunLength) -> Iterator[Finding]:
    recipe = context.recipe
    if recipe.effective("eval_strategy") == "steps" and length.evaluation_packs:
        every = _every(context, "eval_steps", length.steps)
        # A pack costs an evaluation one forward, and training three times that: forward and backward.
        share = length.evaluation_packs / (3 * every * length.packs_per_step)
        if share > 1:
            yield failed(
                f"an evaluation ({length.about}{length.evaluation_packs} packs forward) costs {share:.1f} times "
                f"the {counted(every, 'training step')} between two of them "
                f"({counted(every * length.packs_per_step, 'pack')}, forward and backward)",
                key="eval_steps",
                fix=f"eval_steps: {_rounded(every * share * 10)}",
            )
    if recipe.effective("save_strategy") == "steps":
        every = _every(context, "save_steps", length.steps)
        saves = length.steps // every
        if saves > _MANY_SAVES and every < 10:
            yield failed(
                f"{saves} checkpoints, one every {counted(every, 'step')}",
                key="save_steps",
                fix=f"save_steps: {_rounded(length.steps / 10)}",
            )


def _too_large(context: CheckContext, length: RunLength) -> Iterator[Finding]:
    if length.packs_per_step > length.packs_per_epoch:
        yield failed(
            f"a step takes {counted(length.packs_per_step, 'pack')}, and the corpus has "
            f"{length.about}{length.packs_per_epoch}: rows would be repeated within a step",
            key=context.first_set("gradient_accumulation_steps", "per_device_train_batch_size"),
            fix="fewer processes, micro-batches or packs, or a larger corpus",
        )


def _rounded(steps: float) -> int:
    """To one or two digits that a person would write."""
    size = int(10 ** max(len(str(int(steps))) - 2, 0))
    return max(int(steps / size) * size, 1)
