"""Random calls of the operators, each of them checked against the reference: `python -m tests.kernels.fuzzing`."""
