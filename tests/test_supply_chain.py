"""What is installed is locked, and nothing that a user hands over is unpickled: a pickle runs code when it is read."""

from __future__ import annotations

import ast
import io
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from msformer.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("msformer", "kernels", "benchmarks", "studies")
NEEDS = {"torch.load": ("weights_only", True), **dict.fromkeys(("np.load", "numpy.load"), ("allow_pickle", False))}
"""Readers that unpickle unless they are told not to."""
UNPICKLES = re.compile(
    r"(pickle|cloudpickle|dill|marshal|joblib|shelve)\.(load|loads|open|Unpickler)|(pd|pandas)\.read_pickle|"
    r"torch\.jit\.load|yaml\.(load|unsafe_load)"
)


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def unsafe(path: Path) -> Iterator[str]:
    for name, call in calls(path):
        if name in NEEDS:
            option, value = NEEDS[name]
            given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
            if given.get(option) is not value:
                yield f"{path.name}:{call.lineno}: {name} without {option}={value}"
        elif UNPICKLES.fullmatch(name):
            yield f"{path.name}:{call.lineno}: {name}"


def test_nothing_is_unpickled() -> None:
    paths = [path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 100
    assert [fault for path in paths for fault in unsafe(path)] == []


def test_an_unsafe_reader_would_be_noticed(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("torch.load(x)\nnp.load(x, allow_pickle=True)\npickle.loads(x)\ntorch.load(x, weights_only=True)\n")
    assert len(list(unsafe(path))) == 3


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_harmful_checkpoint_is_refused(form: str, tmp_path: Path) -> None:
    """By the reader of trainings that go on."""
    touched = tmp_path / "touched"
    file = io.BytesIO()
    if form == "pickle":
        pickle.dump(Harmful(touched), file)
    else:
        torch.save({"format": Harmful(touched)}, file)
    (tmp_path / checkpoint.CHECKPOINT).write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="damaged, or no checkpoint of a training"):
        checkpoint.read(tmp_path, {})
    assert not touched.exists()


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(name: str) -> dict[str, int]:
    """The packages of a lock file, and how many hashes each has."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    parts = re.split(r"^([\w.-]+)(?:\[[^]]*\])?==", text, flags=re.MULTILINE)[1:]
    return {normalized(n): rest.count("--hash=sha256:") for n, rest in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_lock_files_hold_what_pyproject_asks_for() -> None:
    """`make lock` writes them anew."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    needed = project["project"]["dependencies"] + project["build-system"]["requires"]
    wanted = {"base": needed + extras["segment"]}  # of `make demo`
    wanted["bench"] = wanted["base"] + extras["bench"]
    wanted["docs"] = wanted["bench"] + extras["docs"]
    of_tests = ("test", "dev", "cluster", "medical", "train")
    wanted["all"] = wanted["bench"] + [requirement for extra in of_tests for requirement in extras[extra]]
    for name, requirements in wanted.items():
        packages = locked(name) | locked("torch-cpu")
        names = {normalized(re.split(r"[<>=;\[ ]", requirement)[0]) for requirement in requirements} - {"msformer"}
        assert names <= packages.keys(), f"{name}.txt lacks {names - packages.keys()}: make lock"
        assert all(packages.values()), "a package without a hash"
