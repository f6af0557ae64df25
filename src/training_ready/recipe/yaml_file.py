"""YAML text to a tree with positions. Refuses what YAML settles in silence: duplicate keys, merge keys, tags."""

from __future__ import annotations

from pathlib import Path

import yaml

from training_ready.recipe.faults import Fault, Origin
from training_ready.recipe.tree import Mapping, Node, Scalar, Sequence

_MOST_NODES = 20_000  # an alias bomb or a data file, not a recipe
_DEEPEST = 40
_STRING_TAG = "tag:yaml.org,2002:str"
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{name}"
    for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "seq", "map", "merge")
)


class UnreadableYaml(Exception):
    """The text is not YAML at all; ``fault`` says where."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def read_yaml_file(path: Path, source: str) -> tuple[Mapping, list[Fault]]:
    """The tree of a recipe file, and the faults of its form. Raises ``UnreadableYaml`` if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UnreadableYaml(Fault(Origin(source), "", "no such file")) from None
    except IsADirectoryError:
        raise UnreadableYaml(Fault(Origin(source), "", "is a directory, not a recipe file")) from None
    except UnicodeDecodeError as error:
        raise UnreadableYaml(Fault(Origin(source), "", f"is not UTF-8 text (byte {error.start})")) from None
    except OSError as error:
        raise UnreadableYaml(Fault(Origin(source), "", f"cannot be read: {error.strerror}")) from None
    return read_yaml(text, source)


def read_yaml(text: str, source: str) -> tuple[Mapping, list[Fault]]:
    """The tree of a mapping written in ``text``. Raises ``UnreadableYaml`` on a syntax error or another shape."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise UnreadableYaml(_syntax_fault(error, source)) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UnreadableYaml(Fault(Origin(source), "", f"is not YAML: {type(error).__name__}")) from None
    if root is None:
        raise UnreadableYaml(
            Fault(Origin(source, 1), "", "is empty; start from one of `training-ready recipe ls`")
        )
    builder = _Builder(source)
    tree = builder.build(root, Origin(source, root.start_mark.line + 1), "", 0)
    if not isinstance(tree, Mapping):
        raise UnreadableYaml(
            Fault(tree.origin, "", "a recipe is a mapping of keys to values, this is something else")
        )
    return tree, builder.faults


def read_yaml_value(text: str, origin: Origin, key: str) -> tuple[Node, list[Fault]]:
    """One value as typed on a command line: ``[a, b]``, ``{a: 1}`` and quotes are YAML, the rest is plain text."""
    if not text.startswith(("[", "{", '"', "'")):
        return Scalar(text=text, plain=True, origin=origin), []
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "syntax error"
        raise UnreadableYaml(Fault(origin, key, f"the value is not YAML: {problem}")) from None
    builder = _Builder(origin.source)
    builder.fixed = origin
    if root is None:
        raise UnreadableYaml(Fault(origin, key, "the value is empty"))
    return builder.build(root, origin, key, 0), builder.faults


def _syntax_fault(error: yaml.MarkedYAMLError, source: str) -> Fault:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else None
    problem = error.problem or "syntax error"
    if "'\\t'" in problem:
        problem += " (a tab: indent with spaces)"
    if "but found another document" in problem:
        problem = "holds more than one YAML document; a recipe is one"
    return Fault(Origin(source, line), "", f"YAML: {problem}")


class _Builder:
    """Turns PyYAML nodes into ours, collecting the faults of form."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.faults: list[Fault] = []
        self.fixed: Origin | None = None
        self._count = 0

    def build(self, node: yaml.Node, origin: Origin, path: str, depth: int) -> Node:
        self._count += 1
        if self._count > _MOST_NODES or depth > _DEEPEST:
            limits = f"more than {_MOST_NODES} values or {_DEEPEST} levels"
            raise UnreadableYaml(Fault(origin, path, f"holds {limits}: aliases that repeat themselves?"))
        if node.tag not in _PLAIN_TAGS:
            self.faults.append(Fault(origin, path, f"the YAML tag {node.tag} is not allowed in a recipe"))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, origin, path, depth)
        if isinstance(node, yaml.SequenceNode):
            items = [
                self.build(child, self._origin(child), f"{path}[{index}]", depth + 1)
                for index, child in enumerate(node.value)
            ]
            return Sequence(origin=origin, items=items)
        if not isinstance(node, yaml.ScalarNode):
            raise TypeError(f"YAML has no other nodes than these: {node!r}")
        plain = node.style is None and not (node.tag == _STRING_TAG and _explicitly_tagged(node))
        return Scalar(text=node.value, plain=plain, origin=origin)

    def _mapping(self, node: yaml.MappingNode, origin: Origin, path: str, depth: int) -> Mapping:
        entries: dict[str, Node] = {}
        first_line: dict[str, Origin] = {}
        for key_node, value_node in node.value:
            at = self._origin(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(Fault(at, path, "a key must be a plain word"))
                continue
            name = key_node.value
            dotted = f"{path}.{name}" if path else name
            if name == "<<":
                self.faults.append(
                    Fault(at, dotted, "YAML merge keys are not supported; use `extends: base.yaml`")
                )
            elif name in entries:
                self.faults.append(Fault(at, dotted, f"written twice, first at {first_line[name]}; keep one"))
            else:
                first_line[name] = at
                entries[name] = self.build(value_node, at, dotted, depth + 1)
        return Mapping(origin=origin, entries=entries)

    def _origin(self, node: yaml.Node) -> Origin:
        return self.fixed or Origin(self.source, node.start_mark.line + 1)


def _explicitly_tagged(node: yaml.ScalarNode) -> bool:
    """Whether a plain scalar was written with ``!!str`` (its mark then starts at the tag)."""
    written = node.end_mark.index - node.start_mark.index
    return bool(written != len(node.value))
