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
from .compare import compare, print_comparison
from .machine import cache_flusher, describe, measure_ceilings, usable_variants
from .measure import Settings, measure_case
from .report import (
    Results,
    make_console,
    print_group,
    print_head,
    read_results,
    write_json_file,
    write_results,
)
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
    type=click.Choice(("all", *usable_variants())),
    help="Variant of the CPU kernels, side by side in place of native; may be repeated.  [default: the best]",
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
    help="Folder for results.json, report.md and the plots.",
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
    compared: tuple[Path, Path] | None,
) -> None:
    """Times the operators, the block, a fitting step and a whole image, beside their rivals.

    Without options: a quick look at each, in less than three minutes on two cores. With --op, --shape, --dtype or
    --passes: the combinations of what was chosen.
    """
    console = make_console()
    if compared:
        try:
            print_comparison(console, compare(*(read_results(path) for path in compared)))
        except (ValueError, OSError) as error:
            raise click.ClickException(str(error)) from error
        return
    if threads:
        torch.set_num_threads(threads)
    chosen = order_rivals(rivals or rival_names.all_rivals())
    if variants:
        if "native" not in chosen:
            raise click.UsageError("--isa needs the native kernels among the rivals")
        chosen = in_variants(chosen, variants)
    plan = [
        (case, rivals)
        for planned, rivals in make_plan(full, operations, shapes, dtypes, chosen, passes)
        for case in in_precisions(planned, dict.fromkeys(precisions))
    ]
    try:
        prepare_folder(out)
        settings = Settings(rounds or (FULL_ROUNDS if full else QUICK_ROUNDS), keep_memory=not default_allocator)
        complete = run(console, plan, settings, out)
    except OutputError as error:
        raise click.ClickException(str(error)) from error
    if not complete:
        sys.exit(INTERRUPTED)


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


def run(console: Console, plan: Plan, settings: Settings, out: Path) -> bool:
    """Measures, prints and writes; whether it came to the end. After each case the JSON file is whole."""
    with console.status("measuring what this machine can do"):
        results = Results(describe(), measure_ceilings(), settings.rounds, [], keep_memory=settings.keep_memory)
    print_head(console, results)
    try:
        _measure_all(console, plan, settings, out, results)
        results.complete = True
    except KeyboardInterrupt:
        console.print("interrupted; writing what was measured")
    for path in write_results(out, results):
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return results.complete


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
            print_group(console, rows)
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
