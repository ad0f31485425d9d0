"""Puts the fused operators into models that were written without them; see `patch`."""

from msformer_kernels.patching.api import patch
from msformer_kernels.patching.report import Refusal, Replacement, Report

__all__ = ["Refusal", "Replacement", "Report", "patch"]
