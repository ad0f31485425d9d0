"""Options of the command line that several commands share, and what they mean for a run.

Heavy imports happen inside the functions, so that help and errors of usage come at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from msformer.extras import missing_package
from msformer.presets import DEFAULT, PRESETS, find_preset

if TYPE_CHECKING:
    from msformer.runs.executors import Executor
    from msformer.runs.ways import Fit, Way

Command = TypeVar("Command", bound=Callable[..., Any])

ALL_SLICES = "all"


class SliceType(click.ParamType):
    """The index of a slice, or all of them."""

    name = "index"

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[INDEX|{ALL_SLICES}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == ALL_SLICES else click.IntRange(0).convert(value, param, ctx)


MODALITIES = ("CR", "CT", "DX", "MG", "MR", "NM", "OT", "PT", "RF", "SC", "US", "XA", "XC")


def modality_option(command: Command) -> Command:
    """What the images are of, for files that do not say it or say it wrongly."""
    text = "Of the images, as DICOM abbreviates it: CT, MR, ... [default: as each file says; never guessed by values]"
    kind = click.Choice(MODALITIES, case_sensitive=False)
    return click.option("--modality", type=kind, default=None, metavar="CT|MR|...", help=text)(command)


class WindowType(click.Tuple):
    """Two values, the lower first."""

    def __init__(self) -> None:
        super().__init__([float, float])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        low, high = super().convert(value, param, ctx)
        if not -math.inf < low < high < math.inf:
            self.fail(f"expected two numbers, the lower first, got {low:g} and {high:g}", param, ctx)
        return low, high


def window_option(command: Command) -> Command:
    """The window of grey values."""
    text = "Values that become black and white. [default: auto]"
    return click.option("--window", type=WindowType(), default=None, help=text)(command)


def slice_option(command: Command) -> Command:
    """Which picture of files that hold several."""
    text = f"Of NIfTI volumes and DICOM frames; '{ALL_SLICES}': each. [default: middle]"
    return click.option("--slice", type=SliceType(), default=None, help=text)(command)


SEED = click.IntRange(0, 2**32 - 1)
"""What every generator of random numbers takes."""

BACKENDS = ("reference", "native", "cuda", "triton")
"""Those of `msformer_kernels`, whose import takes a second."""


def backend_option(command: Command) -> Command:
    """The backend of the kernels."""
    text = "Of the kernels. [default: the fastest]"
    return click.option("--backend", type=click.Choice(BACKENDS), default=None, help=text)(command)


def dry_run_option(command: Command) -> Command:
    """Looking before the leap."""
    text = "Say what would be read, made and skipped, and write nothing."
    return click.option("--dry-run", is_flag=True, help=text)(command)


def run_options(command: Command) -> Command:
    """The options of a run over many images."""
    at_once = "Images that are fitted at the same time. [default: 1 on the CPU, 4 on a GPU]"
    command = click.option("--at-once", type=click.IntRange(1), default=None, help=at_once)(command)
    return click.option("--overwrite", is_flag=True, help="Segment again what is already done.")(command)


def cluster_options(command: Command) -> Command:
    """Where a run takes place."""
    threads = "With --cluster: threads of each task. [default: 1]"
    command = click.option("--threads", type=click.IntRange(1), default=None, help=threads)(command)
    cluster = "Run as tasks on Ray: auto (this machine, or what RAY_ADDRESS names), or HOST:PORT of a cluster."
    return click.option("--cluster", metavar="auto|ADDRESS", default=None, help=cluster)(command)


def make_executor(cluster: str | None, threads: int | None, device: str, at_once: int | None, here: int) -> Executor:
    """Options of the command line -> where a run takes place.

    Args:
        device: of the work, as it turned out.
        at_once: items at a time, if that was given.
        here: items at a time in this process otherwise.

    Raises:
        click.UsageError: threads of tasks where there are none, an address or device that no cluster has.
        ValueError: Ray is not installed.
    """
    from msformer.runs.executors import Local

    if cluster is None:
        if threads is not None:
            raise click.UsageError("--threads is for --cluster, which is not given")
        return Local(at_once or here)
    with needed_packages("cluster"):
        from msformer.runs.cluster import Cluster
    with of_usage():
        return Cluster(cluster, threads or 1, at_once, device)


@contextmanager
def needed_packages(extra: str) -> Iterator[None]:
    """Says which extra to install where one of its packages is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        sentence = missing_package(error, extra)
        if sentence is None:
            raise
        raise ValueError(sentence) from error


@contextmanager
def of_usage(option: str | None = None) -> Iterator[None]:
    """A ValueError is one of the command line, as of the value of an option."""
    try:
        yield
    except ValueError as error:
        if option is None:
            raise click.UsageError(str(error)) from error
        raise click.BadParameter(str(error), param_hint=option) from error


def fit_options(size: int | None, max_steps: int | None = None) -> Callable[[Command], Command]:
    """The options of the fit, shared by the commands that segment; those not given are as the preset says.

    Args:
        size, max_steps: defaults of ``--size`` and ``--max-steps``; None leaves them to the preset.
    """

    options = [
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            default=DEFAULT,
            show_default=True,
            help="Settings for all that is not given below.",
        ),
        click.option(
            "--size",
            type=click.IntRange(33),
            default=size,
            show_default=size is not None,
            help="Side of the fitted image, pixels.",
        ),
        click.option(
            "--max-steps",
            type=click.IntRange(1),
            default=max_steps,
            show_default=max_steps is not None,
            help="Steps at most.",
        ),
        click.option("--min-labels", type=click.IntRange(1), help="Stop at this many labels."),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Of the initial weights."),
        click.option("--ce", type=click.FloatRange(0), help="Weight of the cross-entropy."),
        click.option("--inter", type=click.FloatRange(0), help="Weight of the inter-scale loss."),
        click.option("--intra", type=click.FloatRange(0), help="Weight of the intra-scale loss."),
        click.option("--embed-dim", type=click.IntRange(1), help="Width of the model."),
        click.option("--depth", type=click.IntRange(1), help="Blocks a branch."),
        click.option("--learning-rate", type=click.FloatRange(0, min_open=True)),
        click.option("--margin", type=click.IntRange(0), help="Mirrored around the image, pixels."),
        click.option("--icnr/--no-icnr", default=None, help="Upsampling that starts even, against checkerboards."),
        click.option("--standardise/--no-standardise", default=None, help="Channels with mean 0 and variance 1."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."),
        backend_option,
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def make_fit(values: dict[str, Any]) -> Fit:
    """Options of the command line -> the fit of each image, device and backend as they turn out.

    A backend that is not available is thereby an error of its own, not one of every image, and a finished image counts
    as done only for the backend and device that it was made with.
    """
    from torch import float32

    from msformer.runs.ways import Fit
    from msformer.segmentation import find_device
    from msformer_kernels.core.backends import resolve

    run = {name: values.pop(name) for name in ("preset", "seed")}
    device = find_device(values.pop("device"))
    backend = resolve(values.pop("backend"), device.type, float32)
    given = {name: values.pop(name) for name in ("ce", "inter", "intra")}
    with of_usage():
        preset = find_preset(run["preset"], **values)
        if isinstance(preset.size, int) and preset.margin >= preset.size:
            raise ValueError(f"margin: expected less than the size, {preset.size} pixels, got {preset.margin}")
        weights = replace(preset.weights, **{name: value for name, value in given.items() if value is not None})
    return Fit(run | vars(preset) | {"weights": weights, "device": str(device), "backend": backend})


def make_way(values: dict[str, Any], model: Path | None, refine: bool) -> Way:
    """Options of the command line -> how images are segmented: by a fit, or by a trained model, or by both.

    Raises:
        click.UsageError: options of a fit where there is none.
    """
    if model is None:
        if refine:
            raise click.UsageError("--refine is for --model, which is not given")
        return make_fit(values)
    context = click.get_current_context()
    given = [name for name in values if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    options = [f"--{name.replace('_', '-')}" for name in given if name not in ("device", "backend")]
    if options and not refine:
        raise click.UsageError(f"{', '.join(options)}: of a fit, which --model does not make without --refine")
    from msformer.runs.ways import Model
    from msformer.training.saved import load

    fit = make_fit(dict(values))
    return Model(load(model, device=fit.device), fit.options["backend"], fit if refine else None)
