"""Results as files: results.json, report.md and plots in a folder; and as tables on the console."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import text
from benchmarks.machine import Ceilings, Machine
from benchmarks.plots import draw_plots
from benchmarks.rows import Row, groups
from msformer.output import complete_file, write_json

VERSION = 1
JSON_NAME, MARKDOWN_NAME = "results.json", "report.md"


@dataclass
class Results:
    """All of a run."""

    machine: Machine
    ceilings: Ceilings
    rounds: int
    rows: list[Row]
    complete: bool = False
    """False if the run was interrupted."""
    keep_memory: bool = True
    """As `Settings.keep_memory`."""

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "complete": self.complete,
            "machine": asdict(self.machine),
            "ceilings": asdict(self.ceilings),
            "rounds": self.rounds,
            "keep_memory": self.keep_memory,
            "rows": [row.to_json() for row in self.rows],
        }


def read_results(path: Path) -> Results:
    """The results in a file that `write_results` wrote.

    Raises:
        ValueError: not such a file.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"{path}: has version {content['version']}, expected {VERSION}")
        machine = Machine(**content["machine"] | {"backends": tuple(content["machine"]["backends"])})
        rows = [Row.from_json(row) for row in content["rows"]]
        return Results(
            machine,
            Ceilings(**content["ceilings"]),
            content["rounds"],
            rows,
            content["complete"],
            content["keep_memory"],
        )
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not a {JSON_NAME} of this program") from error


def write_json_file(folder: Path, results: Results) -> Path:
    path = folder / JSON_NAME
    write_json(path, results.to_json())
    return path


def write_results(folder: Path, results: Results) -> list[Path]:
    """Writes all files; returns their paths, the JSON first."""
    written = [write_json_file(folder, results)]
    plots = draw_plots(folder, results.rows, results.ceilings) if any(row.samples for row in results.rows) else []
    with complete_file(folder / MARKDOWN_NAME) as temporary:
        temporary.write_text(markdown(results, [path.name for path in plots]), encoding="utf-8")
    return [*written, folder / MARKDOWN_NAME, *plots]


def markdown(results: Results, plots: Sequence[str] = ()) -> str:
    lines = ["# Benchmarks", ""]
    if not results.complete:
        lines += ["**Interrupted: some cases are missing.**", ""]
    lines += [
        f"- {line}"
        for line in text.machine_lines(results.machine, results.ceilings, results.rounds, results.keep_memory)
    ]
    lines += ["", text.LEGEND, ""]
    rivals = text.columns_of(results.rows)
    for group in groups(results.rows):
        header = text.columns(rivals)
        lines += [f"## {text.title(group[0])}", "", _markdown_row(header), _markdown_row(["---"] * len(header))]
        lines += [_markdown_row(text.cells(row, group, rivals)) for row in group]
        found = text.problems(group)
        lines += ["", *(f"- {problem}" for problem in found), *([""] if found else [])]
    lines += [f"![{Path(name).stem}]({name})" for name in plots]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def make_console() -> Console:
    """As wide as the terminal, and wide enough for the tables where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=180)


def print_head(console: Console, results: Results) -> None:
    for line in text.machine_lines(results.machine, results.ceilings, results.rounds, results.keep_memory):
        console.print(line, markup=False, soft_wrap=True)


def print_group(console: Console, group: Sequence[Row]) -> None:
    """The rivals of one case."""
    rivals = text.columns_of(group)
    table = Table(title=text.title(group[0]), title_justify="left", title_style="bold")
    for number, name in enumerate(text.columns(rivals)):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in group:
        table.add_row(*text.cells(row, group, rivals))
    console.print(table)
    for problem in text.problems(group):
        console.print(problem, markup=False, soft_wrap=True)
