"""``msformer demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from msformer.commands.base import DONE, FAILED, Command
from msformer.options import fit_options, make_fit, run_options


@click.command(cls=Command)
@click.option(
    "--out", default="demo", show_default=True, type=click.Path(path_type=Path), help="Folder for the results."
)
@click.option("--count", type=click.IntRange(1), default=4, show_default=True, help="Images.")
@run_options
@fit_options(size=129, max_steps=30)
def demo(out: Path, count: int, overwrite: bool, at_once: int | None, **options: Any) -> None:
    """Segment images that the package makes itself, with known masks, and print scores: first those of the masks that
    a user gets, then those of the label that fits the true mask best.

    The images look like dermoscopy from afar; they and their masks are kept in OUT/images and OUT/masks. The fitted
    size is smaller than that of `segment`, and the steps are fewer, to be quick.
    """
    from msformer.claim import claimed
    from msformer.commands.running import finish, images_at_once, run_all
    from msformer.demo import make_images, print_scores, score_all
    from msformer.io.read import Reading
    from msformer.messages import tell_at_end
    from msformer.runs.executors import Local
    from msformer.runs.plan import Plan, plan_jobs
    from msformer.runs.write import read_mask
    from msformer.selection import AUTO

    seed = options["seed"]
    plan = Plan(make_fit(options), Reading(), AUTO)
    executor = Local(at_once or images_at_once(plan.way.device))
    with claimed(out):
        sources, masks = make_images(out, count, seed)
        jobs = plan_jobs(sources, [out / "images"], out)
        run = run_all(jobs, out, plan, overwrite, executor)
        scores = score_all(run.finished, masks, out)
        found = {name: value._asdict() for name, value in scores.items()}
        finish(
            jobs,
            run,
            out,
            plan,
            caption=lambda job, record: f"{plan.way.caption(record)}, DSC {100 * scores[job.name].blind:.0f}",
            mask=lambda job: masks[job.name],
            found_mask=lambda job: read_mask(job, out),
            scores=found,
        )
        tell_at_end(scores=found)
    print_scores(scores)
    sys.exit(FAILED if run.failures else DONE)
