"""``${NAME}`` or ``${NAME:-otherwise}`` in a value reads the environment; ``$${`` stands for ``${`` itself."""

from __future__ import annotations

import re
from collections.abc import Mapping as Environment
from dataclasses import replace

from training_ready.recipe.confidential import is_secret_name
from training_ready.recipe.faults import Fault
from training_ready.recipe.tree import Mapping, Node, Scalar

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<otherwise>[^}]*))?\}|\$\{")


class _Unresolved(Exception):
    pass


def interpolate(tree: Mapping, environment: Environment[str, str]) -> tuple[Mapping, list[Fault]]:
    """The tree with every reference replaced. A missing or secret variable is a fault."""
    faults: list[Fault] = []
    return _walk_mapping(tree, environment, "", faults), faults


def escape(text: str) -> str:
    """Text that reads back as itself."""
    return text.replace("${", "$${")


def _walk(node: Node, environment: Environment[str, str], path: str, faults: list[Fault]) -> Node:
    if isinstance(node, Scalar):
        try:
            return replace(node, text=_REFERENCE.sub(lambda match: _value(match, environment), node.text))
        except _Unresolved as error:
            faults.append(Fault(node.origin, path, str(error)))
            return replace(node, text="", faulty=True)
    if isinstance(node, Mapping):
        return _walk_mapping(node, environment, path, faults)
    items = [_walk(child, environment, f"{path}[{index}]", faults) for index, child in enumerate(node.items)]
    return replace(node, items=items)


def _walk_mapping(
    node: Mapping, environment: Environment[str, str], path: str, faults: list[Fault]
) -> Mapping:
    entries = {
        name: _walk(child, environment, f"{path}.{name}" if path else name, faults)
        for name, child in node.entries.items()
    }
    return replace(node, entries=entries)


def _value(match: re.Match[str], environment: Environment[str, str]) -> str:
    if match[0] == "$${":
        return "${"
    name = match["name"]
    if name is None:
        raise _Unresolved(
            "holds `${` without a name and a closing brace; write `$${` for the characters themselves"
        )
    if is_secret_name(name):
        raise _Unresolved(
            f"reads ${{{name}}}: secrets stay in the environment, where the code that needs them looks"
        )
    found = environment.get(name)
    if found is not None:
        return found
    if match["otherwise"] is not None:
        return match["otherwise"]
    raise _Unresolved(f"reads ${{{name}}}, which is not set; export {name}, or write ${{{name}:-a default}}")
