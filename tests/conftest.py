"""Before anything is imported: Triton kernels run on CPU tensors, in Triton's interpreter, CUDA kernels in their
emulation, and where several processes test at a time each has one thread, unless a test asks for more. Slow tests come
last, the longest first.
"""

import getpass
import os
import tempfile

import pytest

os.environ["TRITON_INTERPRET"] = "1"
os.environ["MSFORMER_CUDA_EMULATE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor's cache does not tell one ATEN_CPU_CAPABILITY from another: what it keeps for one does not compile for others
_CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY", "native")
_CACHE = os.path.join(tempfile.gettempdir(), f"msformer-tests-{getpass.getuser()}", f"inductor-{_CAPABILITY}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _CACHE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    markers = (item.get_closest_marker("slow") for item in items)
    seconds = {item: marker.args[0] if marker else None for item, marker in zip(items, markers, strict=True)}
    items.sort(key=lambda item: (seconds[item] is not None, -(seconds[item] or 0)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in which other environments the accuracy tests ran."""
    rows = [
        f"{outcome:<8}{report.nodeid.partition('[')[2].removesuffix(']')}"
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if "test_environments.py" in getattr(report, "nodeid", "") and "[" in report.nodeid
    ]
    if rows:
        terminalreporter.section("accuracy tests in other environments")
        terminalreporter.write_line("\n".join(rows))
