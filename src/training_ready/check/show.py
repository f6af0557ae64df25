"""A report for people: one line per finding, the rendered sample below."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from training_ready.check.finding import Finding
from training_ready.check.run import SKIPPED, Report

_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "not run": "dim"}


def show(report: Report, console: Console) -> None:
    """Print every finding, the sample with its learned tokens, and the verdict."""
    table = Table("probe", "", "what was found", box=None, pad_edge=False, title_justify="left")
    for outcome in report.outcomes:
        for number, finding in enumerate(outcome.findings):
            if finding.message.endswith(SKIPPED):  # the verdict names it
                continue
            style = _STYLES[finding.status]
            table.add_row(
                "" if number else outcome.probe, f"[{style}]{finding.status}[/{style}]", escape(said(finding))
            )
    console.print(table, highlight=False)
    _show_sample(report, console)
    console.print(verdict(report), highlight=False, markup=False, soft_wrap=True)


def said(finding: Finding) -> str:
    """A finding in one piece: where, which key, what, and what to do."""
    place = f"{finding.where}: " if finding.where else ""
    key = f"`{finding.key}`: " if finding.key else ""
    fix = f". Do: {finding.fix}" if finding.fix else ""
    return f"{place}{key}{finding.message.removesuffix('.')}{fix}"


def verdict(report: Report) -> str:
    """The last line: how many failed, and what was not looked at."""
    counts = dict.fromkeys(_STYLES, 0)
    for outcome in report.outcomes:
        counts[outcome.status] += 1
    unseen = [outcome.probe for outcome in report.outcomes if outcome.status == "not run"]
    partly = [
        outcome.probe
        for outcome in report.outcomes
        if outcome.status == "fail" and any(finding.status == "not run" for finding in outcome.findings)
    ]
    seconds = sum(outcome.seconds for outcome in report.outcomes)
    words = f"{report.recipe}: {counts['fail']} failed, {counts['pass'] + counts['warn']} passed"
    words += f" ({counts['warn']} with a remark)" if counts["warn"] else ""
    if unseen or partly:
        words += f", not or not wholly run: {', '.join([*unseen, *partly])}"
    return f"{words}; {seconds:.1f} s"


def _show_sample(report: Report, console: Console) -> None:
    for outcome in report.outcomes:
        for finding in outcome.findings:
            pieces = finding.measured.get("sample")
            if pieces:
                text = Text()
                for piece, learned in pieces:
                    text.append(piece, style="bold green" if learned else "dim")
                title = f"{finding.measured['origin']}: learned text is bold green"
                console.print(Panel(text, title=title, title_align="left"))
