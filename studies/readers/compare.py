"""What a comparison of readers is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msformer.io.base import ImageError

Reader = Callable[[Path, int], NDArray[Any] | None]
"""A picture of a file by its index, to be compared; None where the reader does not know what is compared."""


@dataclass(frozen=True)
class Source:
    """Files that a package ships, and how they are read.

    Attributes:
        name: of the package and the kind of its files.
        files: finds them.
        pictures: how many we read from a file; raises ImageError where we refuse it, which reading one tells.
        ours: by what is compared, such as values: a picture of a file, and which of its pixels count.
        readers: independent ones by name, with what they are compared in.
        tolerance: by what is compared, the difference that is equal, where readers round.
        empty: whether an independent reader finds no picture in a file, either.
        known: why a reader is right or wrong to differ, by its name and a pattern of names of files.
    """

    name: str
    files: Callable[[], Iterator[Path]]
    pictures: Callable[[Path], int]
    ours: dict[str, Callable[[Path, int], tuple[NDArray[Any], NDArray[np.bool_] | None]]]
    readers: dict[str, tuple[str, Reader]]
    tolerance: dict[str, float] = field(default_factory=dict)
    empty: Callable[[Path], bool] = lambda path: False
    known: dict[tuple[str, str], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """Of one file.

    Attributes:
        empty: whether it holds no picture, as another reader agrees.
        refused: why we do not read it; "" if we do.
        equal: readers that found the same pixels in all of its pictures.
        differing: by reader, what is different without a known reason.
        explained: by reader, the known reason.
        silent: by reader, why it says nothing.
    """

    path: Path
    pictures: int = 0
    empty: bool = False
    refused: str = ""
    equal: tuple[str, ...] = ()
    differing: dict[str, str] = field(default_factory=dict)
    explained: dict[str, str] = field(default_factory=dict)
    silent: dict[str, str] = field(default_factory=dict)


def compare(source: Source, path: Path) -> Outcome:
    """Reads all pictures of a file in every way."""
    try:
        count = source.pictures(path)
    except (ImageError, OSError) as error:
        reason = " ".join(str(error).replace(f"{path}: ", "").split())
        return Outcome(path, empty=source.empty(path), refused=reason)
    equal: list[str] = []
    differing: dict[str, str] = {}
    explained: dict[str, str] = {}
    silent: dict[str, str] = {}
    for name, (compared, reader) in source.readers.items():
        problem = None
        try:
            for index in range(count):
                problem = problem or _difference(source, path, index, compared, reader)
        except NotImplementedError as error:
            silent[name] = str(error)
        except Exception as error:  # readers raise whatever they like
            silent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[-160:]}"
        else:
            known = _known(source, name, path)
            if problem is None:
                equal.append(name)
            elif known is not None:
                explained[name] = known
            else:
                differing[name] = problem
    return Outcome(path, count, False, "", tuple(equal), differing, explained, silent)


def _known(source: Source, name: str, path: Path) -> str | None:
    found = [why for (who, pattern), why in source.known.items() if who == name and re.search(pattern, path.name)]
    return found[0] if found else None


def _difference(source: Source, path: Path, index: int, compared: str, reader: Reader) -> str | None:
    """What is different in a picture; None if nothing is."""
    ours, counting = source.ours[compared](path, index)
    theirs = reader(path, index)
    if theirs is None:
        raise NotImplementedError(f"has no {compared} of such a file")
    if theirs.shape != ours.shape:
        return f"picture {index}: the shape is {ours.shape}, theirs {theirs.shape}"
    apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    if counting is not None:
        apart = apart[counting]
    limit = source.tolerance.get(compared, 0)
    if not apart.size or apart.max() <= limit:
        return None
    return f"picture {index}: up to {apart.max():.4g} apart in {100 * (apart > limit).mean():.2g}% of the pixels"


@cache
def optional(name: str) -> ModuleType | None:
    """A package that may not be installed."""
    try:
        return import_module(name)
    except ImportError:
        return None


def shipped(package: str, folder: str, pattern: str) -> Iterator[Path]:
    """The files below a folder of an installed package whose names match; none if it is not installed."""
    module = optional(package)
    if module is None or module.__file__ is None:
        return
    for path in sorted((Path(module.__file__).parent / folder).rglob("*")):
        if path.is_file() and re.search(pattern, path.name, re.IGNORECASE) and "__pycache__" not in path.parts:
            yield path
