"""Runs as tasks of a real Ray: the same results as without, and workers that die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image as PILImage

from benchmarks import cluster_overhead
from msformer.evaluation import command
from msformer.options import make_executor
from tests.msformer.conftest import QUICK_OPTIONS
from tests.msformer.evaluation import data
from tests.msformer.evaluation.test_command import evaluate
from tests.msformer.runs import work
from tests.msformer.test_cli import files, run
from tests.msformer.training.data import save_dark_model

ray = pytest.importorskip("ray")
Cluster = pytest.importorskip("msformer.runs.cluster").Cluster

ON_RAY = ("--cluster", "auto", "--threads", torch.get_num_threads())
"""With as many threads as here, since another number may round otherwise."""


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    """Runs use it, since this process is connected already."""
    cpus = 2 * torch.get_num_threads()
    ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    yield
    ray.shutdown()


def cluster(**changes: Any) -> Any:
    return Cluster(**{"address": "auto", "threads": 1, "at_once": None, "device": "cpu", **changes})


def outcomes(call: Any, count: int, folder: Path, **changes: Any) -> dict[int, Any]:
    """Value or error by item, of numbers."""
    with cluster(**changes) as executor:
        ended = dict(executor.run(call, range(count), folder, lambda item: print))
    return {item: outcome.exception() or outcome.result() for item, outcome in ended.items()}


def contents(folder: Path) -> dict[str, Any]:
    """Of all files that a run left, without times and the cluster, and without the report, which shows both."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "cluster")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    found: dict[str, Any] = {}
    for name in files(folder):
        content = (folder / name).read_bytes()
        content = b"" if name == "report.html" else content
        found[name] = timeless(json.loads(content)) if name.endswith(".json") else content
    return found


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    folder = data.make_pairs(tmp_path / "data", ("a", "b"))
    (folder / "images" / "sub").mkdir()
    data.save(folder / "images" / "sub" / "chest.tif", data.chest(data.lungs(64)))
    (folder / "images" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("model", [False, True])
def test_the_same_as_without(model: bool, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--mask", *(["--model", save_dark_model(tmp_path / "model")] if model else QUICK_OPTIONS)]
    arguments = ("segment", "data/images", *options)
    for out, more in (("local", ()), ("cluster", ON_RAY)):
        result = run(*arguments, "--out", out, *more)
        assert result.exit_code == 1
        assert "[4/4]" in result.output
        assert "3 of 4 images" in result.output
        assert "failed: data/images/broken.png: not an image" in result.output
    assert contents(tmp_path / "cluster") == contents(tmp_path / "local")
    assert json.loads((tmp_path / "cluster" / "summary.json").read_text())["cluster"]["nodes"] == 1
    (tmp_path / "cluster" / "b.mask.png").unlink()
    again = run(*arguments, "--out", "cluster", *ON_RAY)
    assert "2 of 4 images were already done" in again.output
    assert contents(tmp_path / "cluster") == contents(tmp_path / "local")


def test_an_evaluation_is_the_same_as_without(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in one worker, since another would need seconds for its imports
    one = partial(make_executor, at_once=1)
    monkeypatch.setattr(command, "make_executor", lambda *arguments, at_once, here: one(*arguments, here=here))
    arguments = ("--data", pairs, "--methods", f"otsu,kmeans-2,{save_dark_model(tmp_path / 'model')}/:net")
    for out, more in (("local", ()), ("cluster", ON_RAY), ("cluster", ON_RAY)):
        result = evaluate(*arguments, "--out", tmp_path / out, *more)
        assert result.exit_code == 0, result.output
    assert "8 of 8 label maps were already done" in result.output
    scores = [pd.read_csv(tmp_path / out / "scores.csv").drop(columns="seconds") for out in ("local", "cluster")]
    pd.testing.assert_frame_equal(*scores)
    assert contents(tmp_path / "cluster" / "maps") == contents(tmp_path / "local" / "maps")


def test_weights_are_unpacked_once_a_process(tmp_path: Path) -> None:
    processes = set(outcomes(work.Weights(tmp_path), 20, tmp_path).values())
    unpacked = [int(path.name.partition("-")[0]) for path in tmp_path.iterdir()]
    assert os.getpid() not in processes
    assert sorted(unpacked) == sorted(processes)


def test_few_tasks_are_under_way(tmp_path: Path) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(30):
            taken.append(item)
            yield item

    with cluster(at_once=3) as executor:
        for ended, _ in enumerate(executor.run(work.nothing, items(), tmp_path, lambda item: print)):
            assert len(taken) - ended <= 3
    assert len(taken) == 30


def test_a_package_that_a_node_lacks_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a worker cannot import what it needs: No module named 'nibabel'"):
        outcomes(work.lacking, 4, tmp_path)


def test_workers_that_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-way: once loses nothing, always is one item that fails."""
    monkeypatch.setattr("msformer.runs.cluster.ATTEMPTS", 2)
    traces, out = tmp_path / "traces", tmp_path / "out"
    traces.mkdir()
    found = outcomes(partial(work.dangerous, traces=traces), 7, out, threads=2)
    tried = Counter(path.name.partition("-")[0] for path in traces.iterdir())
    assert tried == {"0": 1, "1": 1, "2": 2, "3": 2, "4": 1, "5": 1, "6": 1}
    died, failed = found.pop(work.DIES), found.pop(work.FAILS)
    assert isinstance(died, OSError), "which a run says of an image"
    assert "its worker died 2 times: " in str(died)
    assert (type(failed), str(failed)) == (FloatingPointError, "the loss became nan")
    assert "in dangerous" in str(failed.__cause__), "where it happened in the worker"
    assert found == dict.fromkeys((0, 1, 2, 5, 6), 2), "threads"
    assert files(out) == {f"{item}.{kind}" for item in found for kind in ("png", "json")}
    assert {path.read_bytes() for path in out.glob("*.png")} == {b"whole"}


def test_more_than_a_node_has() -> None:
    with pytest.raises(ValueError, match="threads: 1000, but the largest node of the cluster has"):
        cluster(threads=1000).__enter__()
    with pytest.raises(ValueError, match="no node of the cluster has a GPU"):
        cluster(device="cuda").__enter__()
    with pytest.raises(ValueError, match="expected cpu or cuda, got cuda:1"):
        cluster(device="cuda:1")


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with one is said at once; Ray itself would wait for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        connect = sys.modules["msformer.runs.cluster"]._connect
        monkeypatch.setattr("msformer.runs.cluster.JOIN_SECONDS", 2)
        with pytest.raises(ValueError, match=f"127.0.0.1:{port} is not a Ray that this machine can join"):
            connect(f"127.0.0.1:{port}")
    with pytest.raises(ValueError, match=f"cluster: nothing answers at 127.0.0.1:{port}: .*refused"):
        connect(f"127.0.0.1:{port}")
    for address in ("here", "ray://host:10001", "host:", ":1"):
        with pytest.raises(ValueError, match="cluster: expected auto or HOST:PORT"):
            cluster(address=address)
    monkeypatch.setenv("RAY_ADDRESS", "there")
    with pytest.raises(ValueError, match="RAY_ADDRESS: expected auto or HOST:PORT, got 'there'"):
        cluster()


def test_the_overhead_is_measured() -> None:
    result = CliRunner().invoke(cluster_overhead.main, ["--tasks", "3", "--rounds", "1", "--long", "2"])
    assert result.exit_code == 0, result.output
    for line in ("start: ", "first task: ", "nothing, Ray: ", "three_files, here: ", "waiting: ", "calculating: "):
        assert line in result.output


def test_ctrl_c_keeps_what_is_done(pairs: Path, tmp_path: Path) -> None:
    """In a process with a Ray of its own, which is gone afterwards."""
    (pairs / "images" / "broken.png").unlink()
    for number in range(12):
        data.save(pairs / "images" / f"{number:02d}.png", data.lesion(data.disc()))
    out = tmp_path / "out"
    arguments = ["segment", str(pairs / "images"), "--out", str(out), *QUICK_OPTIONS]
    process = subprocess.Popen(
        [sys.executable, "-m", "msformer", *arguments, "--cluster", "auto"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert "interrupted; finished images are complete" in output
    assert "Traceback" not in output
    done = len(list(out.rglob("*.json")))
    assert 0 < done < 15
    for path in out.glob("[0-9]*.png"):
        with PILImage.open(path) as image:
            image.load()
    assert f"{done} of 15 images were already done" in run(*arguments).output
    assert not [name for name in files(out) if Path(name).name.startswith(".")]
