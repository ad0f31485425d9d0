"""Runs that are killed or cannot write, again and again: afterwards every file is whole, and the resumed run equals the
uninterrupted one, byte by byte.

    python -m studies.kills                          # 200 kills of each command: docs/reliability.md
    python -m studies.kills --kills 20 evaluate      # 20 of one

The real commands run in forks of this process, which has imported what takes seconds, with the clock of durations
stopped, since these are the only numbers that differ. A kill is one of:

- SIGKILL at a random moment, or at a random one of the run's operations on files, just before it opens, renames or
  removes one;
- SIGINT, as of Ctrl-C, at a random moment;
- a disk that is full from a random operation on, or a limit on the size of files, past which the system writes a part.

After each kill every file under its own name must be that of the uninterrupted run; where the run ended by itself, what
it writes of all images together must be whole. After one to four kills the command is given once more: then all files
must be those, and nothing else be there.
"""

from __future__ import annotations

import argparse
import errno
import gzip
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image as PILImage

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.utime", "os.truncate")
"""Audit events of Python before operations on files."""
MOMENT, OPERATION, INTERRUPT = "at a moment", "at a file operation", "by Ctrl-C"
FULL, LIMIT = "by a full disk", "by a limit of size"
WEIGHTS = {MOMENT: 4, OPERATION: 4, INTERRUPT: 2, FULL: 2, LIMIT: 1}
OF_ALL = re.compile(r"summary\.json|contact-sheet.*|run\.json|report\..*|.*\.csv|.*\.nii\.gz")
"""Files of all images together, or all slices of a volume: of those that could be written, where some could not."""
MOST_IN_A_ROW = 4
INTERRUPTED = 130
HIDDEN = ".msformer-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", help=f"of {', '.join(COMMANDS)}; default: all")
    parser.add_argument("--kills", type=int, default=200, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = set(options.commands) - COMMANDS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected {', '.join(COMMANDS)}")
    if os.environ.get("OMP_NUM_THREADS") != "1":  # a process with threads cannot be forked
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        os.execve(sys.executable, [sys.executable, "-m", "studies.kills", *sys.argv[1:]], {**os.environ, **one})
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        for name in options.commands or COMMANDS:
            counts = killed(Path(folder) / name, COMMANDS[name], options.kills, random.Random(options.seed))
            kinds = ", ".join(f"{counts[kind]} {kind}" for kind in WEIGHTS)
            print(
                f"{name}: {options.kills} kills ({kinds}), {counts['resumed']} runs completed after kills: "
                f"all {counts['files']} files equal to those of the uninterrupted run",
                flush=True,
            )


def killed(folder: Path, make: Callable[[Path], Sequence[str]], kills: int, chance: random.Random) -> Mapping[str, int]:
    """How often a command was killed in which way. Ends the process with what differs, if anything does."""
    folder.mkdir()
    out = folder / "out"
    arguments = [*make(folder), "--out", str(out)]
    _forked(arguments, folder).wait()  # the first fills caches
    shutil.rmtree(out)
    counting = _forked(arguments, folder, count=True)
    _check(counting.wait() == 0, folder, "the uninterrupted run failed")
    seconds = counting.seconds
    operations = int((folder / "operations").read_text())
    expected = contents(out)
    counts = Counter(files=len(expected))
    done = 0
    while done < kills:
        shutil.rmtree(out)
        loose = None
        for _ in range(min(chance.randint(1, MOST_IN_A_ROW), kills - done)):
            how = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            while not _kill(arguments, folder, how, seconds, operations, chance):
                pass  # it was over before
            done += 1
            counts[how] += 1
            found = {name: content for name, content in contents(out).items() if HIDDEN not in name}
            loose = OF_ALL if how in (FULL, LIMIT) else loose  # a kill leaves what the run before it wrote of all
            wrong = sorted(name for name, content in found.items() if not _is_right(name, content, expected, loose))
            _check(not wrong, folder, f"after kill {done}, {how}: not as in the uninterrupted run: {wrong}")
        _check(_forked(arguments, folder).wait() == 0, folder, f"the run after kill {done} failed")
        found = contents(out)
        wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        _check(not wrong, folder, f"resumed after kill {done}: not as in the uninterrupted run: {wrong}")
        counts["resumed"] += 1
    return counts


def _kill(
    arguments: Sequence[str], folder: Path, how: str, seconds: float, operations: int, chance: random.Random
) -> bool:
    """Starts a run and kills it; False if it was over before."""
    log = folder / "log"
    if how == OPERATION:
        return _forked(arguments, folder, die_at=chance.randrange(operations)).wait() == -signal.SIGKILL
    if how in (FULL, LIMIT):
        full_at = chance.randrange(operations) if how == FULL else None
        limit = chance.randrange(1, 6000) if how == LIMIT else None
        status = _forked(arguments, folder, full_at=full_at, limit=limit).wait()
        said = log.read_text(errors="replace")
        reason = os.strerror(errno.ENOSPC if how == FULL else errno.EFBIG)
        _check(status == 0 or (status == 1 and reason in said), folder, f"killed {how}: exit status {status}")
    else:
        number = signal.SIGINT if how == INTERRUPT else signal.SIGKILL
        status = _forked(arguments, folder).end(number, chance.uniform(0, seconds))
        _check(status in (0, INTERRUPTED, -signal.SIGKILL), folder, f"killed {how}: exit status {status}")
    _check("Traceback" not in log.read_text(errors="replace"), folder, f"killed {how}: a traceback")
    return status != 0


def _is_right(name: str, content: bytes, expected: Mapping[str, bytes], loose: re.Pattern[str] | None) -> bool:
    """Whether a file is that of the uninterrupted run, or one of those that may differ, and whole."""
    if expected.get(name) == content:
        return True
    if loose is None or not loose.fullmatch(Path(name).name):
        return False
    ends = {".png": b"IEND\xaeB`\x82", ".html": b"</html>", ".csv": b"\n", ".md": b"\n"}
    suffix = Path(name).suffix
    if suffix == ".json":
        return isinstance(json.loads(content), dict)
    return (suffix == ".gz" and bool(gzip.decompress(content))) or content.endswith(ends.get(suffix, b"?"))


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files below a folder, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _check(right: bool, folder: Path, message: str) -> None:
    if not right:
        kept = Path(tempfile.mkdtemp(prefix="kills-failed-"))
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        sys.exit(f"{message}; kept in {kept}, what the last run printed in {kept / 'log'}")


class _Run:
    """A fork."""

    def __init__(self, process: int, printed: int, log: Path) -> None:
        self._process, self._printed, self._log = process, printed, log
        self.seconds = 0.0
        """That it calculated."""

    def wait(self) -> int:
        """Its exit status, or minus a signal."""
        _, status, used = os.wait4(self._process, 0)
        with open(self._printed, "rb") as printed:
            self._log.write_bytes(printed.read())
        self.seconds = used.ru_utime + used.ru_stime
        return os.waitstatus_to_exitcode(status)

    def end(self, number: int, seconds: float) -> int:
        """Sends a signal once it has calculated for that long, and waits. (Time on the wall is that of others, too.)"""
        process = psutil.Process(self._process)
        while process.status() != psutil.STATUS_ZOMBIE and sum(process.cpu_times()[:2]) < seconds:
            time.sleep(0.003)
        os.kill(self._process, number)
        return self.wait()


def _forked(
    arguments: Sequence[str],
    folder: Path,
    *,
    die_at: int | None = None,
    full_at: int | None = None,
    limit: int | None = None,
    count: bool = False,
) -> _Run:
    """The command in a fork of this process.

    Args:
        die_at: the operation on files before which it dies.
        full_at: from that operation on, whatever needs room on the disk fails.
        limit: bytes of a file that it may write.
        count: writes the number of operations to ``folder/operations``.
    """
    import msformer.cli
    import msformer.commands.running
    import msformer.evaluation.command

    printed, prints = os.pipe()  # a limit of size holds for files; what a run prints has room in a pipe
    process = os.fork()
    if process:
        os.close(prints)
        return _Run(process, printed, folder / "log")
    status = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(prints, 1)
        os.dup2(prints, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        time.perf_counter = lambda: 0.0
        sys.argv = ["msformer", *arguments]
        seen = 0

        def audit(event: str, details: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in OPERATIONS and str(details[0]).startswith(str(folder / "out")):
                if seen == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if full_at is not None and seen >= full_at and _needs_room(event, details):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                seen += 1

        sys.addaudithook(audit)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            msformer.cli.main(list(arguments))
        except SystemExit as ended:
            status = int(ended.code or 0)
        if count:
            (folder / "operations").write_text(str(seen))
    except KeyboardInterrupt:  # before the command began, or after it ended
        status = INTERRUPTED
    finally:
        os._exit(status)


def _needs_room(event: str, details: tuple[Any, ...]) -> bool:
    """Whether an operation fails on a full disk."""
    return event == "os.mkdir" or (event == "open" and bool(details[2] & (os.O_WRONLY | os.O_RDWR)))


def _images(folder: Path, count: int, masks: bool = False) -> None:
    noise = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :50]
    disc = (rows - 20) ** 2 + (columns - 25) ** 2 < 120
    for number in range(count):
        pixels = (noise.integers(120, 250, (40, 50, 3)) - 100 * disc[..., None]).astype(np.uint8)
        for name, picture in (("images", pixels), ("masks", disc))[: 1 + masks]:
            (folder / name).mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(picture).save(folder / name / f"{number}.png")


def _segment(folder: Path) -> list[str]:
    """Four images and a volume of three slices, which has a file of all of them."""
    import nibabel

    _images(folder, 4)
    volume = np.random.default_rng(0).integers(-900, 900, (40, 36, 3)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "images" / "volume.nii.gz")
    small = "--size 33 --max-steps 2 --embed-dim 4 --depth 1 --margin 0"
    return ["segment", str(folder / "images"), "--mask", "--slice", "all", *small.split()]


def _evaluate(folder: Path) -> list[str]:
    """Three images with masks, and four methods."""
    _images(folder, 3, masks=True)
    return ["evaluate", "--data", str(folder), "--methods", "otsu,kmeans-2,kmeans-3", "--size", "33"]


COMMANDS: dict[str, Callable[[Path], Sequence[str]]] = {"segment": _segment, "evaluate": _evaluate}

if __name__ == "__main__":
    main()
