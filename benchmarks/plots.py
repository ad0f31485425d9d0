"""Pictures of the results: time and memory against the number of tokens, and a roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, StrMethodFormatter

from benchmarks.cases import LAYERS
from benchmarks.machine import Ceilings
from benchmarks.rows import Row
from msformer.output import complete_file

_COLOURS = {"published": "#888888", "eager": "#1f77b4", "compile": "#ff7f0e", "native": "#2ca02c"}
_MORE_COLOURS = ("#d62728", "#9467bd", "#8c564b")
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
    for kind in dict.fromkeys((row.operation, row.dtype, row.passes) for row in timed):
        chosen = [row for row in timed if (row.operation, row.dtype, row.passes) == kind]
        paths.append(_save(folder / f"{'-'.join(kind)}.png", against_tokens(chosen, rivals, " ".join(kind))))
    layers = [row for row in timed if row.operation in LAYERS]
    for dtype in dict.fromkeys(row.dtype for row in layers):
        chosen = [row for row in layers if row.dtype == dtype]
        paths.append(_save(folder / f"roofline-{dtype}.png", roofline(chosen, rivals, ceilings, dtype)))
    return paths


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


def roofline(rows: Sequence[Row], rivals: Sequence[str], ceilings: Ceilings, dtype: str) -> Figure:
    """Rate against flop a byte, both of the folded form, under the two ceilings."""
    figure = _figure(8, 5.5)
    axes = figure.subplots()
    peak, bandwidth = ceilings.flop_per_second / 1e9, ceilings.bytes_per_second / 1e9
    intensities = [row.flop / row.bytes for row in rows]
    left, right = min(*intensities, peak / bandwidth) / 2, max(*intensities, peak / bandwidth) * 2
    axes.plot([left, peak / bandwidth, right], [left * bandwidth, peak, peak], color="black")
    for label, point, offset in (
        (f"{peak:.0f} GF/s", (right, peak), (-60, 4)),
        (f"{bandwidth:.0f} GB/s", (left, left * bandwidth), (10, -4)),
    ):
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
    axes.set_ylim(min(lowest, left * bandwidth) / 1.5, 2 * peak)
    axes.set(xscale="log", yscale="log", xlabel="flop a byte that must move", ylabel="GF/s", title=f"roofline, {dtype}")
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
