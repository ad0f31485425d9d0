"""``msformer bench``: hands everything to the command of the benchmarks, which is imported when it runs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import click

from msformer.options import needed_packages


# the options, --help among them, are those of the command that it hands them to
@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Time the kernels beside plain PyTorch and torch.compile, and write a report.

    `msformer bench --help` lists the options.
    """
    try:
        with needed_packages("bench"):
            command = import_module(f"{_package()}.__main__").main
            command.main(arguments, prog_name="msformer bench", standalone_mode=False)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _package() -> str:
    """The benchmarks as they are installed; those of a checkout that is not installed are a package of their own."""
    return "msformer.benchmarks" if find_spec("msformer.benchmarks") else "benchmarks"
