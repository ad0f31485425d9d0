"""The wheel for Arm, run on another processor: `make wheel-test-aarch64`."""
