"""The wheel on several versions of Python and torch: a plain install, its import, and a sample of the operators' tests.

    nox                                     # each of COMBINATIONS whose Python is on PATH
    nox -s "compatibility(python='3.13', torch='2.15.0')"

A wheel of this Python in dist/ is used (`make build`), else one is built. torch is what the package index has by that
version. Its ordinary build for Linux brings 4 to 7 GB of packages of its vendor along: packages are not cached, and an
environment is removed when its session has passed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
COMBINATIONS = (
    ("3.10", "2.8.0"),
    ("3.11", "2.13.0"),
    ("3.12", "2.10.0"),
    ("3.13", "2.14.1"),
    ("3.14", "2.15.0"),
)
"""Python and torch: the oldest and the newest of both, and what lies between."""
SAMPLE = (
    ("tests/kernels/test_package.py",),
    (
        "tests/kernels/core/test_torch_integration.py",
        *("-k", "(fullgraph or exported_program or mixed_inputs or (opcheck and linear)) and not cuda and not triton"),
    ),
    ("tests/kernels/ops", "-m", "accuracy", "-k", "native and f32 and (segformer or heads or five)"),
)
"""Of the kernels; what each torch may change, in under a minute on one core."""

nox.options.default_venv_backend = "venv"


def find_wheel(session: nox.Session, python: str) -> Path:
    """The wheel for this Python in dist/, which is built if there is none."""
    dist = ROOT / "dist"
    pattern = f"msformer-*-cp{python.replace('.', '')}-*.whl"
    if not list(dist.glob(pattern)):
        build = ("python", "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={dist}", str(ROOT))
        session.run(*build, env={"MSFORMER_CUDA": "0"})  # what is tested here runs on the CPU
    return max(dist.glob(pattern), key=lambda path: path.stat().st_mtime)


@nox.session
@nox.parametrize("python,torch", COMBINATIONS)
def compatibility(session: nox.Session, torch: str) -> None:
    """A plain install of the wheel beside this torch."""
    wheel = find_wheel(session, str(session.python))
    session.install("--no-cache-dir", "--no-compile", f"torch=={torch}", str(wheel), "pytest", "pytest-timeout")
    folder = Path(session.create_tmp()) / "sources"  # without the packages, so that the installed ones are tested
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tests", "benchmarks"):  # these have the accuracy rule
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    session.chdir(folder)
    session.run("python", "-c", "import torch, msformer_kernels as k; print(torch.__version__, k.explain())")
    session.run("python", "-c", "import msformer_kernels as k; assert 'native' in k.available_backends()")
    # the tests of the plain install know no fixtures, whose files need extras
    session.run("python", "-m", "pytest", "-q", "--noconftest", "tests/msformer/test_extras.py")
    for arguments in SAMPLE:
        session.run("python", "-m", "pytest", "-q", *arguments)
    session.chdir(ROOT)
    shutil.rmtree(session.virtualenv.location)
