"""``msformer completion``."""

from __future__ import annotations

import sys

import click
from click.shell_completion import get_completion_class

from msformer.commands.base import Command
from msformer.messages import note, show

SET_UP = {
    "bash": 'add to ~/.bashrc: eval "$(msformer completion bash)"',
    "zsh": 'add to ~/.zshrc: eval "$(msformer completion zsh)"',
    "fish": "run: msformer completion fish > ~/.config/fish/completions/msformer.fish",
}


@click.command(cls=Command, goes_on=False)
@click.argument("shell", type=click.Choice(list(SET_UP)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and their values in a shell.

    \b
    bash    eval "$(msformer completion bash)"    in ~/.bashrc
    zsh     eval "$(msformer completion zsh)"     in ~/.zshrc
    fish    msformer completion fish > ~/.config/fish/completions/msformer.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"this version of click has no completion for {shell}")
    script = kind(context.find_root().command, {}, "msformer", "_MSFORMER_COMPLETE").source()
    show(script, "completion", shell=shell, script=script)
    if sys.stdout.isatty():
        note(f"to have it in every shell, {SET_UP[shell]}")
