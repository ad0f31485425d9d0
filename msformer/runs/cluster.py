"""The items of a run as tasks of Ray, on this machine or on a cluster. Needs the extra ``[cluster]``.

A task reads its input itself, works in a folder of its own, and returns the files that it wrote there; this process
writes them to the folder of the run. So the nodes have to see the images, under the same path, and nothing else. The
function of the run, with the weights of models, is sent once a node and unpacked once a process. A bounded number of
tasks is under way, and one whose worker or node died is started again, `ATTEMPTS` times in all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import RayError

import msformer
from msformer.machine import cores
from msformer.messages import say
from msformer.output import write_files
from msformer.runs.executors import Executor, Item, Report, Value, Work

AUTO = "auto"
ATTEMPTS = 3
CONNECT_SECONDS, JOIN_SECONDS = 5, 30
OBJECT_STORE = 256 << 20
"""Bytes on this machine, for results under way; Ray moves to the disk what is more."""
GPU_SHARE = 0.25
"""Of a task: as many fits a GPU as without a cluster."""
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}

_ERROR = re.compile(r"^[\w.]*(?:Error|Exception): (?!.*Traceback)(.+)$", re.MULTILINE)
"""The last line of a traceback; the first of several is the cause of the others."""


class Needs(NamedTuple):
    """Of each task."""

    cpus: int
    gpus: float


class Cluster(Executor):
    """Tasks of Ray, each with a number of threads.

    Args:
        address: ``"auto"``: the cluster that the environment variable ``RAY_ADDRESS`` names, or a Ray of this machine's
            own, for the time of the run; or ``HOST:PORT`` of a cluster that this machine belongs to. A Ray that this
            process is connected to already is used as it is.
        threads: of each task, which also are the CPUs it asks for.
        at_once: tasks under way at most; None: twice as many as can run, so that no worker waits for this process.
        device: of the work; with ``"cuda"`` a task asks for a fourth of a GPU.

    Raises:
        ValueError: an address or device that means nothing here; on entering also no answer from the address, or no
            node that is large enough.
    """

    def __init__(self, address: str, threads: int, at_once: int | None, device: str) -> None:
        kind, _, index = device.partition(":")
        if index:
            raise ValueError(f"device: a cluster chooses the GPU of each task, expected cpu or cuda, got {device}")
        self.address = _address(address)
        self.threads, self.at_once = threads, at_once
        self.needs = Needs(threads, GPU_SHARE if kind == "cuda" else 0)
        self._slots = 0
        self._mine = False
        self._nodes: list[dict[str, float]] = []

    def __enter__(self) -> Cluster:
        self._mine = not ray.is_initialized()
        if self._mine:
            _connect(self.address)
        try:
            self._nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._slots = sum(_slots(node, self.needs) for node in self._nodes)
            if self._slots == 0:
                raise ValueError(self._too_small())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        nodes, tasks = _count(len(self._nodes), "node"), _count(min(self._slots, self.at_once or self._slots), "task")
        say(f"Ray {ray.__version__}, {nodes}: {tasks} at a time, each with {_count(self.threads, 'thread')}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            ray.shutdown()

    @property
    def facts(self) -> dict[str, Any]:
        cpus = sum(int(node.get("CPU", 0)) for node in self._nodes)
        return {"cluster": {"ray": ray.__version__, "nodes": len(self._nodes), "cpus": cpus, "threads": self.threads}}

    def run(
        self, work: Work[Item, Value], items: Iterable[Item], folder: Path, start: Callable[[Item], Report]
    ) -> Generator[tuple[Item, Future[Value]], None, None]:
        shared = [ray.put(work)]  # in a list, since Ray would unpack a bare reference for every task
        perform = ray.remote(_perform).options(num_cpus=self.needs.cpus, num_gpus=self.needs.gpus, max_retries=0)
        about = {"threads": self.threads, "version": msformer.__version__, "directory": os.getcwd()}
        limit = self.at_once or 2 * self._slots
        left = iter(items)
        running: dict[Any, tuple[Item, int]] = {}
        try:
            while True:
                for item in islice(left, limit - len(running)):
                    running[perform.remote(shared, item, **about)] = item, 1
                if not running:
                    return
                (reference,), _ = ray.wait(list(running))
                item, attempt = running.pop(reference)
                future = _outcome(reference, folder, attempt)
                if future is None:
                    running[perform.remote(shared, item, **about)] = item, attempt + 1
                else:
                    yield item, future
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _too_small(self) -> str:
        largest = int(max((node.get("CPU", 0) for node in self._nodes), default=0))
        if self.needs.gpus and not any(node.get("GPU") for node in self._nodes):
            return "device: cuda, but no node of the cluster has a GPU"
        return f"threads: {self.threads}, but the largest node of the cluster has {_count(largest, 'CPU')}"


def _perform(
    shared: list[Any], item: Any, *, threads: int, version: str, directory: str
) -> tuple[Any, dict[str, bytes]]:
    """Runs on a worker; returns the value of the work, and the files that it wrote."""
    if msformer.__version__ != version:
        host = socket.gethostname()
        raise ImportError(f"{host} has msformer {msformer.__version__}, this machine {version}; install the same")
    with contextlib.suppress(OSError):
        os.chdir(directory)  # names of files may be relative
    torch.set_num_threads(threads)
    with TemporaryDirectory(prefix="msformer-") as name:
        folder = Path(name)
        value = _unpacked(shared[0])(item, folder, lambda *progress: None)
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        return value, {name: path.read_bytes() for name, path in files.items()}


_kept: dict[str, Any] = {}
"""The work of the current run, by the id of its object; in workers."""


def _unpacked(reference: Any) -> Any:
    key = reference.hex()
    if key not in _kept:
        _kept.clear()
        _kept[key] = ray.get(reference)
    return _kept[key]


def _outcome(reference: Any, folder: Path, attempt: int) -> Future[Any] | None:
    """Of a task that ended, its files written; None: its worker died, and it should be started again.

    Raises:
        ValueError: the worker could not import what it needs.
    """
    future: Future[Any] = Future()
    try:
        value, files = ray.get(reference)
        write_files(files, folder)
        future.set_result(value)
    except RayError as error:
        cause = getattr(error, "cause", None)  # what the work raised
        if isinstance(cause, ImportError):
            raise ValueError(f"cluster: a worker cannot import what it needs: {cause}") from error
        if isinstance(cause, Exception) and not isinstance(cause, RayError):
            cause.__cause__ = error  # with the traceback of the worker
            future.set_exception(cause)
        elif attempt < ATTEMPTS:
            return None
        else:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            future.set_exception(ChildProcessError(f"its worker died {ATTEMPTS} times: {reason}"))
    except OSError as error:
        future.set_exception(error)
    return future


def _address(address: str) -> str:
    """As Ray wants it: ``HOST:PORT``, or ``"local"`` for a Ray of this machine's own."""
    found = os.environ.get("RAY_ADDRESS", "local") if address == AUTO else address
    host, _, port = found.rpartition(":")
    if found not in ("local", AUTO) and not (host and port.isdecimal() and "/" not in host):
        name = "RAY_ADDRESS" if address == AUTO else "cluster"
        raise ValueError(f"{name}: expected auto or HOST:PORT, got {found!r}")
    return found


def _connect(address: str) -> None:
    """Starts Ray, or joins a cluster.

    Raises:
        ValueError: the cluster cannot be joined, or Ray cannot be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = {"num_cpus": cores(), "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    if address not in ("local", AUTO):
        _check_answer(address)
    try:
        ray.init(address, **_QUIET, **(own if address == "local" else {}))
    except (RuntimeError, OSError, ValueError) as error:
        what = "Ray cannot be started" if address == "local" else f"{address} cannot be joined"
        raise ValueError(f"cluster: {what}: {error}") from error


def _check_answer(address: str) -> None:
    """Tries an address, in a process of its own: where nothing answers, Ray waits for minutes and ends the process.

    Raises:
        ValueError: no cluster there that this machine can join.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"cluster: nothing answers at {address}: {error}") from error
    code = f"import ray; ray.init({address!r}, log_to_driver=False, logging_level='ERROR')"
    try:
        trial = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=JOIN_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"cluster: what answers at {address} is not a Ray that this machine can join") from error
    if trial.returncode != 0:
        reasons = _ERROR.findall(trial.stderr) or [f"exit status {trial.returncode}"]
        raise ValueError(f"cluster: {address} cannot be joined: {reasons[0]}")


def _slots(node: dict[str, float], needs: Needs) -> int:
    """Tasks that a node can run at a time."""
    by_cpu = int(node.get("CPU", 0) // needs.cpus)
    return min(by_cpu, int(node.get("GPU", 0) / needs.gpus)) if needs.gpus else by_cpu


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
