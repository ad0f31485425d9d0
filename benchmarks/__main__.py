"""The command `python -m benchmarks`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from msformer.commands.base import INTERRUPTED, Command
from msformer.messages import complain, say, tell, tell_at_end, tell_progress, warn
from msformer.options import dry_run_option, needed_packages
from msformer.output import prepare_folder

from . import rivals as rival_names
from .cases import (
    MSFORMER,
    OPERATIONS,
    PASSES,
    QUICK_CASES,
    Case,
    Shape,
    full_cases,
    full_shapes,
    in_precisions,
    make_cases,
    order_rivals,
    parse_shape,
    quick_rivals,
    why_not,
)
from .compare import Comparison, compare
from .compare import document as comparison_document
from .documents import make_console, print_legend, print_lines, print_table, write_document
from .left_out import known_variants, left_out, missing_variants
from .machine import cache_flusher, describe, measure_ceilings
from .measure import Settings, measure_case, set_share
from .records import Results, read_results, write_json_file
from .records import save_to as save_results
from .report import LEGEND, case_table, head_lines, summary, write_results
from .rows import MEASURED
from .variants import in_variants, make_anywhere

QUICK_ROUNDS, FULL_ROUNDS = 5, 9
Plan = list[tuple[Case, tuple[str, ...]]]


class ShapeType(click.ParamType):
    """A shape in its text form."""

    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shape:
        if isinstance(value, Shape):
            return value
        try:
            return parse_shape(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command(
    "bench",
    cls=Command,
    goes_on=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--full", is_flag=True, help="The whole grid instead of the quick selection; takes hours.")
@click.option("--op", "operations", multiple=True, type=click.Choice(OPERATIONS), help="Operation; may be repeated.")
@click.option("--shape", "shapes", multiple=True, type=ShapeType(), help="Such as 1x257x257x100h1; may be repeated.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(tuple(rival_names.DTYPES)), help="May be repeated.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("highest",),
    type=click.Choice(rival_names.PRECISIONS),
    help="Of float32 products, for every rival; may be repeated.  [default: highest]",
)
@click.option(
    "--isa",
    "variants",
    multiple=True,
    type=click.Choice(("all", *known_variants())),
    help="Variant of the CPU kernels, side by side in place of native; may be repeated. Those that this machine does "
    "not have are left out, and the report says why.  [default: the best]",
)
@click.option(
    "--rival",
    "rivals",
    multiple=True,
    type=click.Choice(rival_names.all_rivals()),
    help="published, eager, compile, or a backend; may be repeated.  [default: all]",
)
@click.option("--passes", multiple=True, type=click.Choice(PASSES), help="May be repeated.  [default: training]")
@click.option(
    "--rounds", type=click.IntRange(1), help=f"At most.  [default: {QUICK_ROUNDS}, {FULL_ROUNDS} with --full]"
)
@click.option("--threads", type=click.IntRange(1), help="[default: as PyTorch chooses]")
@click.option(
    "--default-allocator",
    is_flag=True,
    help="In fitting steps, every rival returns freed memory to the system as the C library has it by default. "
    "Otherwise it stays with the process, as msformer.segment arranges it, for every rival.",
)
@click.option(
    "--out",
    default="benchmark-results",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for results.json, report.html, report.md and the plots; or those of a comparison.",
)
@click.option(
    "--save-to",
    type=click.Path(path_type=Path),
    help="Folder of results by machine, such as benchmarks/results: writes those of this one there, too.",
)
@click.option(
    "--compare",
    "compared",
    nargs=2,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Two results.json: shows what changed, and measures nothing.",
)
@dry_run_option
def main(
    full: bool,
    operations: tuple[str, ...],
    shapes: tuple[Shape, ...],
    dtypes: tuple[str, ...],
    precisions: tuple[str, ...],
    variants: tuple[str, ...],
    rivals: tuple[str, ...],
    passes: tuple[str, ...],
    rounds: int | None,
    threads: int | None,
    default_allocator: bool,
    out: Path,
    save_to: Path | None,
    compared: tuple[Path, Path] | None,
    dry_run: bool,
) -> None:
    """Times the operators, the block, a fitting step and a whole image, beside their rivals.

    Without options: a quick look at each, in less than three minutes on two cores. With --op, --shape, --dtype or
    --passes: the combinations of what was chosen.
    """
    with needed_packages("bench"):
        if compared:
            refuse_beside_comparison()
            show_comparison(compared, out)
            return
        if threads:
            torch.set_num_threads(threads)
        chosen = choose_rivals(rivals, variants)
        plan = [
            (case, rivals)
            for planned, rivals in make_plan(full, operations, shapes, dtypes, chosen, passes)
            for case in in_precisions(planned, dict.fromkeys(precisions))
        ]
        missing = left_out() + quick_left_out(plan, chosen)
        settings = Settings(rounds or (FULL_ROUNDS if full else QUICK_ROUNDS), keep_memory=not default_allocator)
        if not dry_run:
            prepare_folder(out)
        tell_start(plan, settings, out, missing, dry_run)
        if dry_run:
            preview(plan, settings, out, missing)
        elif not run(plan, settings, out, missing, save_to):
            sys.exit(INTERRUPTED)


def refuse_beside_comparison() -> None:
    """Raises click.UsageError for options that say what to measure, and how."""
    context = click.get_current_context()
    names = {name: option for option in context.command.params if (name := option.name) in context.params}
    given = [name for name in names if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    options = [names[name].opts[0] for name in given if name not in ("compared", "out")]
    if options:
        raise click.UsageError(f"{', '.join(options)}: of a measurement, which --compare does not make")


def show_comparison(files: tuple[Path, Path], out: Path) -> None:
    """Prints and writes what changed from the first file to the second."""
    old, new = map(read_results, files)
    prepare_folder(out)
    comparison = compare(old, new)
    found = comparison_document(comparison)
    for warning in found.warnings:
        warn(warning)
    tell_changes(comparison)
    console = make_console()
    for table in found.tables:
        print_table(console, table)
    print_legend(console, found.legend)
    _finish(write_document(out, "comparison", found), out)


def tell_changes(comparison: Comparison) -> None:
    for change in comparison.changes:
        *case, rival = change.old.key
        old, new, verdict = change.old.seconds, change.new.seconds, change.verdict.lower() or "same"
        tell("change", name=" ".join(case), rival=rival, old=old, new=new, verdict=verdict)
    only = {"only_old": len(comparison.only_old), "only_new": len(comparison.only_new)}
    tell_at_end(counts={"rows": len(comparison.changes)} | only)


def choose_rivals(names: Sequence[str], variants: Sequence[str]) -> tuple[str, ...]:
    """The rivals by these names, all if none is given, with `native` in the variants that this machine has.

    Raises:
        click.UsageError: variants without `native`, or only such as this machine does not have.
    """
    chosen = order_rivals(names or rival_names.all_rivals())
    if not variants:
        return chosen
    if "native" not in chosen:
        raise click.UsageError("--isa needs the native kernels among the rivals")
    missing = missing_variants()
    usable = [name for name in variants if name not in missing]
    if not usable:
        reasons = "; ".join(f"{name}: {missing[name]}" for name in dict.fromkeys(variants))
        raise click.UsageError(f"--isa: not on this machine: {reasons}")
    return in_variants(chosen, usable)


def make_plan(
    full: bool,
    operations: Sequence[str],
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    rivals: tuple[str, ...],
    passes: Sequence[str],
) -> Plan:
    """What to measure.

    Raises:
        click.UsageError: nothing is left of it.
    """
    if not (operations or shapes or dtypes or passes):
        if full:
            return [(case, rivals) for case in full_cases()]
        return [(case, chosen) for case in QUICK_CASES if (chosen := quick_rivals(case, rivals))]
    for operation in operations:
        for shape in shapes:
            if reason := why_not(operation, shape):
                raise click.UsageError(f"--shape {shape} with --op {operation}: {reason}")
    default_dtypes, default_passes = (tuple(rival_names.DTYPES), PASSES) if full else (("float32",), ("training",))
    plan: Plan = []
    for operation in operations or OPERATIONS:
        sizes = tuple(shapes) or (full_shapes(operation) if full else (MSFORMER[1],))
        cases = make_cases([operation], sizes, dtypes or default_dtypes, passes or default_passes)
        plan += [(case, rivals) for case in cases]
    if not plan:
        raise click.UsageError("nothing to measure: step and image have --passes training only, image --dtype float32")
    return plan


def quick_left_out(plan: Plan, chosen: Sequence[str]) -> list[str]:
    """What the quick selection does without, though it was chosen."""
    found = []
    for name in chosen:
        cases = dict.fromkeys(case.operation for case, rivals in plan if name not in rivals)
        if cases:
            some = next(iter(cases))
            found.append(f"{name} of {' and '.join(cases)}: it takes longer than all else; it is run by --op {some}")
    return found


def tell_start(plan: Plan, settings: Settings, out: Path, missing: list[str], dry_run: bool) -> None:
    facts = asdict(settings) | {"threads": torch.get_num_threads()}
    tell("start", cases=len(plan), rows=_count(plan), out=out, settings=facts, left_out=missing, dry_run=dry_run)


def preview(plan: Plan, settings: Settings, out: Path, missing: list[str]) -> None:
    """Says what `run` would measure, and writes nothing."""
    for case, rivals in plan:
        say(f"{case}: {', '.join(rivals)}")
        for rival in rivals:
            tell("row", name=str(case), rival=rival, status="would run")
    for line in missing:
        say(f"not run: {line}")
    rows, rounds = _count(plan), settings.rounds
    say(f"would time {rows} rows of {len(plan)} cases in at most {rounds} rounds into {out}; nothing was written")
    tell_at_end(dry_run=True, counts={"rows": rows, "done": rows, "failed": 0}, out=out)


def _count(plan: Plan) -> int:
    """Rows of the results."""
    return sum(len(rivals) for _, rivals in plan)


def run(plan: Plan, settings: Settings, out: Path, missing: list[str], save: Path | None = None) -> bool:
    """Measures, prints and writes; whether it came to the end. After each case the JSON file is whole."""
    console = make_console()
    with console.status("measuring what this machine can do"):
        ceilings = measure_ceilings()
    results = Results(describe(), ceilings, settings.rounds, [], keep_memory=settings.keep_memory, left_out=missing)
    tell("facts", machine=asdict(results.machine), ceilings=asdict(ceilings))
    print_lines(console, head_lines(results))
    try:
        _measure_all(console, plan, settings, out, results)
        results.ceilings = ceilings.or_better(measure_ceilings())
        for row in results.rows:
            set_share(row, results.ceilings)
        results.complete = True
    except KeyboardInterrupt:
        complain("interrupted; writing what was measured")
    print_legend(console, LEGEND)
    print_table(console, summary(results.rows))
    paths = write_results(out, results)
    if save is not None:
        if results.complete:
            paths.append(save_results(save, results))
        else:
            warn(f"not written to {save}: the run is not complete")
    done = sum(row.status == MEASURED for row in results.rows)
    tell_at_end(counts={"rows": _count(plan), "done": done, "failed": len(results.rows) - done})
    _finish(paths, out)
    return results.complete


def _finish(paths: Sequence[Path], out: Path) -> None:
    """Says what was written, last."""
    for path in paths:
        say(f"wrote {path}")
    tell_at_end(out=out, files=[path.name if path.parent == out else path for path in paths])


def _measure_all(console: Console, plan: Plan, settings: Settings, out: Path, results: Results) -> None:
    flush = cache_flusher()
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f} of {task.total:.0f} parts"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=600,
    )
    with bars:
        task = bars.add_task("", total=sum(_parts(rivals, settings.rounds) for _, rivals in plan))
        done = 0
        for number, (case, rivals) in enumerate(plan, start=1):
            if not console.is_terminal:
                console.print(f"[{number} of {len(plan)}] {case}: {', '.join(rivals)}", markup=False, soft_wrap=True)
            report = _reporter(bars, task, str(case), _parts(rivals, settings.rounds))
            make = partial(make_anywhere, keep_memory=settings.keep_memory)
            rows = measure_case(case, rivals, settings, results.ceilings, flush, report, make)
            done += _parts(rivals, settings.rounds)
            bars.update(task, completed=done)
            results.rows += rows
            for row in rows:
                tell("row", name=str(case), rival=row.rival, status=row.status, record=row.to_json())
            print_table(console, case_table(rows))
            write_json_file(out, results)


def _parts(rivals: Sequence[str], rounds: int) -> int:
    """How often `measure_case` reports: the exact result, a check and the memory of each rival, warm-up, rounds."""
    return 2 + 2 * len(rivals) + rounds


def _reporter(bars: Progress, task: TaskID, case: str, parts: int) -> Callable[[str], None]:
    done = count()

    def report(what: str) -> None:
        bars.update(task, advance=1, description=f"{case}: {what}")
        tell_progress(case, next(done), parts, what)

    return report


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
