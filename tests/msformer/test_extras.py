"""A plain install: what works, and what every other way in says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from msformer.extras import EXTRAS, MissingPackage, missing_package

ROOT = Path(__file__).resolve().parents[2]
OF_EXTRAS = sorted(name for packages in EXTRAS.values() for name in packages)
PLAIN = f"""
import pkgutil, sys
sys.modules.update(dict.fromkeys({OF_EXTRAS}))  # as if they were not installed
"""


def plain(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in which no extra is installed."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", PLAIN + code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_module_works_or_says_which_extra_it_needs() -> None:
    code = """
import importlib
import msformer, torch
from msformer.extras import MissingPackage

network = msformer.MSFormer(embed_dim=8)
assert network(torch.rand(1, 3, 33, 33)).logits.shape[0] == 1
for name in msformer.__all__:
    try:
        getattr(msformer, name)
    except MissingPackage as error:
        print("name", name, error)
for module in pkgutil.walk_packages(msformer.__path__, "msformer."):
    if module.name == "msformer.__main__":
        continue
    try:
        importlib.import_module(module.name)
        print("works", module.name)
    except MissingPackage as error:
        print("module", module.name, error)
"""
    done = plain(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    refused = [line for line in lines if not line.startswith("works")]
    sentence = re.compile(r"(name|module) (\S+) \S+ is not installed; run: pip install 'msformer\[(\w+)\]'")
    found = [sentence.fullmatch(line) for line in refused]
    assert all(found), done.stdout
    extras = {match[2]: match[3] for match in found if match}
    assert {name for name in extras if "." not in name} == {"Segmentation", "TrainedModel", "load", "segment", "train"}
    assert extras["msformer.cli"] == extras["msformer.pictures"] == extras["msformer.io.read"] == "segment"
    assert {"works msformer.model", "works msformer.losses", "works msformer.fitting"} <= set(lines)


@pytest.mark.parametrize("arguments", [["--version"], ["segment", "a.png", "--out", "out"]])
def test_the_command_says_which_extra_it_needs(arguments: list[str]) -> None:
    done = plain("from msformer.__main__ import main\nmain()", *arguments)
    assert done.returncode == 1
    assert done.stderr == "error: click is not installed; run: pip install 'msformer[segment]'\n"
    assert done.stdout == ""


def test_extras_name_packages_by_what_they_are_imported_as() -> None:
    """In pyproject.toml, and in this environment."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = packages_distributions()
    for extra, packages in EXTRAS.items():
        required = {re.split(r"[<>=;\[ ]", requirement)[0] for requirement in extras[extra]} - {"msformer"}
        of_others = {name for other in EXTRAS if other != extra for name in EXTRAS[other].values()}
        assert required - of_others == set(packages.values()) - {"markupsafe"}  # that comes with jinja2
        for module, name in packages.items():
            assert name in {found.lower().replace("_", "-") for found in installed.get(module, [name])}


def test_other_failures_are_no_matter_of_extras() -> None:
    assert missing_package(ModuleNotFoundError("No module named 'nothing'", name="nothing")) is None
    assert missing_package(ImportError("cannot import name", name="click")) is None
    unknown = missing_package(ModuleNotFoundError("No module named 'x'", name="x.y"), "train")
    assert unknown == "x is not installed; run: pip install 'msformer[train]'"
    assert missing_package(MissingPackage("a sentence")) == "a sentence"
