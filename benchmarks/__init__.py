"""What the operators and MS-Former cost, beside their rivals: `python -m benchmarks --help`, or `pytest benchmarks`."""
