"""The entry point of a training process: recipe first, so that a mistake costs a second and no import of torch."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from training_ready import TrainingReadyError
from training_ready.recipe.load import load_recipe
from training_ready.recipe.recipe import Recipe
from training_ready.storage.embedded import die_with_parent
from training_ready.training.checkpoints import INTERRUPTED_STATUS, Interrupted

_USAGE = "usage: accelerate launch scripts/run_sft.py [--skip PROBE]... RECIPE.yaml [key=value ...]"

Check = Callable[[str, Sequence[str], Sequence[str]], None]
"""Called with the recipe, its overrides and the probes to leave out; raises TrainingReadyError to refuse the run."""


def _prepare_environment(recipe: Recipe) -> None:
    """Before the first import of torch and transformers, which read their settings from the environment."""
    # A launcher that is killed leaves no process behind that goes on writing to the run folder. A rank of several dies
    # at once: to save takes all of them, and the next start may already be reading the checkpoints.
    die_with_parent(signal.SIGKILL if "LOCAL_RANK" in os.environ else signal.SIGTERM)
    os.environ.update(recipe.env)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    if recipe.effective("use_cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # an installed DeepSpeed warns that it finds no GPU


def _speak(first: bool) -> None:
    """The first process tells what happens; the others speak up only when something is wrong."""
    ours = logging.getLogger("training_ready")
    ours.setLevel(logging.INFO if first else logging.WARNING)
    to_terminal = logging.StreamHandler(sys.stdout)
    to_terminal.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(to_terminal)


def _without_skips(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments, names after ``--skip``)."""
    rest, skip, words = [], [], iter(arguments)
    for word in words:
        if word == "--skip":
            skip.append(next(words, ""))
        else:
            rest.append(word)
    return rest, skip


def main(arguments: Sequence[str], *, check: Check | None = None) -> int:
    """Runs the recipe named first, with ``key=value`` overrides after it; returns the exit status.

    ``check`` may refuse the run before anything heavy is loaded; ``--skip PROBE`` is for it.
    """
    arguments, skip = _without_skips(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if arguments else 2
    try:
        overrides = arguments[1:]
        recipe = load_recipe(arguments[0], overrides)
        _prepare_environment(recipe)
        if check is not None:
            check(arguments[0], overrides, skip)
        from training_ready.training.run import run_sft

        first = os.environ.get("RANK", "0") == "0"
        _speak(first)
        run_sft(recipe, Console(quiet=not first))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return INTERRUPTED_STATUS
    except TrainingReadyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
