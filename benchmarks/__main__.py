"""The command `python -m benchmarks`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from msformer.output import OutputError, prepare_folder

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
from .compare import compare
from .compare import document as comparison_document
from .documents import make_console, print_legend, print_lines, print_table, write_document
from .left_out import known_variants, left_out, missing_variants
from .machine import cache_flusher, describe, measure_ceilings
from .measure import Settings, measure_case, set_share
from .records import Results, read_results, write_json_file
from .records import save_to as save_results
from .report import LEGEND, case_table, head_lines, summary, write_results
from .variants import in_variants, make_anywhere

QUICK_ROUNDS, FULL_ROUNDS = 5, 9
INTERRUPTED = 130
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


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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
) -> None:
    """Times the operators, the block, a fitting step and a whole image, beside their rivals.

    Without options: a quick look at each, in less than three minutes on two cores. With --op, --shape, --dtype or
    --passes: the combinations of what was chosen.
    """
    console = make_console()
    if compared:
        try:
            show_comparison(console, compared, out)
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
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
    try:
        prepare_folder(out)
        settings = Settings(rounds or (FULL_ROUNDS if full else QUICK_ROUNDS), keep_memory=not default_allocator)
        complete = run(console, plan, settings, out, missing, save_to)
    except OutputError as error:
        raise click.ClickException(str(error)) from error
    if not complete:
        sys.exit(INTERRUPTED)


def show_comparison(console: Console, files: tuple[Path, Path], out: Path) -> None:
    """Prints and writes what changed from the first file to the second."""
    old, new = map(read_results, files)
    prepare_folder(out)
    found = comparison_document(compare(old, new))
    print_lines(console, found.warnings)
    for table in found.tables:
        print_table(console, table)
    print_legend(console, found.legend)
    _print_paths(console, write_document(out, "comparison", found))


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


def run(
    console: Console, plan: Plan, settings: Settings, out: Path, missing: list[str], save: Path | None = None
) -> bool:
    """Measures, prints and writes; whether it came to the end. After each case the JSON file is whole."""
    with console.status("measuring what this machine can do"):
        ceilings = measure_ceilings()
    results = Results(describe(), ceilings, settings.rounds, [], keep_memory=settings.keep_memory, left_out=missing)
    print_lines(console, head_lines(results))
    try:
        _measure_all(console, plan, settings, out, results)
        results.ceilings = ceilings.or_better(measure_ceilings())
        for row in results.rows:
            set_share(row, results.ceilings)
        results.complete = True
    except KeyboardInterrupt:
        console.print("interrupted; writing what was measured")
    print_legend(console, LEGEND)
    print_table(console, summary(results.rows))
    paths = write_results(out, results)
    if save is not None:
        if results.complete:
            paths.append(save_results(save, results))
        else:
            console.print(f"not written to {save}: the run is not complete", markup=False)
    _print_paths(console, paths)
    return results.complete


def _print_paths(console: Console, paths: Sequence[Path]) -> None:
    print_lines(console, [f"wrote {path}" for path in paths])


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
            report = _reporter(bars, task, str(case))
            make = partial(make_anywhere, keep_memory=settings.keep_memory)
            rows = measure_case(case, rivals, settings, results.ceilings, flush, report, make)
            done += _parts(rivals, settings.rounds)
            bars.update(task, completed=done)
            results.rows += rows
            print_table(console, case_table(rows))
            write_json_file(out, results)


def _parts(rivals: Sequence[str], rounds: int) -> int:
    """How often `measure_case` reports: the exact result, a check and the memory of each rival, warm-up, rounds."""
    return 2 + 2 * len(rivals) + rounds


def _reporter(bars: Progress, task: Any, case: str) -> Callable[[str], None]:
    def report(what: str) -> None:
        bars.update(task, advance=1, description=f"{case}: {what}")

    return report


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
