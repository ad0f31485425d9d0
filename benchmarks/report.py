"""The report: results as text, as plots, and as files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, StrMethodFormatter
from rich.console import Console
from rich.table import Table

from msformer.output import complete_file, write_json

from .cases import LAYERS, MODELS
from .machine import Ceilings, Machine
from .rivals import PLAIN, variant_of
from .rows import MEASURED, Row, gain, groups
from .tables import duration, markdown_row


def size(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**20:.1f} MiB"


def title(row: Row) -> str:
    passes = "" if row.operation in MODELS else ", forward" if row.passes == "forward" else ", forward + backward"
    return f"{row.operation} {row.shape}, {row.type}{passes}"


def columns(rivals: Sequence[str]) -> list[str]:
    gains = [f"over {rival}" for rival in rivals]
    tail = ["of ceiling", "GF/s", "peak memory", "error", "over eager's"]
    return ["rival", "computes in", "time", "spread", *gains, *tail]


def cells(row: Row, group: Sequence[Row], rivals: Sequence[str]) -> list[str]:
    """One row, in the columns of `columns`; empty where there is nothing to say."""
    seconds, spread = row.seconds, row.spread
    if row.status != MEASURED or seconds is None:
        return [row.rival, row.mode, row.status, *[""] * (6 + len(rivals))]
    by_name = {other.rival: other for other in group}
    gains = [gain(row, by_name[rival]) if rival in by_name and rival != row.rival else None for rival in rivals]
    return [
        row.rival,
        row.mode,
        duration(seconds),
        "" if spread is None else f"{spread / seconds:.0%}",
        *("" if factor is None else f"{factor:.2f} x" for factor in gains),
        "" if row.share_of_ceiling is None else f"{row.share_of_ceiling:.0%}",
        f"{row.flop / seconds / 1e9:.0f}",
        "" if row.peak_memory is None else size(row.peak_memory),
        "" if row.error is None else f"{row.error:.1e}",
        _share_of_error(row, by_name.get("eager")),
    ]


def _share_of_error(row: Row, eager: Row | None) -> str:
    """How the error compares with that of eager PyTorch."""
    if row.error is None or eager is None or not eager.error or row is eager:
        return ""
    return f"{row.error / eager.error:.2f} x"


BUSY = 0.1
"""Cores taken by other programs, from which on times are called into question."""


def problems(group: Sequence[Row]) -> list[str]:
    """What was not timed, and why; and whether the machine was busy with other things."""
    found = [f"{row.rival} is not timed: {row.reason}" for row in group if row.status != MEASURED]
    busy = group[0].other_programs
    if busy is not None and busy >= BUSY:
        found.append(f"other programs kept {busy:.1f} cores busy meanwhile: do not rely on these times")
    return found


def columns_of(rows: Sequence[Row]) -> list[str]:
    """What others are compared with: the plain forms first; of several variants of the kernels, the first."""
    names = list(dict.fromkeys(row.rival for row in rows))
    others = [name for name in names if variant_of(name)][1:]
    names = [name for name in names if name not in others]
    return [name for name in PLAIN if name in names] + [name for name in names if name not in PLAIN]


def where_lines(machine: Machine) -> list[str]:
    """The machine, and the versions of what ran on it."""
    return [
        f"{machine.processor}, {machine.cores} logical cores, {machine.memory / 2**30:.0f} GiB; {machine.system}",
        f"Python {machine.python}, torch {machine.torch}, msformer {machine.msformer}; backends "
        f"{', '.join(machine.backends)}; instruction set {machine.instruction_set}",
    ]


def machine_lines(machine: Machine, ceilings: Ceilings, rounds: int, keep_memory: bool) -> list[str]:
    """Where this was measured, and what that machine can do."""
    rates = [(ceilings.flop_per_second, ceilings.flop_source)]
    rates += [(rate, source) for rate, source in ceilings.bfloat16_rates() if rate]
    return [
        *where_lines(machine),
        f"{machine.threads} threads, at most {rounds} rounds; {machine.date}; between fitting steps freed memory "
        f"{'stays with the process, for every rival' if keep_memory else 'goes back to the system, for every rival'}",
        f"ceilings: {', '.join(f'{rate / 1e9:.0f} GF/s ({source})' for rate, source in rates)}, "
        f"{ceilings.bytes_per_second / 1e9:.1f} GB/s ({ceilings.bytes_source})",
    ]


LEGEND = (
    "Times are medians of interleaved rounds, with the caches flushed before each sample; the spread is the distance "
    "between the quartiles. 'over X' is the time of X divided by that of the row: above 1, the row is faster; of "
    "several variants of the kernels, X is the first. GF/s count the products of the folded form, whatever a rival "
    "does. 'of ceiling' is the least time that flop and bytes allow on this machine, by the ceilings measured in the "
    "same run, divided by the time. That of float32 'highest' is multiply-adds; our kernels can exceed it with AMX, so "
    "above 100 % is possible. That of bfloat16 and 'medium' is the best of AMX tiles, AVX-512 BF16 and multiply-adds "
    "that the variant of the kernels has, for other rivals that the machine has. That of 'high' is a third of the "
    "tiles for our kernels with AMX, else multiply-adds. Precisions are those of torch.set_float32_matmul_precision, "
    "and every rival of a case has the same. Peak memory is what a call adds. The error is the worst of all results "
    "and gradients, against float64, and after it, the same divided by that of eager PyTorch. Nothing is timed whose "
    "error is above what benchmarks/measure.py allows."
)


_COLOURS = {"published": "#888888", "eager": "#1f77b4", "compile": "#ff7f0e", "native": "#2ca02c"}
_MORE_COLOURS = ("#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_MARKERS = {"attention": "o", "mix_ffn": "s", "mix_ffn_skip": "D", "block": "^"}


def colour(rival: str, rivals: Sequence[str]) -> str:
    """The same for a rival in all plots of a run."""
    others = [name for name in rivals if name not in _COLOURS]
    return _COLOURS.get(rival) or _MORE_COLOURS[others.index(rival) % len(_MORE_COLOURS)]


def draw_plots(folder: Path, rows: Sequence[Row], ceilings: Ceilings) -> list[Path]:
    """Writes them as PNG; returns their paths."""
    timed = [row for row in rows if row.seconds is not None]
    rivals = list(dict.fromkeys(row.rival for row in timed))
    paths = []
    for kind in dict.fromkeys((row.operation, row.type, row.passes) for row in timed):
        chosen = [row for row in timed if (row.operation, row.type, row.passes) == kind]
        paths.append(_save(folder / f"{_file_name(*kind)}.png", against_tokens(chosen, rivals, " ".join(kind))))
    layers = [row for row in timed if row.operation in LAYERS]
    for name in dict.fromkeys(row.type for row in layers):
        chosen = [row for row in layers if row.type == name]
        paths.append(_save(folder / f"{_file_name('roofline', name)}.png", roofline(chosen, rivals, ceilings, name)))
    return paths


def _file_name(*words: str) -> str:
    return "-".join(words).replace(" ", "-")


def _save(path: Path, figure: Figure) -> Path:
    with complete_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def against_tokens(rows: Sequence[Row], rivals: Sequence[str], name: str) -> Figure:
    """Time and memory of one operation; a line of the figure for each family of shapes."""
    families = list(dict.fromkeys(row.family for row in rows))
    figure = _figure(11, 3.6 * len(families) + 0.6)
    figure.suptitle(name)
    axes = figure.subplots(len(families), 2, squeeze=False)
    for family, (time_axes, memory_axes) in zip(families, axes, strict=True):
        members = [row for row in rows if row.family == family]
        for rival in rivals:
            line = sorted((row for row in members if row.rival == rival), key=lambda row: (row.tokens, row.flop))
            _line(time_axes, [(row.tokens, 1e3 * (row.seconds or 0)) for row in line], rival, rivals)
            known = [(row.tokens, row.peak_memory / 2**20) for row in line if row.peak_memory]
            _line(memory_axes, known, rival, rivals)
        for panel, label in ((time_axes, "time, ms"), (memory_axes, "peak memory of a call, MiB")):
            _token_axis(panel, members)
            panel.set(ylabel=label, title=family)
        time_axes.legend()
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, float]], rival: str, rivals: Sequence[str]) -> None:
    """Points, joined unless some shapes have the same number of tokens."""
    if points:
        tokens, values = zip(*points, strict=True)
        style = "-" if len(set(tokens)) == len(tokens) else ""
        axes.plot(tokens, values, linestyle=style, marker="o", color=colour(rival, rivals), label=rival)


def _token_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """Both axes logarithmic, the tokens marked where there are points, with the shapes that have so many."""
    axes.set(xscale="log", yscale="log", xlabel="N, tokens of the batch; below it the shapes")
    names: dict[int, list[str]] = {}
    for row in rows:
        shapes = names.setdefault(row.tokens, [f"{row.tokens}"])
        if row.shape not in shapes:
            shapes.append(row.shape)
    axes.set_xticks(list(names), ["\n".join(shapes) for shapes in names.values()], fontsize=7)
    axes.minorticks_off()
    axes.set_xlim(min(names) / 1.5, max(names) * 1.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.4, high * 1.4)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.3)


def roofline(rows: Sequence[Row], rivals: Sequence[str], ceilings: Ceilings, kind: str) -> Figure:
    """Rate against flop a byte, both of the folded form, under the ceilings of memory and of products of this type."""
    figure = _figure(8, 5.5)
    axes = figure.subplots()
    bandwidth = ceilings.bytes_per_second / 1e9
    peaks = sorted({ceilings.flop_rate(kind, row.rival) / 1e9 for row in rows})
    peak = peaks[-1]
    intensities = [row.flop / row.bytes for row in rows]
    left, right = min(*intensities, peaks[0] / bandwidth) / 2, max(*intensities, peak / bandwidth) * 2
    labels = [(f"{bandwidth:.0f} GB/s", (left, left * bandwidth), (10, -4))]
    for rate in peaks:
        axes.plot([left, rate / bandwidth, right], [left * bandwidth, rate, rate], color="black")
        labels.append((f"{rate:.0f} GF/s", (right, rate), (-60, 4)))
    for label, point, offset in labels:
        axes.annotate(label, point, xytext=offset, textcoords="offset points")
    for row, intensity in zip(rows, intensities, strict=True):
        filled = colour(row.rival, rivals) if row.passes == "training" else "none"
        axes.plot(
            intensity,
            row.flop / (row.seconds or 1) / 1e9,
            marker=_MARKERS[row.operation],
            color=colour(row.rival, rivals),
            markerfacecolor=filled,
        )
    lowest = min(row.flop / (row.seconds or 1) / 1e9 for row in rows)
    highest = max(row.flop / (row.seconds or 1) / 1e9 for row in rows)
    axes.set_ylim(min(lowest, left * bandwidth) / 1.5, 2 * max(highest, peak))
    axes.set(xscale="log", yscale="log", xlabel="flop a byte that must move", ylabel="GF/s", title=f"roofline, {kind}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(handles=_keys(rows, rivals), fontsize=8, loc="lower left")
    return figure


def _keys(rows: Sequence[Row], rivals: Sequence[str]) -> list[Line2D]:
    """The legend of the roofline: colours are rivals, markers operations, hollow is forward alone."""
    present = [rival for rival in rivals if any(row.rival == rival for row in rows)]
    keys = [Line2D([], [], color=colour(rival, rivals), linewidth=4, label=rival) for rival in present]
    for operation in dict.fromkeys(row.operation for row in rows):
        keys.append(Line2D([], [], color="black", marker=_MARKERS[operation], linestyle="", label=operation))
    if {row.passes for row in rows} == {"forward", "training"}:
        hollow = Line2D([], [], color="black", marker="o", markerfacecolor="none", linestyle="", label="forward alone")
        keys.append(hollow)
    return keys


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
        f"- {line}" for line in machine_lines(results.machine, results.ceilings, results.rounds, results.keep_memory)
    ]
    lines += ["", LEGEND, ""]
    rivals = columns_of(results.rows)
    for group in groups(results.rows):
        header = columns(rivals)
        lines += [f"## {title(group[0])}", "", markdown_row(header), markdown_row(["---"] * len(header))]
        lines += [markdown_row(cells(row, group, rivals)) for row in group]
        found = problems(group)
        lines += ["", *(f"- {problem}" for problem in found), *([""] if found else [])]
    lines += [f"![{Path(name).stem}]({name})" for name in plots]
    return "\n".join(lines).rstrip() + "\n"


def make_console() -> Console:
    """As wide as the terminal, and wide enough for the tables where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=180)


def print_head(console: Console, results: Results) -> None:
    for line in machine_lines(results.machine, results.ceilings, results.rounds, results.keep_memory):
        console.print(line, markup=False, soft_wrap=True)


def print_group(console: Console, group: Sequence[Row]) -> None:
    """The rivals of one case."""
    rivals = columns_of(group)
    table = Table(title=title(group[0]), title_justify="left", title_style="bold")
    for number, name in enumerate(columns(rivals)):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in group:
        table.add_row(*cells(row, group, rivals))
    console.print(table)
    for problem in problems(group):
        console.print(problem, markup=False, soft_wrap=True)
