"""``extends:``: a recipe on top of others. Paths are relative to the file that names them; no cycles."""

from __future__ import annotations

from pathlib import Path

from training_ready.recipe.faults import Fault
from training_ready.recipe.tree import Mapping, Node, Scalar, Sequence, merge_mappings
from training_ready.recipe.yaml_file import UnreadableYaml, read_yaml_file


def read_with_bases(path: Path) -> tuple[Mapping, list[Fault]]:
    """The merged tree of a recipe and all it extends, without the ``extends`` keys, and the faults of form.

    Raises ``UnreadableYaml`` if the recipe itself cannot be read; an unreadable base is a fault like others.
    """
    return _read(path, str(path), ())


def bases_of(tree: Mapping) -> list[Scalar]:
    """The written paths under ``extends``."""
    node = tree.entries.get("extends")
    items: list[Node] = node.items if isinstance(node, Sequence) else [] if node is None else [node]
    return [item for item in items if isinstance(item, Scalar) and not item.is_null]


def _read(path: Path, source: str, above: tuple[Path, ...]) -> tuple[Mapping, list[Fault]]:
    tree, faults = read_yaml_file(path, source)
    chain = (*above, path.resolve())
    written = tree.entries.get("extends")
    bases = bases_of(tree)
    if written is not None and (isinstance(written, Mapping) or not bases):
        faults.append(Fault(written.origin, "extends", "expected a path or a list of paths"))
    merged = Mapping(origin=tree.origin)
    for base in bases:
        inherited = _read_base(path, base, chain, faults)
        if inherited is not None:
            merged = merge_mappings(merged, inherited)
    own = {name: node for name, node in tree.entries.items() if name != "extends"}
    return merge_mappings(merged, Mapping(origin=tree.origin, entries=own)), faults


def _read_base(path: Path, base: Scalar, chain: tuple[Path, ...], faults: list[Fault]) -> Mapping | None:
    target = path.parent / base.text
    resolved = target.resolve()
    if resolved in chain:
        circle = " -> ".join(one.name for one in (*chain[chain.index(resolved) :], resolved))
        faults.append(Fault(base.origin, "extends", f"goes in a circle: {circle}"))
        return None
    try:
        tree, found = _read(target, _shown(path, base.text), chain)
    except UnreadableYaml as error:
        where = error.fault.origin
        if where.line is None:
            faults.append(Fault(base.origin, "extends", f"{where.source}: {error.fault.message}"))
        else:
            faults.append(error.fault)
        return None
    faults += found
    return tree


def _shown(path: Path, written: str) -> str:
    """The base's path as a person would type it: beside the recipe, without ``x/../``."""
    target = Path(written)
    if target.is_absolute():
        return str(target)
    parts: list[str] = list(path.parent.parts)
    for part in target.parts:
        if part == ".." and parts and parts[-1] not in ("..", "/"):
            parts.pop()
        elif part != ".":
            parts.append(part)
    return str(Path(*parts))
