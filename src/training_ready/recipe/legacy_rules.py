"""Old keys that need more than a new name: each rule says what the value meant and writes what means the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from training_ready.recipe.tree import Mapping as Tree
from training_ready.recipe.tree import Node, Scalar

if TYPE_CHECKING:
    from training_ready.recipe.migrate import Translation

Rule = Callable[["Translation", Node, Tree], bool]
"""True if the rule has dealt with the key; false leaves it to the common way."""


def _warmup_ratio(work: Translation, node: Node, tree: Tree) -> bool:
    steps = tree.entries.get("warmup_steps")
    if isinstance(steps, Scalar) and steps.text not in ("0", "0.0"):
        work.note(node, "warmup_ratio", "", f"had no effect: `warmup_steps: {steps.text}` came first")
        return True
    if not isinstance(node, Scalar):
        return False
    try:
        share = float(node.text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        work.refuse(node, "warmup_ratio", f"{node.text} is not a share of the run in [0, 1)")
        return True
    work.put("warmup_steps", node)
    work.note(node, "warmup_ratio", "warmup_steps", "a value below 1 is a share of the run")
    return True


def _warmup_steps(work: Translation, node: Node, tree: Tree) -> bool:
    zero = isinstance(node, Scalar) and node.text in ("0", "0.0")
    if zero and "warmup_ratio" in tree.entries:
        work.note(node, "warmup_steps", "", "0 left the choice to `warmup_ratio`")
        return True
    return False


def _chat_template(work: Translation, node: Node, tree: Tree) -> bool:
    if not isinstance(node, Scalar):
        return False
    if node.is_null:
        work.note(node, "chat_template", "", "set to nothing")
    elif "{" not in node.text:
        work.put("chat_template_path", node)
        work.note(node, "chat_template", "chat_template_path", "renamed, same meaning")
    else:
        work.template = node.text
        work.put_text("chat_template_path", str(work.template_path), node.origin)
        work.note(
            node, "chat_template", f"chat_template_path: {work.template_path}", "the same text, in a file"
        )
    return True


def _becomes(key: str, when: str, new: str, value: str) -> Rule:
    """A rule for a key whose one value ``when`` is now ``new: value``; other values go the common way."""

    def rule(work: Translation, node: Node, tree: Tree) -> bool:
        if not isinstance(node, Scalar) or node.text.lower() != when:
            return False
        other = tree.entries.get(new)
        if new != key and isinstance(other, Scalar) and other.text != value:
            work.refuse(node, key, f"it means `{new}: {value}`, but {new} is {other.text} ({other.origin})")
            return True
        work.put_text(new, value, node.origin)
        work.note(node, f"{key}: {node.text}", f"{new}: {value}", "renamed, same meaning")
        return True

    return rule


_PREPARED_HERE = {
    "skip_prepare_dataset": "true",
    "add_special_tokens": "false",
    "append_concat_token": "false",
}


def _dataset_kwargs(work: Translation, node: Node, tree: Tree) -> bool:
    """Says what happens here anyway: the data come prepared, and the template alone writes special tokens."""
    given = node.entries if isinstance(node, Tree) else {}
    said = {key: child.text.lower() for key, child in given.items() if isinstance(child, Scalar)}
    if not given or any(_PREPARED_HERE.get(key) != said.get(key) for key in given):
        return False
    work.note(node, "dataset_kwargs", "", "the stream does so anyway")
    return True


def _push_to_hub(work: Translation, node: Node, tree: Tree) -> bool:
    """TRL pushed while it trained; a release is pushed after the run, to the same repository."""
    if not isinstance(node, Scalar) or node.text.lower() != "true":
        work.note(node, "push_to_hub", "", "nothing is pushed unless `training-ready release publish` is run")
        return True
    named = tree.entries.get("hub_model_id") or tree.entries.get("output_dir")
    if not isinstance(named, Scalar) or named.is_null:
        work.refuse(
            node, "push_to_hub", "it pushed to a repository called like `output_dir`, which is not set"
        )
        return True
    work.put_text("release.repo_id", _repository(tree), named.origin)
    after = (
        "after the run, by `training-ready release publish`, private if new; fill in `release` for the card"
    )
    work.note(node, "push_to_hub", "release.repo_id", after)
    return True


def _hub_model_id(work: Translation, node: Node, tree: Tree) -> bool:
    if isinstance(node, Scalar) and not node.is_null:
        work.put_text("release.repo_id", node.text, node.origin)
        work.note(node, "hub_model_id", "release.repo_id", "the repository that a release is pushed to")
    return True


def _repository(tree: Tree) -> str:
    """``hub_model_id``, or as transformers has it the last part of ``output_dir``."""
    named, folder = tree.entries.get("hub_model_id"), tree.entries.get("output_dir")
    if isinstance(named, Scalar) and not named.is_null:
        return named.text
    return folder.text.rstrip("/").rpartition("/")[2] if isinstance(folder, Scalar) else ""


def _torch_dtype(work: Translation, node: Node, tree: Tree) -> bool:
    if not isinstance(node, Scalar) or not node.is_null:
        return False
    work.put_text("dtype", "float32", node.origin)
    work.note(node, "torch_dtype: null", "dtype: float32", "transformers loaded float32 when none was named")
    return True


def _at_epochs(event: str, every: str) -> Rule:
    """A rule for what happened at the end of each epoch: the stream has no seams, a share of the run says the same."""

    def rule(work: Translation, node: Node, tree: Tree) -> bool:
        said = node.text.lower() if isinstance(node, Scalar) else ""
        never_saved = event == "save_strategy" and said in ("no", "false")
        if said != "epoch" and not never_saved:
            return False
        epochs = _epochs(tree)
        if epochs is None and not never_saved:
            work.refuse(
                node, event, "`max_steps` or `num_train_epochs` does not say how many epochs there are"
            )
            return True
        if event == "eval_strategy" and epochs is not None and epochs <= 1:
            work.put_text(event, "no", node.origin)
            work.note(
                node, f"{event}: epoch", f"{event}: no", "one epoch: evaluated once, after the last step"
            )
            return True
        if epochs is not None and epochs > 1 and not never_saved:
            share = math.floor(1e6 / epochs) / 1e6
            meaning = "at the end of each epoch: a value below 1 is a share of the run"
        else:
            share = 0.5
            meaning = (
                "at the end, where a release comes from, and half-way, so that an interrupted run goes on"
            )
        work.put_text(event, "steps", node.origin)
        work.put_text(every, f"{share:g}", node.origin)
        work.note(node, f"{event}: {said}", f"{every}: {share:g}", meaning)
        return True

    return rule


def _epochs(tree: Tree) -> float | None:
    """How many epochs the old recipe trained, if that can be said; transformers' default is 3."""
    steps, epochs = tree.entries.get("max_steps"), tree.entries.get("num_train_epochs")
    try:
        if isinstance(steps, Scalar) and not steps.is_null and float(steps.text) > 0:
            return None
        return float(epochs.text) if isinstance(epochs, Scalar) and not epochs.is_null else 3.0
    except ValueError:
        return None


def _only_with_steps(every: str, *events: str) -> Rule:
    """A rule for a number of steps that had no effect beside another strategy."""

    def rule(work: Translation, node: Node, tree: Tree) -> bool:
        given = [tree.entries.get(event) for event in events]
        said = {one.text.lower() for one in given if isinstance(one, Scalar)}
        if not said or "steps" in said:
            return False
        work.note(node, every, "", f"had no effect: `{events[0]}` was {' and '.join(sorted(said))}")
        return True

    return rule


SPECIAL: Mapping[str, Rule] = {
    "warmup_ratio": _warmup_ratio,
    "warmup_steps": _warmup_steps,
    "chat_template": _chat_template,
    "torch_dtype": _torch_dtype,
    "use_flash_attention_2": _becomes(
        "use_flash_attention_2", "true", "attn_implementation", "flash_attention_2"
    ),
    "eval_strategy": _at_epochs("eval_strategy", "eval_steps"),
    "evaluation_strategy": _at_epochs("eval_strategy", "eval_steps"),
    "save_strategy": _at_epochs("save_strategy", "save_steps"),
    "eval_steps": _only_with_steps("eval_steps", "eval_strategy", "evaluation_strategy"),
    "save_steps": _only_with_steps("save_steps", "save_strategy"),
    "loss_type": _becomes("loss_type", "chunked_nll", "loss_type", "nll"),
    "dataset_kwargs": _dataset_kwargs,
    "push_to_hub": _push_to_hub,
    "hub_model_id": _hub_model_id,
}
