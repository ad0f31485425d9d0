"""``msformer bench``: the command of the benchmarks, which is imported when it is needed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from msformer.commands.base import Command
from msformer.options import needed_packages


class _Bench(Command):
    """Makes way for the command of the benchmarks; without them, runs to say which extra brings them."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            command = _command()
        except ValueError:
            return super().make_context(info_name, args, parent, **extra)
        return command.make_context(info_name, args, parent, **extra)


# the options, --help among them, are those of the command that it makes way for
@click.command(cls=_Bench, goes_on=False, add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> None:
    """Time the kernels beside plain PyTorch and torch.compile, and write a report.

    `msformer bench --help` lists the options.
    """
    _command()


def _command() -> click.Command:
    """The benchmarks as they are installed; those of a checkout that is not installed are a package of their own.

    Raises:
        ValueError: a package that they need is not installed.
    """
    package = "msformer.benchmarks" if find_spec("msformer.benchmarks") else "benchmarks"
    with needed_packages("bench"):
        command: click.Command = import_module(f"{package}.__main__").main
    return command
