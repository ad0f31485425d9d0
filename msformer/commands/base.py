"""What all commands share: how they tell things, how they end, and what their exit codes mean."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import click
from click.exceptions import Abort, Exit

from msformer.messages import complain, plain_warnings, tell, tell_the_end, telling

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
"""USAGE is click's, INTERRUPTED what a shell reports of a program that Ctrl-C ended."""
EXIT_CODES = {
    DONE: "all is done",
    FAILED: "some images failed, or the whole run, or the self-test of doctor",
    USAGE: "the command line is wrong; nothing was read or written",
    INTERRUPTED: "interrupted; what is finished is complete, the same command goes on where it stopped",
}
STATUS = {DONE: "done", FAILED: "failed", INTERRUPTED: "interrupted"}
"""Of the last event."""
_QUIET, _JSON = ("-q", "--quiet"), ("--json",)


class Command(click.Command):
    """A command with ``--quiet`` and ``--json``, whose errors are lines, and whose last event says how it ended.

    Args:
        goes_on: whether the same command goes on where it was interrupted.
    """

    def __init__(self, *arguments: Any, goes_on: bool = True, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.goes_on = goes_on
        self.params += [
            click.Option(_QUIET, is_flag=True, expose_value=False, help="Print errors only."),
            click.Option(_JSON, is_flag=True, expose_value=False, help="Print events, a line of JSON each."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = set(args[: args.index("--")] if "--" in args else args)
        ctx.with_resource(telling(quiet=not words.isdisjoint(_QUIET), json=not words.isdisjoint(_JSON)))
        try:
            return super().parse_args(ctx, args)
        except BaseException:
            ctx.close()  # click does it of contexts that came to be alone
            raise

    def invoke(self, ctx: click.Context) -> Any:
        code = FAILED
        try:
            with friendly_errors(self.goes_on):
                result = super().invoke(ctx)
                code = DONE
                return result
        except SystemExit as ended:
            code = int(ended.code or DONE)
            raise
        except Exit as ended:
            code = ended.exit_code
            raise
        except click.UsageError:
            code = USAGE
            raise
        finally:
            if code in STATUS:
                tell_the_end(self.name or "", code, STATUS[code])


@contextmanager
def friendly_errors(goes_on: bool = True) -> Iterator[None]:
    """Turns errors that a user can do something about into a line on stderr and exit code 1; Ctrl-C into 130."""
    with plain_warnings(), _noticed_interrupt() as interrupt:
        try:
            yield
        except KeyboardInterrupt:
            _end_interrupted(goes_on)
        except (Abort, Exit):
            raise
        except Exception as error:
            if interrupt.is_set():
                _end_interrupted(goes_on)
            if not _is_friendly(error):
                raise
            complain(f"error: {error}")
            tell("error", message=str(error))
            sys.exit(FAILED)


def _is_friendly(error: Exception) -> bool:
    """Whether the message alone says what is wrong."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE:  # whoever read the output has enough
        return False
    if isinstance(error, RuntimeError):
        from msformer_kernels import BackendError

        return isinstance(error, BackendError)
    return isinstance(error, ValueError | OSError)


def _end_interrupted(goes_on: bool) -> NoReturn:
    then = "; finished images are complete, the same command goes on where it stopped" if goes_on else ""
    complain(f"interrupted{then}")
    sys.exit(INTERRUPTED)


@contextmanager
def _noticed_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets: a library may turn a KeyboardInterrupt that meets it at a bad moment into an error of
    its own, as matplotlib does into "Invalid affine transformation matrix".
    """
    noticed = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield noticed
        return

    def notice(number: int, frame: FrameType | None) -> None:
        noticed.set()
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, notice)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGINT, before)
