"""A recipe as it was written: text with positions, before any value has a type.

A plain scalar keeps its text, because YAML alone cannot know whether ``no`` is a word or a boolean and ``2e-5`` a
word or a number. The type of the key decides, once, in ``kinds.coerce``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from training_ready.recipe.faults import Origin

NULL_WORDS = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(kw_only=True, slots=True)
class Scalar:
    """One written value.

    ``plain``: not quoted. ``removes``: a null that replaced an inherited value. ``faulty``: its fault is reported
    already, and its text is gone.
    """

    text: str
    plain: bool
    origin: Origin
    removes: bool = False
    faulty: bool = False

    @property
    def is_null(self) -> bool:
        return self.plain and not self.faulty and self.text in NULL_WORDS


@dataclass(kw_only=True, slots=True)
class Mapping:
    """Keys in written order; the origin of an entry is the line of its key."""

    origin: Origin
    entries: dict[str, Node] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class Sequence:
    """A written list."""

    origin: Origin
    items: list[Node] = field(default_factory=list)


Node = Scalar | Mapping | Sequence


def merge(base: Node | None, above: Node) -> Node:
    """What ``above`` makes of ``base``: mappings merge key by key, everything else (lists too) is replaced.

    A null over an inherited value is marked as a removal: a key that cannot be null returns to its default.
    """
    if isinstance(base, Mapping) and isinstance(above, Mapping):
        return merge_mappings(base, above)
    if isinstance(above, Scalar) and above.is_null and base is not None:
        return replace(above, removes=True)
    return above


def merge_mappings(base: Mapping, above: Mapping) -> Mapping:
    """``merge`` for two mappings."""
    entries = dict(base.entries)
    for name, node in above.entries.items():
        entries[name] = merge(entries.get(name), node)
    return Mapping(origin=above.origin, entries=entries)


def leaves(node: Node, path: str = "") -> Iterator[tuple[str, Scalar]]:
    """Every scalar below ``node`` with its dotted path (``datasets[0].path``)."""
    if isinstance(node, Scalar):
        yield path, node
    elif isinstance(node, Mapping):
        for name, child in node.entries.items():
            yield from leaves(child, f"{path}.{name}" if path else name)
    else:
        for index, child in enumerate(node.items):
            yield from leaves(child, f"{path}[{index}]")
