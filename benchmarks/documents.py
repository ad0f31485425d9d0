"""What a report is made of, and the three forms it has: the console, Markdown, and a page that needs no other file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import table as rich_table
from rich.console import Console

from msformer import messages
from msformer.options import needed_packages
from msformer.output import complete_file
from msformer.text import markdown_text, visible

from .plots import Plot


@dataclass(frozen=True)
class Table:
    """A table with a heading, and what is to be said about it."""

    title: str
    columns: Sequence[str]
    """A line break is one on the console alone."""
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    """Those on the left that are no numbers."""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Document:
    """A report."""

    title: str
    facts: Sequence[str]
    """Where all this is from, a line each."""
    tables: Sequence[Table]
    warnings: Sequence[str] = ()
    legend: Sequence[tuple[str, str]] = ()
    """Terms and what they mean."""
    plots: Sequence[Plot] = field(default=())


def make_console() -> Console:
    """As wide as the terminal, and wide enough for the tables where there is none."""
    found = messages.console(highlight=False)
    return found if found.is_terminal else messages.console(highlight=False, width=180)


def print_lines(console: Console, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(visible(line), markup=False, soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    if table.rows:
        shown = rich_table.Table(title=visible(table.title), title_justify="left", title_style="bold")
        for number, name in enumerate(table.columns):
            shown.add_column(name, justify="left" if number < table.text_columns else "right")
        for row in table.rows:
            shown.add_row(*map(visible, row))
        console.print(shown, markup=False)
    print_lines(console, table.notes)


def print_legend(console: Console, legend: Sequence[tuple[str, str]]) -> None:
    """What the terms mean; once, after the tables."""
    console.print("how to read this", style="bold")
    for term, meaning in legend:
        console.print(f"  {term}: {meaning}", markup=False)


def markdown(document: Document) -> str:
    """The plots are in files beside it."""
    lines = [f"# {document.title}", ""]
    for warning in document.warnings:
        lines += [f"**{markdown_text(warning)}**", ""]
    lines += [f"- {markdown_text(fact)}" for fact in document.facts]
    for table in document.tables:
        lines += ["", f"## {markdown_text(table.title)}", ""]
        if table.rows:
            header = [name.replace("\n", " ") for name in table.columns]
            lines += [_line(map(markdown_text, header)), _line(["---"] * len(header))]
            lines += [_line(map(markdown_text, row)) for row in table.rows]
        if table.notes:
            lines += ["", *(f"- {markdown_text(note)}" for note in table.notes)]
    if document.plots:
        lines += ["", "## Plots", ""]
        lines += [f"![{markdown_text(plot.alt)}]({plot.name}.svg)" for plot in document.plots]
    if document.legend:
        lines += ["", "## How to read this", ""]
        lines += [f"- **{term}**: {markdown_text(meaning)}" for term, meaning in document.legend]
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    """Of a table in Markdown; nothing in the cells is markup."""
    return f"| {' | '.join(cells)} |"


def write_page(path: Path, document: Document) -> Path:
    """Writes the report as one HTML file, its plots within.

    Raises:
        OutputError: it cannot be written.
        ValueError: Jinja is missing.
    """
    with needed_packages("bench"):
        from msformer.page import rendered

    assert __package__
    parts = rendered(__package__, "page.html", document=document)
    with complete_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    return path


def write_document(folder: Path, name: str, document: Document) -> list[Path]:
    """Writes NAME.md, NAME.html and the plots; returns their paths.

    Raises:
        OutputError: one of them cannot be written.
        ValueError: Jinja is missing.
    """
    texts = {f"{name}.md": markdown(document)} | {f"{plot.name}.svg": str(plot.picture) for plot in document.plots}
    for file, text in texts.items():
        with complete_file(folder / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    page = write_page(folder / f"{name}.html", document)
    return [folder / f"{name}.md", page, *(folder / f"{plot.name}.svg" for plot in document.plots)]
