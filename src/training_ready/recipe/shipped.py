"""The recipes and launch configurations that come with the package, in a checkout and in an installed wheel alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training_ready import TrainingReadyError
from training_ready.recipe.faults import did_you_mean
from training_ready.recipe.inherit import bases_of
from training_ready.recipe.yaml_file import read_yaml_file

EDITOR_LINE = "# yaml-language-server: $schema="
SCHEMA_NAME = "recipe.schema.json"
_PACKAGE = Path(__file__).parents[1]


class NotShipped(TrainingReadyError):
    """No shipped file has that name, or a copy would overwrite one."""


@dataclass(frozen=True, slots=True)
class Shipped:
    """One shipped file: its short name, where it lies, and its first comment line."""

    name: str
    path: Path
    description: str


def shipped_root() -> Path:
    """The folder that holds ``recipes``, ``accelerate_configs`` and ``deepspeed_configs``.

    A wheel carries them inside the package; a checkout has them at its top. Raises ``NotShipped`` if neither is there.
    """
    for root in (_PACKAGE / "_shipped", _PACKAGE.parents[1]):
        if (root / "recipes").is_dir():
            return root
    raise NotShipped(
        f"no shipped recipes in {_PACKAGE / '_shipped'} nor in {_PACKAGE.parents[1]}; reinstall the package"
    )


def shipped(folder: str = "recipes") -> list[Shipped]:
    """The shipped files of a folder, by name."""
    paths = sorted(path for path in (shipped_root() / folder).iterdir() if path.suffix in (".yaml", ".json"))
    return [Shipped(path.stem, path, _first_comment(path)) for path in paths if path.name != SCHEMA_NAME]


def find_shipped(name: str, folder: str = "recipes") -> Path:
    """The shipped file called ``name``, with or without its suffix. Raises ``NotShipped`` naming the nearest."""
    known = {one.name: one.path for one in shipped(folder)}
    wanted = Path(name).stem if name.endswith((".yaml", ".json")) else name
    if wanted in known:
        return known[wanted]
    hint = did_you_mean(wanted, known) or "there are " + ", ".join(known)
    raise NotShipped(f"{folder} has no `{name}`; {hint}")


def accelerate_config(name: str) -> Path:
    """The file of ``launch.accelerate_config``: a path as given if it exists, else a shipped topology by name."""
    path = Path(name)
    if path.is_file():
        return path
    if path.name != name or path.suffix in (".yaml", ".yml", ".json"):
        raise NotShipped(
            f"launch.accelerate_config: there is no file {name}; a bare name is a shipped topology"
        )
    return find_shipped(name, "accelerate_configs")


def copy_recipe(name: str, destination: Path | None = None) -> list[Path]:
    """Copy a shipped recipe, and what it extends, to be edited; the files written, the recipe first.

    ``destination`` is a file or a folder (default: the current folder). Nothing is overwritten.
    """
    source = find_shipped(name)
    target = destination or Path(source.name)
    if target.is_dir():
        target = target / source.name
    copies = {target: source.read_text(encoding="utf-8")}
    for base in _all_bases(source):
        copies[target.parent / base.name] = base.read_text(encoding="utf-8")
    for path in copies:
        if path.exists():
            raise NotShipped(f"{path} exists; name another destination: training-ready recipe cp {name} DEST")
    target.parent.mkdir(parents=True, exist_ok=True)
    for path, text in copies.items():
        path.write_text(_with_editor_line(text), encoding="utf-8")
    return list(copies)


def _all_bases(source: Path) -> list[Path]:
    """Every recipe below ``source``; shipped recipes extend only their neighbours."""
    found: list[Path] = []
    tree, _ = read_yaml_file(source, str(source))
    for written in bases_of(tree):
        base = source.parent / written.text
        if base.resolve().parent != source.resolve().parent:
            raise NotShipped(f"{source} extends {written.text}, which is not beside it")
        found += [base, *_all_bases(base)]
    return list(dict.fromkeys(found))


def _with_editor_line(text: str) -> str:
    return text if EDITOR_LINE in text else f"{EDITOR_LINE}{SCHEMA_NAME}\n{text}"


def _first_comment(path: Path) -> str:
    """The first comment line that is not an editor's; empty for JSON, which has no comments."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("#") and not line.startswith(EDITOR_LINE) and line.strip("# \n"):
                return line.strip("# \n")
            if line.strip() and not line.startswith("#"):
                break
    return ""
