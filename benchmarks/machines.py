"""Results of several machines on one page, a column for each:

    python -m benchmarks.machines benchmarks/results/*.json [--out machines.html]

`msformer bench --save-to benchmarks/results` writes the file of a machine. For each rival that was measured there are a
table and a plot: how many times as fast the kernels of msformer are, with the time that they take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from msformer.output import OutputError

from .documents import Document, Table, write_page
from .plots import Plot, dots, plot
from .records import Results, read_results
from .report import BUSY, columns_of, title
from .rivals import PLAIN, is_ours
from .rows import Row, gain, groups, is_within_spread
from .tables import duration

Machines = Mapping[str, Results]
"""By what they are called in the page."""
LEGEND = (
    (
        "cell",
        "the time of the rival divided by that of the kernels, on the same machine in the same run: above 1, the "
        "kernels are faster. In brackets the time a call of the kernels, and half the distance between the quartiles "
        "of its samples. Of several variants of the kernels, the first is taken",
    ),
    ("~", "the two times differ by less than their spreads together, which may be chance"),
    (
        "!",
        f"other programs kept at least {BUSY} cores busy: do not rely on this number",
    ),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--out", default="machines.html", show_default=True, type=click.Path(path_type=Path), help="The page; one file."
)
def main(files: tuple[Path, ...], out: Path) -> None:
    """Draws the results of several machines side by side, from files of `msformer bench --save-to`."""
    try:
        click.echo(f"wrote {write_page(out, document(_named(files)))}")
    except (ValueError, OutputError, OSError) as error:
        raise click.ClickException(str(error)) from error


def _named(files: Sequence[Path]) -> dict[str, Results]:
    """The results by the name of their file; its folder, too, where a name comes twice."""
    paths = list(dict.fromkeys(file.resolve() for file in files))
    names = [path.stem for path in paths]
    return {
        (path.stem if names.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}"): read_results(path)
        for path in paths
    }


def document(machines: Machines) -> Document:
    rivals = [name for name in PLAIN if any(row.rival == name for found in machines.values() for row in found.rows)]
    return Document(
        title="Machines side by side",
        facts=["Each machine ran msformer bench, all rivals of a case in turn; what is compared is on one machine."],
        warnings=[
            f"{name} was interrupted: some cases are missing." for name, each in machines.items() if not each.complete
        ],
        tables=[_about(machines), *(_table(rival, machines) for rival in rivals)],
        legend=LEGEND,
        plots=[_plot(rival, machines) for rival in rivals],
    )


def _about(machines: Machines) -> Table:
    header = ["machine", "processor", "cores", "threads", "torch", "kernels", "date", "busy with other programs"]
    rows = []
    for name, results in machines.items():
        at = results.machine
        busy = max((row.other_programs or 0 for row in results.rows), default=0)
        kernels = f"msformer {at.msformer}, {at.instruction_set}"
        facts = [at.processor, str(at.cores), str(at.threads), at.torch, kernels, at.date[:10]]
        rows.append([name, *facts, f"at most {busy:.1f} cores"])
    left_out = [f"{name} did not run {line}" for name, results in machines.items() for line in results.left_out]
    return Table("Machines", header, rows, len(header), left_out)


def _table(rival: str, machines: Machines) -> Table:
    found = {name: _gains(rival, results) for name, results in machines.items()}
    cases = dict.fromkeys(case for gains in found.values() for case in gains)
    rows = [[case, *(_cell(gains.get(case)) for gains in found.values())] for case in cases]
    notes = [] if rows else ["nothing to compare"]
    return Table(f"How many times as fast as {rival}", ["case", *machines], rows, 1, notes)


def _gains(rival: str, results: Results) -> dict[str, tuple[Row, Row, float]]:
    """By case: the row of our kernels, that of the rival, and how many times as fast the first is."""
    found = {}
    for group in groups(results.rows):
        by_name = {row.rival: row for row in group}
        ours = next((by_name[name] for name in columns_of(group) if is_ours(name)), None)
        other = by_name.get(rival)
        factor = gain(ours, other) if ours and other else None
        if ours and other and factor:
            found[title(ours)] = ours, other, factor
    return found


def _cell(found: tuple[Row, Row, float] | None) -> str:
    if found is None:
        return ""
    row, other, factor = found
    chance = "~" if is_within_spread(row, other) else ""
    spread = "" if row.spread is None or row.seconds is None else f" ± {row.spread / row.seconds / 2:.0%}"
    busy = "!" if (row.other_programs or 0) >= BUSY else ""
    return f"{chance}{factor:.2f} x{busy} ({duration(row.seconds or 0)}{spread})"


def _plot(rival: str, machines: Machines) -> Plot:
    series = {
        name: {case: factor for case, (_, _, factor) in _gains(rival, results).items()}
        for name, results in machines.items()
    }
    ranges = {name: (min(values.values()), max(values.values())) for name, values in series.items() if values}
    said = "; ".join(f"{name}: {low:.2f} to {high:.2f} times" for name, (low, high) in ranges.items())
    alt = f"How many times as fast as {rival} the kernels are, by case and machine. {said}"
    return plot(f"against-{rival}", alt, dots(f"times as fast as {rival}; right of 1 the kernels are faster", series))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.machines")
