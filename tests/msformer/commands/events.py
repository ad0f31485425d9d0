"""What a command told, with ``--json``."""

from __future__ import annotations

import json
from typing import Any

from click.testing import Result

Event = dict[str, Any]


def events(result: Result) -> list[Event]:
    """All of standard output, which holds nothing else, and the last of which is the end."""
    assert result.stdout.isascii()
    found = [json.loads(line, parse_constant=_refused) for line in result.stdout.splitlines()]
    assert found[-1]["event"] == "end"
    assert found[-1]["exit_code"] == result.exit_code
    assert [each["event"] for each in found].count("end") == 1
    return found


def of_kind(found: list[Event], kind: str) -> list[Event]:
    return [each for each in found if each["event"] == kind]


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
