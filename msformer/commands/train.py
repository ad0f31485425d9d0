"""``msformer train``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from msformer.commands.base import INTERRUPTED, Command
from msformer.messages import complain, say, speaks
from msformer.options import (
    ALL_SLICES,
    SEED,
    backend_option,
    dry_run_option,
    modality_option,
    needed_packages,
    of_usage,
    slice_option,
    window_option,
)


class WeightsType(click.ParamType):
    """Weights of the terms of a loss, such as ``ce=1,dice=0.5``."""

    name = "weights"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "TERM=WEIGHT,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, dict):
            return value
        found = {}
        for part in value.split(","):
            name, sign, number = part.partition("=")
            try:
                if not sign or name.strip() in found:
                    raise ValueError
                found[name.strip()] = float(number)
            except ValueError:
                self.fail(f"expected terms, each once, with weights, such as ce=1,dice=0.5, got {value!r}", param, ctx)
        return found


@click.command(cls=Command)
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the model.")
@click.option(
    "--domain",
    type=click.Choice(["dermoscopy", "ct", "generic"]),
    help="Kind of the images: decides teachers and augmentation. [default: as most images look]",
)
@click.option(
    "--objective",
    type=click.Choice(["teacher", "consistency", "published"]),
    default="teacher",
    show_default=True,
    help="What the network is trained for.",
)
@click.option(
    "--weights",
    type=WeightsType(),
    help="Of the losses: ce, dice (teacher); mutual, inter (consistency); ce, inter, intra (published).",
)
@click.option("--steps", type=click.IntRange(1), default=1700, show_default=True, help="Of each round.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Crops a step, of all processes.")
@click.option(
    "--accumulate", type=click.IntRange(1), default=1, show_default=True, help="Parts of a batch, to save memory."
)
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="After the first, the network is taught by itself and its teachers.",
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="The highest. [default: 0.002]")
@click.option("--embed-dim", type=click.IntRange(1), default=32, show_default=True, help="Width of the network.")
@click.option("--depth", type=click.IntRange(1), default=1, show_default=True, help="Blocks a branch.")
@window_option
@slice_option
@modality_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@backend_option
@click.option("--workers", type=click.IntRange(1), help="Images that are read at the same time. [default: one a core]")
@click.option("--overwrite", is_flag=True, help="Train anew, whatever is there.")
@dry_run_option
def train(folders: tuple[Path, ...], slice: int | str | None, dry_run: bool, **options: Any) -> None:
    """Train one small network for all images in folders, without masks.

    PNG, JPEG, TIFF, BMP, GIF, WebP, AVIF, HEIC, JPEG 2000, PNM, DICOM and NIfTI are read.

    The network is taught by rules, where several of them agree on the object of an image. Then use it: `msformer
    segment FOLDER --model OUT`. OUT gets the model (model.safetensors, model.json, README.md), report.html, which shows
    how it goes while it goes, a checkpoint, and what the teachers said.
    Stopped with Ctrl-C or killed, the same command goes on where it was. `torchrun --nproc-per-node N -m msformer
    train ...` shares the work among N processes.
    """
    with needed_packages("train"):
        from torch import OutOfMemoryError

        from msformer.training.objectives import find_objective
        from msformer.training.preview import preview
        from msformer.training.run import train as run
        from msformer.training.settings import SettingsError

        with of_usage("--weights"):
            find_objective(options["objective"], options["weights"])
        options |= {"all_slices": slice == ALL_SLICES, "slice_index": None if slice == ALL_SLICES else slice}
        try:
            if dry_run:
                preview(folders, **options)
                return
            model = run(folders, **options)
        except KeyboardInterrupt:
            if speaks():
                complain("stopped; the same command goes on where it was")
            sys.exit(INTERRUPTED)
        except SettingsError as error:
            raise click.UsageError(str(error)) from error
        except FloatingPointError as error:
            raise ValueError(f"{error}: --learning-rate") from error
        except OutOfMemoryError as error:
            raise ValueError("the GPU has too little memory for a batch; split it: --accumulate 2") from error
    if speaks():
        folder = shlex.quote(str(model.folder))
        say(f"model in {folder}; use it: msformer segment FOLDER --model {folder} --mask --out RESULTS")
