"""Tests of msformer_kernels; whatever imports them, in this process or another, has a faster interpreter of Triton."""

from tests.kernels.interpreter import hasten

hasten()
