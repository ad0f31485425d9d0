"""What a run found, and the JSON file that holds it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msformer.options import needed_packages
from msformer.output import write_json

from .cases import OPERATIONS, PASSES, parse_shape
from .machine import Ceilings, Machine
from .rivals import DTYPES, PRECISIONS
from .rows import FAILED, MEASURED, WRONG, Row

VERSION = 1
"""Of the files; fields may be added with a default, anything else is another version."""
JSON_NAME = "results.json"


@dataclass
class Results:
    """All of a run."""

    machine: Machine
    ceilings: Ceilings
    rounds: int
    rows: list[Row]
    complete: bool = False
    """False if the run was interrupted."""
    keep_memory: bool = True
    """As `Settings.keep_memory`."""
    left_out: list[str] = field(default_factory=list)
    """What could not be measured on this machine or was not, and why, a line each."""

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "complete": self.complete,
            "machine": asdict(self.machine),
            "ceilings": asdict(self.ceilings),
            "rounds": self.rounds,
            "keep_memory": self.keep_memory,
            "left_out": self.left_out,
            "rows": [row.to_json() for row in self.rows],
        }


def read_results(path: Path) -> Results:
    """The results in a file that `write_json_file` or `save_to` wrote.

    Raises:
        ValueError: not such a file, or pydantic is missing; the message names the place in the file.
        OSError: it cannot be read.
    """
    with needed_packages("bench"):
        from pydantic import TypeAdapter, ValidationError

    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version is None:
        raise ValueError(f"{path}: is not a {JSON_NAME} of msformer bench: it has no version")
    if version != VERSION:
        raise ValueError(f"{path}: version: expected {VERSION}, got {version!r}, of another release of msformer")
    try:
        results = TypeAdapter(Results).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path}: {place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from error
    for number, row in enumerate(results.rows):
        if fault := _fault(row):
            raise ValueError(f"{path}: rows.{number}.{fault}")
    return results


def _fault(row: Row) -> str | None:
    """What no run writes."""
    known = {
        "operation": OPERATIONS,
        "dtype": tuple(DTYPES),
        "passes": PASSES,
        "precision": PRECISIONS,
        "status": (MEASURED, WRONG, FAILED),
    }
    for name, values in known.items():
        if getattr(row, name) not in values:
            return f"{name}: expected one of {', '.join(values)}, got {getattr(row, name)!r}"
    try:
        parse_shape(row.shape)
    except ValueError as error:
        return f"shape: {error}"
    for name in ("flop", "bytes", "samples"):
        value = getattr(row, name)
        if not all(0 < number < math.inf for number in (value if name == "samples" else [value])):
            return f"{name}: expected numbers above 0, got {value}"
    return None


def write_json_file(folder: Path, results: Results) -> Path:
    path = folder / JSON_NAME
    write_json(path, results.to_json())
    return path


def save_to(folder: Path, results: Results) -> Path:
    """Writes the results to the file of their machine in a folder of many machines; an older one is replaced."""
    path = folder / f"{slug(results.machine)}.json"
    write_json(path, results.to_json())
    return path


def slug(machine: Machine) -> str:
    """The machine as the name of a file: processor, cores, threads if fewer, torch."""
    threads = "" if machine.threads == machine.cores else f" {machine.threads} threads"
    text = f"{machine.processor} {machine.cores} cores{threads} torch {machine.torch}"
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:120]
