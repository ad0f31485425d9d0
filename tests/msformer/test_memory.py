"""Keeping freed memory: what the C library is told, and when."""

from __future__ import annotations

import ctypes
import platform

import pytest

from msformer.memory import kept_memory


class Library:
    """Takes down the calls of mallopt."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return 1


def test_thresholds_are_raised_within_the_block_and_lowered_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    raised: dict[int, int] = {}

    def interrupted() -> None:
        with kept_memory():
            raised.update(library.calls)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert raised == {-3: 2**30, -1: 2**31 - 1}
    assert dict(library.calls[2:]) == {-3: 2**25, -1: 2**26}


def test_thresholds_are_lowered_after_the_last_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    with kept_memory():
        with kept_memory():
            pass
        assert dict(library.calls) == {-3: 2**30, -1: 2**31 - 1}
    assert dict(library.calls) == {-3: 2**25, -1: 2**26}


def test_another_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    with kept_memory():
        pass
    assert not library.calls
