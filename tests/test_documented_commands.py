"""Every `training-ready` command on a page exists, with those options and that many arguments."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from training_ready.cli import app

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def shell_lines(text: str) -> Iterator[str]:
    """Lines of fenced shell blocks and of indented blocks."""
    language: str | None = None  # of the open fence
    for line in text.replace("\\\n", " ").splitlines():
        if fence := re.match(r"\s*```(\w*)", line):
            language = fence[1] if language is None else None
        elif language in ("", "bash", "sh", "console") or (language is None and line.startswith("    ")):
            yield line


def commands(page: Path) -> list[list[str]]:
    """The words after `training-ready`, up to a pipe, a redirection or a comment."""
    found = []
    for line in shell_lines(page.read_text(encoding="utf-8")):
        if call := re.search(r"(?:^|[\s(/])training-ready (.*)", line):
            found.append(shlex.split(re.split(r"\s[|>&]|\)\"", call[1])[0], comments=True))
    return found


def parse(command: Any, words: list[str], parent: Any = None) -> None:
    """Parses without running; raises what a user would see."""
    context = command.make_context(command.name, list(words), parent=parent)
    if hasattr(command, "resolve_command"):
        _, chosen, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(chosen, rest, context)


def test_pages_show_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_parse(page: Path) -> None:
    root = typer.main.get_command(app)
    for words in commands(page):
        if words == ["--help"]:
            continue
        try:
            parse(root, words)
        except Exception as error:
            if "does not exist" in str(error):  # the reader's own folder
                continue
            pytest.fail(f"{page.name}: training-ready {shlex.join(words)}: {error!r}")
