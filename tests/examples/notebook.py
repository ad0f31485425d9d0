"""Executes the notebook of the first hour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.examples.runs import EXAMPLES

NOTEBOOK = EXAMPLES / "first_hour.ipynb"


def executed(folder: Path) -> Any:
    """The notebook after all of its cells ran, in this folder; the first error is raised."""
    import nbclient
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
