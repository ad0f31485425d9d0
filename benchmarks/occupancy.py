"""How many programs of a compiled kernel a multiprocessor holds at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on it share (NVIDIA: tables of the CUDA programming guide; AMD: the ISA guide of CDNA 3)."""

    registers: int
    """Of 32 bits."""
    register_unit: int
    """A thread's registers are a multiple of it."""
    shared: int
    """Bytes for all programs."""
    shared_limit: int
    """Bytes for one program."""
    reserved: int
    """Bytes of shared memory that every program takes besides."""
    warps: int
    programs: int
    threads: int = 32
    """Of a warp."""


_KIB = 1024
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 8, 164 * _KIB, 163 * _KIB, _KIB, 64, 32),
    "sm_89": Multiprocessor(65536, 8, 100 * _KIB, 99 * _KIB, _KIB, 48, 24),
    "sm_90": Multiprocessor(65536, 8, 228 * _KIB, 227 * _KIB, _KIB, 64, 32),
    "sm_100": Multiprocessor(65536, 8, 228 * _KIB, 227 * _KIB, _KIB, 64, 32),
    "sm_120": Multiprocessor(65536, 8, 100 * _KIB, 99 * _KIB, _KIB, 48, 32),
    "gfx942": Multiprocessor(4 * 512 * 64, 8, 64 * _KIB, 64 * _KIB, 0, 32, 32, threads=64),
}


def programs(target: str, warps: int, registers: int, shared: int) -> tuple[int, int]:
    """(programs that the registers allow, programs that shared memory allows), neither more than there can be.

    `registers` are a thread's, `shared` a program's bytes.
    """
    sm = MULTIPROCESSORS[target]
    most = min(sm.programs, sm.warps // warps)
    thread = -(-max(1, registers) // sm.register_unit) * sm.register_unit
    # each of a multiprocessor's four parts has its own registers
    by_registers = 4 * (sm.registers // 4 // (thread * sm.threads)) // warps
    by_shared = sm.shared // (-(-shared // 128) * 128 + sm.reserved) if shared + sm.reserved else most
    return min(most, by_registers), min(most, by_shared)
