"""The command line: ``msformer segment``, ``train``, ``evaluate``, ``demo``, ``bench``, ``doctor``,
``completion``.

A command is a file of `msformer.commands`.
"""

from __future__ import annotations

import io
import sys

import click

import msformer
from msformer.commands.base import EXIT_CODES
from msformer.commands.bench import bench
from msformer.commands.completion import completion
from msformer.commands.demo import demo
from msformer.commands.doctor import doctor, info
from msformer.commands.evaluate import evaluate
from msformer.commands.segment import segment
from msformer.commands.train import train

_EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code:<4} {meaning}" for code, meaning in EXIT_CODES.items())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=_EPILOG)
@click.version_option(msformer.__version__, prog_name="msformer")
def main() -> None:
    """MS-Former segments medical images without labels, by fitting a small transformer to each image."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may hold what a terminal cannot show


for command in (segment, train, evaluate, demo, bench, doctor, info, completion):
    main.add_command(command)
