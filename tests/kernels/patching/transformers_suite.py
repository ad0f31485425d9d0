"""Transformers' own common tests with every model patched, and as they are.

    pip download --no-deps --no-binary transformers transformers==5.24.0 && tar xzf transformers-5.24.0.tar.gz
    python -m tests.kernels.patching.transformers_suite transformers-5.24.0

The folder is the source distribution of the version that is installed; `parameterized` must be, too. A model is patched
when it has been made, with ``min_gain=0``. The exit status is 1 where a test ends otherwise than unpatched.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import msformer_kernels
from msformer_kernels.patching import api

MODELS = Path(__file__).with_name("transformers_models.py")
NAME = "transformers_tests"
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
"""Parts that the common tests import and the distribution leaves out: other tests, of which the models have none."""


class Outcomes:
    """Notes how each test ended."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("::")[2]
        if self.found.get(name) == "failed":
            return  # the report of a subtest, or of the call before its end
        if report.when == "call" or report.outcome != "passed":
            self.found[name] = report.outcome


def prove_once() -> None:
    """The tests make hundreds of models that are alike; one model after the other shares the proofs."""
    known: dict[Any, Any] = {}
    original = api.match
    api.match = lambda name, module, children, plans, _: original(name, module, children, plans, known)


def patch_models(replaced: Counter[str]) -> None:
    """Patches each model of transformers at the end of its constructor, or once its weights are loaded."""
    from transformers import PreTrainedModel

    def patched(model: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a model on the meta device is patched after loading
            report = msformer_kernels.patch(model, min_gain=0)
        replaced.update(r.by for r in report.replaced)
        return model

    original_init, original_load = PreTrainedModel.post_init, PreTrainedModel.from_pretrained.__func__

    @functools.wraps(original_init)
    def post_init(self: Any) -> None:
        original_init(self)
        patched(self)

    @functools.wraps(original_load)
    def from_pretrained(cls: Any, *given: Any, **named: Any) -> Any:
        found = original_load(cls, *given, **named)
        if isinstance(found, tuple):  # with a report of the loading
            return patched(found[0]), *found[1:]
        return patched(found)

    PreTrainedModel.post_init = post_init
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def run(folder: Path, patch: bool, result: Path, more: list[str]) -> None:
    """Runs the tests in this process; writes how each ended, and what was replaced."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / NAME).symlink_to(folder.resolve() / "tests")
        sys.path.insert(0, scratch)
        for module, name in ABSENT.items():
            sys.modules[f"{NAME}.{module}"] = made = types.ModuleType(module)
            setattr(made, name, type(name, (), {}))
        outcomes, replaced = Outcomes(), Counter[str]()
        if patch:
            prove_once()
            patch_models(replaced)
        options = ["-q", "-p", "no:cacheprovider", "-o", "timeout=0", "-o", "addopts=", "--tb=line", "-W", "ignore"]
        pytest.main([str(MODELS), *options, *more], plugins=[outcomes])
        result.write_text(json.dumps([outcomes.found, replaced]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.patching.transformers_suite")
    parser.add_argument("folder", type=Path, help="with transformers' folder tests")
    parser.add_argument("--write", nargs=2, metavar=("plain|patched", "FILE"), help="one run, in this process")
    options, more = parser.parse_known_args()
    if options.write:
        run(options.folder, options.write[0] == "patched", Path(options.write[1]), more)
        return
    found: dict[str, tuple[dict[str, str], dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("plain", "patched"):
            file = Path(scratch) / kind
            command = [sys.executable, "-m", "tests.kernels.patching.transformers_suite", str(options.folder)]
            subprocess.run([*command, "--write", kind, str(file), *more], check=True)
            found[kind] = json.loads(file.read_text())
            print(f"{kind}: {dict(Counter(found[kind][0].values()))}, replaced: {found[kind][1]}", flush=True)
    plain, patched = found["plain"][0], found["patched"][0]
    other = sorted(name for name in plain.keys() | patched.keys() if plain.get(name) != patched.get(name))
    for name in other:
        print(f"{name}: {plain.get(name)}, patched {patched.get(name)}")
    if other or not plain or not found["patched"][1]:
        sys.exit(1)
    print("every test ends as it does unpatched")


if __name__ == "__main__":
    main()
