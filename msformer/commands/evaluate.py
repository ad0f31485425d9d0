"""``msformer evaluate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from msformer.commands.base import DONE, FAILED, Command, friendly_errors
from msformer.messages import show
from msformer.options import (
    SEED,
    backend_option,
    cluster_options,
    dry_run_option,
    modality_option,
    needed_packages,
    window_option,
)

LAYOUTS = ("auto", "ph2", "lung", "isic", "pairs")
RULES = ("auto", "central", "dark", "lesion", "lung")


def list_methods(context: click.Context, option: click.Parameter, value: str) -> str:
    """Prints the methods instead of running the command, if that is asked for."""
    if value == "list":
        with friendly_errors(), needed_packages("evaluate"):
            from msformer.baselines import all_methods

            for method in all_methods():
                show(f"{method.name:<20} {method.title}", "method", name=method.name, title=method.title)
        context.exit()
    return value


@click.command(cls=Command)
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Folder of images and masks.")
@click.option("--masks", default=None, type=click.Path(path_type=Path), help="Folder of masks, if not below --data.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="auto", show_default=True, help="Of --data.")
@click.option(
    "--methods",
    default="all",
    show_default=True,
    is_eager=True,
    callback=list_methods,
    help="Names, joined by commas; 'list' prints them. The folder of a trained model, MODEL/, is one, too.",
)
@click.option("--ablation", is_flag=True, help="MS-Former with some of its losses (table 2) instead of all methods.")
@click.option("--select", type=click.Choice(RULES), default="auto", show_default=True, help="Rule of the blind score.")
@click.option("--limit", type=click.IntRange(1), default=None, help="Images at most.")
@click.option(
    "--label", multiple=True, help="Number or #rrggbb of the object in masks of several labels; repeat it, or 'all'."
)
@window_option
@modality_option
@click.option(
    "--size", type=click.IntRange(33), default=257, show_default=True, help="Side of the fitted image, pixels."
)
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@backend_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the report.")
@dry_run_option
@cluster_options
def evaluate(**options: Any) -> None:
    """Score MS-Former and the methods it is compared with on images with true masks.

    A trained model is scored by the masks of `msformer segment --model MODEL/ --mask`; MODEL/:net is its network alone.

    Writes report.html and report.md, summary.csv, scores.csv (a line an image, method and protocol) and the label maps.
    What is done is not done again, so an interrupted run goes on where it stopped.
    """
    with needed_packages("evaluate"):
        from msformer.evaluation.command import run

        failures = run(**options)
    sys.exit(FAILED if failures else DONE)
