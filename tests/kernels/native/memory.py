"""Does the memory of the process grow with the number of calls?

    python -m tests.kernels.native.memory [--calls 10000]

For each operator a call of few tokens in float32, one in bfloat16 and one of many tokens, forward and backward: the
resident memory after all calls beside that after a tenth of them, and a failure where it grew by more than 1 MiB: with
10,000 calls about a hundred bytes a call.
"""

from __future__ import annotations

import argparse
import sys

from tests.kernels.native.test_threads import calls, growth

MOST_KILOBYTES = 1024
"""What an allocator may take or keep without a leak."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--only", default="", help="only the cases that hold this text")
    options = parser.parse_args()
    grown = 0
    for name in (name for name in calls() if options.only in name):
        large = name in calls()[2::3]
        count = max(100, options.calls // 10) if large else options.calls
        found = growth(name, count)
        wrong = found > MOST_KILOBYTES
        grown += wrong
        print(f"{name}: {count} calls, {found:+d} KiB{' GROWS' if wrong else ''}", flush=True)
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
