"""The plots of the report: each a figure and what it shows, for those who do not see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from msformer.drawing import svg
from msformer.text import visible

from .cases import LAYERS
from .machine import Ceilings
from .rows import Row
from .tables import duration


@dataclass(frozen=True)
class Plot:
    """A figure of a report."""

    name: str
    """Of its file, without a suffix."""
    alt: str
    picture: Markup
    """SVG."""


def plot(name: str, alt: str, figure: Figure) -> Plot:
    return Plot(name, alt, svg(figure, alt))


_COLOURS = {"published": "#888888", "eager": "#1f77b4", "compile": "#ff7f0e", "native": "#2ca02c"}
_MORE_COLOURS = ("#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf")
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of Okabe and Ito, which people who see few colours can tell apart."""
_MARKERS = {"attention": "o", "mix_ffn": "s", "mix_ffn_skip": "D", "block": "^"}


def colour(rival: str, rivals: Sequence[str]) -> str:
    """The same for a rival in all plots of a run."""
    others = [name for name in rivals if name not in _COLOURS]
    return _COLOURS.get(rival) or _MORE_COLOURS[others.index(rival) % len(_MORE_COLOURS)]


def draw_plots(rows: Sequence[Row], ceilings: Ceilings) -> list[Plot]:
    """Time and memory of each operation over the number of tokens, and a roofline of each type; nothing untimed."""
    timed = [row for row in rows if row.seconds is not None]
    rivals = list(dict.fromkeys(row.rival for row in timed))
    plots = []
    for kind in dict.fromkeys((row.operation, row.type, row.passes) for row in timed):
        chosen = [row for row in timed if (row.operation, row.type, row.passes) == kind]
        alt = f"{', '.join(kind)}: time and memory of a call against the number of tokens. {_found(chosen)}"
        plots.append(plot(_file_name(*kind), alt, against_tokens(chosen, rivals, " ".join(kind))))
    layers = [row for row in timed if row.operation in LAYERS]
    for name in dict.fromkeys(row.type for row in layers):
        chosen = [row for row in layers if row.type == name]
        alt = f"Roofline, {name}: GF/s of each layer and rival against flop a byte. {_found(chosen, _share)}"
        plots.append(plot(_file_name("roofline", name), alt, roofline(chosen, rivals, ceilings, name)))
    return plots


def _found(rows: Sequence[Row], said: Callable[[Row], str] = lambda row: duration(row.seconds or 0)) -> str:
    """What a plot shows, in words: the row with the most tokens of each rival."""
    largest = {row.rival: row for row in sorted(rows, key=lambda row: row.tokens)}
    found = (f"{visible(name)} {said(row)} ({row.operation} {row.shape})" for name, row in largest.items())
    return f"At the most tokens: {'; '.join(found)}."


def _share(row: Row) -> str:
    return f"{row.share_of_ceiling or 0:.0%} of what the machine can do"


def shown(name: str) -> str:
    """Text of a file, as matplotlib writes it: no formula, nothing unseen."""
    return visible(name).replace("$", r"\$")


def _file_name(*words: str) -> str:
    return "-".join(words).replace(" ", "-")


def make_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def against_tokens(rows: Sequence[Row], rivals: Sequence[str], name: str) -> Figure:
    """Time and memory of one operation; a line of the figure for each family of shapes."""
    families = list(dict.fromkeys(row.family for row in rows))
    figure = make_figure(11, 3.6 * len(families) + 0.6)
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
            panel.set(ylabel=label, title=shown(family))
    keys = {line.get_label(): line for time_axes in axes[:, 0] for line in time_axes.lines}
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, float]], rival: str, rivals: Sequence[str]) -> None:
    """Points, joined unless some shapes have the same number of tokens."""
    if points:
        tokens, values = zip(*points, strict=True)
        style = "-" if len(set(tokens)) == len(tokens) else ""
        axes.plot(tokens, values, linestyle=style, marker="o", color=colour(rival, rivals), label=shown(rival))


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
    figure = make_figure(8, 5.5)
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
    keys = [Line2D([], [], color=colour(rival, rivals), linewidth=4, label=shown(rival)) for rival in present]
    for operation in dict.fromkeys(row.operation for row in rows):
        keys.append(Line2D([], [], color="black", marker=_MARKERS[operation], linestyle="", label=operation))
    if {row.passes for row in rows} == {"forward", "training"}:
        hollow = Line2D([], [], color="black", marker="o", markerfacecolor="none", linestyle="", label="forward alone")
        keys.append(hollow)
    return keys


def change_plot(ratios: Mapping[str, float]) -> Figure:
    """New time over old time, a line for each row."""
    return dots("new time / old time; left of 1 the new run is faster", {"": ratios})


def dots(label: str, series: Mapping[str, Mapping[str, float | None]]) -> Figure:
    """Ratios on a logarithmic axis with a line at 1, a row of the plot for each name, a colour for each series."""
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    figure = make_figure(9, 0.9 + 0.26 * len(names) + 0.2 * len(series))
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=1)
    for number, (of, values) in enumerate(series.items()):
        known = [(value, names.index(name)) for name, value in values.items() if value is not None]
        if known:
            points, places = zip(*known, strict=True)
            shade = _SERIES[number % len(_SERIES)]
            marker = "osD^v"[number // len(_SERIES) % 5]
            axes.plot(points, places, linestyle="", marker=marker, color=shade, label=shown(of) if of else None)
    axes.set_yticks(range(len(names)), [shown(name) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set(xscale="log", xlabel=label)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.8), max(high, 1.25))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    if any(series):
        figure.legend(loc="outside lower left", fontsize=8, frameon=False)
    return figure
