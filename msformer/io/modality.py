"""What a file without a modality of its own is of. Never guessed by its values alone: phase and field maps reach as low
as the Hounsfield units of air."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from msformer.io.base import AIR, Notes

GIVEN, NAME = "the user", "the name"
_SUFFIX = re.compile(r"\.nii(\.gz)?$|\.[^.]*$", re.IGNORECASE)
_CODE = re.compile(r"[A-Z]{2,16}")


def override(given: str | None, said: str, notes: Notes) -> tuple[str, str]:
    """The modality and where it comes from: the user, else the file."""
    if given is None or given == said:
        return said, "the file" if said else ""
    if said:
        notes.assume(f"the modality {given} was given; the file says {said}")
    return given, GIVEN


def find_modality(path: Path, given: str | None, lowest: Callable[[], float], notes: Notes) -> tuple[str, str]:
    """The modality of a file that does not say it, and where it comes from: the user, else a file beside this one, else
    its name together with its values; "", "" if nothing says it.

    Args:
        given: by the user.
        lowest: finds the lowest value of the whole file; called only where the name says CT.
    """
    if given is not None:
        return given, GIVEN
    found, source = hint(path)
    if source != NAME:
        return found, source
    if lowest() > AIR:
        notes.assume(f"the name says CT, but no value is as low as {AIR:g}; it is not taken for CT")
        return "", ""
    return "CT", f"{NAME} and the values"


def hint(path: Path) -> tuple[str, str]:
    """The modality that a file beside this one gives, or this one's name, and which of both; "", "" for neither."""
    name = _SUFFIX.sub("", path.name)
    beside = path.with_name(f"{name}.json")
    found = _in_sidecar(beside)
    if found:
        return found, beside.name
    return ("CT", NAME) if "ct" in re.split(r"[^a-z0-9]+", name.lower()) else ("", "")


def warn_of_air(lowest: float, modality: str, notes: Notes) -> None:
    """Says how to have a picture shown as CT, where it may be one."""
    if not modality and lowest <= AIR:
        notes.warn("it has values as low as CT, but nothing says that it is CT; if it is, say --modality CT")


def _in_sidecar(path: Path) -> str:
    """The modality in a file of BIDS or dcm2niix beside a volume; "" if there is none."""
    try:
        if not path.is_file():
            return ""
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    found = content.get("Modality") if isinstance(content, dict) else None
    code = found.strip().upper() if isinstance(found, str) else ""
    return code if _CODE.fullmatch(code) else ""
