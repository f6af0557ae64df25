"""Values from the command line: ``a.b=value``, ``--a.b value``, ``--flag``, ``release.tags[0]=value``."""

from __future__ import annotations

import re
from collections.abc import Sequence as Words

from training_ready.recipe.faults import COMMAND_LINE, Fault, Origin
from training_ready.recipe.tree import Mapping, Node, Scalar, Sequence, merge
from training_ready.recipe.yaml_file import UnreadableYaml, read_yaml_value

_ORIGIN = Origin(COMMAND_LINE)
_KEY = re.compile(r"[A-Za-z_][\w\-]*(\.[A-Za-z_][\w\-]*|\[\d+\])*")
_STEP = re.compile(r"[A-Za-z_][\w\-]*|\[\d+\]")


def apply_overrides(tree: Mapping, words: Words[str]) -> tuple[Mapping, list[Fault]]:
    """A new tree with every override merged in, later ones over earlier ones, and the faults of their form."""
    pairs, faults = _pairs(words)
    for key, text in pairs:
        try:
            value, found = read_yaml_value(text, _ORIGIN, key)
        except UnreadableYaml as error:
            faults.append(error.fault)
            continue
        faults += found
        steps = _STEP.findall(key)
        try:
            tree = _set_key(tree, steps[0], steps[1:], value, "")
        except IndexError as error:
            faults.append(Fault(_ORIGIN, key, str(error)))
    return tree, faults


def _pairs(words: Words[str]) -> tuple[list[tuple[str, str]], list[Fault]]:
    pairs: list[tuple[str, str]] = []
    faults: list[Fault] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        key, equals, text = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            first, dot, rest = key.partition(".")
            key = first.replace("-", "_") + dot + rest
        key = "resume_from_checkpoint" if key == "resume" else key  # short for TRL's own key
        if not _KEY.fullmatch(key):
            faults.append(Fault(_ORIGIN, "", f"cannot read {_shown(word)}; write key=value or --key value"))
        elif equals:
            pairs.append((key, text))
        elif not word.startswith("--"):
            faults.append(
                Fault(_ORIGIN, "", f"{_shown(word)} stands alone; write key=value, a list as key='[a, b]'")
            )
        elif position < len(words) and not words[position].startswith("--"):
            pairs.append((key, words[position]))
            position += 1
        else:
            pairs.append((key, "true"))
    return pairs, faults


def _shown(word: str) -> str:
    return repr(word.partition("=")[0][:40])


def _set(node: Node | None, steps: list[str], value: Node, path: str) -> Node:
    """``node`` with ``value`` merged in at ``steps``; nothing is changed in place."""
    if not steps:
        return merge(node, value)
    step, rest = steps[0], steps[1:]
    if step.startswith("["):
        index = int(step[1:-1])
        items = list(node.items) if isinstance(node, Sequence) else []
        if index >= len(items):
            raise IndexError(
                f"`{path or 'the recipe'}` has {len(items)} entries, so there is no entry {index}"
            )
        items[index] = _set(items[index], rest, value, path + step)
        return Sequence(origin=node.origin if node else _ORIGIN, items=items)
    if isinstance(node, Sequence) or (isinstance(node, Scalar) and not node.is_null):
        raise IndexError(f"`{path}` is not a mapping, so it has no key `{step}`")
    mapping = node if isinstance(node, Mapping) else Mapping(origin=_ORIGIN)
    return _set_key(mapping, step, rest, value, path)


def _set_key(mapping: Mapping, name: str, rest: list[str], value: Node, path: str) -> Mapping:
    below = f"{path}.{name}" if path else name
    changed = _set(mapping.entries.get(name), rest, value, below)
    return Mapping(origin=mapping.origin, entries={**mapping.entries, name: changed})
