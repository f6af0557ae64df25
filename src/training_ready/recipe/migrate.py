"""Older recipes (alignment-handbook, open-r1, older TRL) into ours: every change is listed, nothing is guessed.

What cannot be kept exactly is a fault, until the user drops that key by name. Data cannot be carried over at all: old
recipes load datasets from the hub, ours read a built corpus, which the user names.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from training_ready import TrainingReadyError
from training_ready.recipe.confidential import without_secrets
from training_ready.recipe.faults import Fault, Origin, RecipeError
from training_ready.recipe.legacy import (
    DATA_KEYS,
    MEANS_NOTHING,
    NOT_READ,
    OTHER_METHODS,
    REFUSED,
    RENAMED,
    family_of,
)
from training_ready.recipe.legacy_rules import SPECIAL
from training_ready.recipe.load import recipe_from_tree
from training_ready.recipe.recipe import Recipe
from training_ready.recipe.sections import SECTIONS
from training_ready.recipe.tree import Mapping, Node, Scalar, Sequence, merge_mappings
from training_ready.recipe.trl_keys import trl_keys
from training_ready.recipe.yaml_file import UnreadableYaml, read_yaml_file


@dataclass(frozen=True, slots=True)
class Change:
    """One difference between the old recipe and ours."""

    origin: Origin
    old: str
    new: str
    meaning: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Migration:
    """A translated recipe. ``template`` is the text of an inline chat template, to be written where the recipe says."""

    recipe: Recipe
    family: str
    changes: tuple[Change, ...]
    template: str | None
    template_path: Path

    def text(self) -> str:
        """The new recipe as a file."""
        header = f"# {self.recipe.name}: from {self.recipe.path.name}, a recipe of {self.family}.\n"
        return header + self.recipe.to_yaml()

    def write(self, target: Path) -> list[Path]:
        """Write the recipe, and its chat template if there is one. Nothing is overwritten."""
        texts = {target: self.text()}
        if self.template is not None:
            texts[self.template_path] = self.template
        for path in texts:
            if path.exists():
                raise TrainingReadyError(f"{path} exists; name another file: --output FILE")
        target.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        return list(texts)


def migrate(path: Path, *, corpus: str | None, output: Path, drop: Collection[str] = ()) -> Migration:
    """Translate the recipe at ``path``.

    ``corpus`` replaces whatever the old recipe loaded; ``drop`` names keys that may go although they mean something;
    an inline chat template is to be written beside ``output``. Raises ``RecipeError`` with everything that cannot be
    kept exactly.
    """
    try:
        tree, faults = read_yaml_file(path, str(path))
    except UnreadableYaml as error:
        raise RecipeError(str(path), [error.fault]) from None
    tree, secrets = without_secrets(tree)
    work = Translation(
        path=path, corpus=corpus, template_path=output.with_suffix(".jinja"), faults=[*faults, *secrets]
    )
    work.refuse_unknown_drops(tree, drop)
    for key, node in tree.entries.items():
        if key in drop:
            work.note(node, key, "", "dropped as asked")
        else:
            work.translate(key, node, tree)
    if corpus is not None and "data" not in work.new.entries:
        work.put_text("data.corpus", corpus, tree.origin)
    work.evaluation(tree)
    work.whose_turns(tree)
    recipe = recipe_from_tree(path, work.new, work.faults, advice=_ADVICE)
    return Migration(
        recipe=recipe,
        family=family_of(tree.entries) or "TRL",
        changes=tuple(work.changes),
        template=work.template,
        template_path=work.template_path,
    )


_ADVICE = "what cannot be kept must be decided by you: edit the old recipe, or pass `--drop KEY`"


@dataclass(kw_only=True, slots=True)
class Translation:
    """The work on one old recipe: the new tree as it grows, what changed, and what cannot be kept."""

    path: Path
    corpus: str | None
    template_path: Path
    faults: list[Fault]
    changes: list[Change] = field(default_factory=list)
    template: str | None = None
    new: Mapping = field(default_factory=lambda: Mapping(origin=Origin("migration")))

    def put(self, key: str, node: Node) -> None:
        section, _, rest = key.partition(".")
        child = Mapping(origin=node.origin, entries={rest: node}) if rest else node
        self.new = merge_mappings(self.new, Mapping(origin=self.new.origin, entries={section: child}))

    def put_text(self, key: str, text: str, origin: Origin) -> None:
        self.put(key, Scalar(text=text, plain=False, origin=origin))

    def note(self, node: Node, old: str, new: str, meaning: str) -> None:
        self.changes.append(Change(node.origin, old, new, meaning))

    def refuse(self, node: Node, key: str, reason: str) -> None:
        self.faults.append(Fault(node.origin, key, f"cannot be kept exactly: {reason}"))

    def refuse_unknown_drops(self, tree: Mapping, drop: Collection[str]) -> None:
        for key in drop:
            if key not in tree.entries:
                self.faults.append(
                    Fault(tree.origin, key, "--drop names a key that the recipe does not have")
                )

    def translate(self, key: str, node: Node, tree: Mapping) -> None:
        special = SPECIAL.get(key)
        if special is not None and special(self, node, tree):
            return
        if key in OTHER_METHODS:
            self.refuse(node, key, f"it belongs to {OTHER_METHODS[key]}; this project trains SFT")
        elif key in RENAMED:
            self.rename(key, RENAMED[key], node, tree)
        elif key in DATA_KEYS:
            self.data(key, node)
        elif key in MEANS_NOTHING and _is_harmless(node, MEANS_NOTHING[key][0]):
            self.note(node, key, "", MEANS_NOTHING[key][1] or "set to nothing")
        elif key in NOT_READ:
            self.unread(key, node)
        elif key in REFUSED:
            self.refuse(node, key, REFUSED[key])
        elif key in trl_keys() or key in SECTIONS or key == "env":
            self.put(key, node)
        else:
            self.refuse(node, key, "TRL has no such key and no translation is known")

    def rename(self, old: str, new: str, node: Node, tree: Mapping) -> None:
        if new in tree.entries:
            other = tree.entries[new].origin
            self.refuse(node, old, f"it is the old name of `{new}`, which is also set ({other}); keep one")
            return
        self.put(new, node)
        self.note(node, old, new, _RENAME_MEANING.get(old, "renamed, same meaning"))

    def unread(self, key: str, node: Node) -> None:
        values, why = NOT_READ[key]
        if _is_harmless(node, values):
            self.note(node, key, "", why)
        else:
            self.refuse(node, key, why)

    def data(self, key: str, node: Node) -> None:
        what = DATA_KEYS[key]
        if self.corpus is None:
            reason = f"{what} came from the hub; build a corpus with `training-ready data build`"
            self.refuse(node, key, f"{reason} and name it with `--corpus final_dataset/<name>/manifest.json`")
            return
        if "data" not in self.new.entries:
            self.put_text("data.corpus", self.corpus, node.origin)
        self.note(node, key, "data.corpus", f"{what}: whatever {self.corpus} was built from")
        if key == "dataset_mixture" and isinstance(node, Mapping):
            self.mixture(node)

    def mixture(self, node: Mapping) -> None:
        """List what the corpus must hold to be the same data: each set, its split, and what its weight meant."""
        datasets = node.entries.get("datasets")
        for entry in datasets.items if isinstance(datasets, Sequence) else []:
            if not isinstance(entry, Mapping):
                continue
            words = {name: child.text for name, child in entry.entries.items() if isinstance(child, Scalar)}
            weight = words.get("weight")
            share = "all rows" if weight in (None, "1", "1.0") else f"a random {weight} of its own rows"
            name = " ".join(words[part] for part in ("id", "config", "split") if part in words)
            meaning = f"{share}; `weight` is a share of that set, not of the mixture (TRL's `fraction`)"
            self.note(entry, f"dataset_mixture: {name}", "data.corpus", meaning)
        for part in ("seed", "test_split_size"):
            if part in node.entries:
                meaning = "splits and order are fixed when the corpus is built"
                self.note(node.entries[part], f"dataset_mixture.{part}", "data.corpus", meaning)

    def evaluation(self, tree: Mapping) -> None:
        """A recipe that evaluates needs a split to evaluate on; a built corpus calls it ``val``."""
        data = self.new.entries.get("data")
        asked = [
            key
            for key in ("eval_strategy", "evaluation_strategy", "do_eval")
            if _is_on(tree.entries.get(key))
        ]
        if (
            asked
            and isinstance(data, Mapping)
            and "eval_split" not in data.entries
            and self.corpus is not None
        ):
            node = tree.entries[asked[0]]
            self.put_text("data.eval_split", "val", node.origin)
            self.note(
                node, asked[0], "data.eval_split: val", "the split of a built corpus that is never learned"
            )

    def whose_turns(self, tree: Mapping) -> None:
        """TRL learned every token of a conversation unless it was told otherwise; here a role is always named."""
        if self.corpus is None:
            return
        said = tree.entries.get("assistant_only_loss")
        origin = tree.origin if said is None else said.origin
        self.put_text("data.target_role", "assistant", origin)
        if not _is_on(said):
            meaning = (
                "without `assistant_only_loss: true` every token was learned; here only the turns of one role"
            )
            self.note(said or tree, "(every token learned)", "data.target_role: assistant", meaning)


_RENAME_MEANING = {
    "torch_dtype": "renamed; TRL's default is float32, so it must not get lost",
    "max_seq_length": "renamed; TRL's default is 1,024",
}


def _is_harmless(node: Node, values: frozenset[str] | None) -> bool:
    if values is None:
        return True
    if isinstance(node, Scalar):
        return node.is_null or node.text.lower() in values
    return not (node.entries if isinstance(node, Mapping) else node.items)


def _is_on(node: Node | None) -> bool:
    return isinstance(node, Scalar) and not node.is_null and node.text.lower() not in ("no", "false", "off")
